"""``hpcq bench start``, ``poll`` and ``ends``: they measure what they say, and clean up."""

import json
import shlex

import pytest

from hpcq import state_dir
from hpcq.cli.main import run


@pytest.fixture
def hpcq(capsys):
    def typed(line: str) -> tuple[int, str, str]:
        status = run(shlex.split(line))
        output = capsys.readouterr()
        return status, output.out, output.err

    return typed


def test_the_first_task_of_a_job(hpcq):
    status, output, error = hpcq("bench start --repeat 1 --json")
    assert status == 0, error
    told = json.loads(output)
    assert (told["batch"], len(told["seconds"])) == ("local", 1)
    assert told["median"] > 0
    assert state_dir.known_queues() == []


def test_asking_about_many_jobs(hpcq, fake_slurm):
    status, output, error = hpcq("bench poll --batch slurm -n 50 --partition short")
    assert status == 0, error
    assert "50 jobs" in output
    [submitted] = fake_slurm.calls("sbatch")
    assert "--array=0-49" in submitted["argv"]
    assert {"#SBATCH --hold", "#SBATCH --partition=short"} <= set(fake_slurm.submitted().splitlines())
    assert [call["argv"][-1] for call in fake_slurm.calls("scancel")] == ["4711_[0-49]"]
    assert len(fake_slurm.calls("squeue")) == 5
    assert hpcq("bench poll")[::2] == (2, "hpcq: --batch local has no jobs that wait; name one of slurm, pbs, torque\n")


def test_ends_of_walltimes(hpcq):
    status, output, error = hpcq("bench ends -n 1 --at-once 1")
    assert status == 0, error
    assert output.startswith("1 ends of walltimes: 12 tasks, ")
    assert output.endswith("no result lost, none doubled\n")
