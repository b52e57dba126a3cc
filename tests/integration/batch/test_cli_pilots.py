"""``hpcq submit-pilots``, ``pilots`` and ``cancel-pilots``, as typed, against a fake Slurm and real local processes."""

import json
import re
import shlex
import sys

import pytest

from hpcq import state_dir
from hpcq.batch.base import get_batch_system, load_jobs
from hpcq.cli import pilots as pilots_module
from hpcq.cli import submit as submit_module
from hpcq.cli.main import run
from hpcq.errors import QueueNotFoundError


@pytest.fixture
def queue(state):
    """A queue whose program is not running."""
    state_dir.ensure_queue_dir("ana")
    state_dir.write_private(state_dir.connection_file("ana"), b"{}")
    return "ana"


@pytest.fixture(autouse=True)
def manager(monkeypatch):
    """What the manager answers: None stands for no manager."""
    answers = {"pilots": None, "told": []}

    def ask(queue, what):
        if answers[what] is None:
            raise QueueNotFoundError(f"the manager of {queue!r} does not answer")
        return answers[what]

    monkeypatch.setattr(pilots_module, "ask_manager", ask)
    monkeypatch.setattr(submit_module, "tell_manager", answers["told"].append)
    return answers


@pytest.fixture
def hpcq(capsys):
    """Run a command line; return its exit status, standard output and standard error."""

    def typed(line: str) -> tuple[int, str, str]:
        status = run(shlex.split(line))
        output = capsys.readouterr()
        return status, output.out, output.err

    return typed


def test_an_unknown_queue(hpcq, queue):
    status, output, error = hpcq("submit-pilots --name other")
    assert (status, output) == (4, "")
    assert "no queue 'other'" in error
    assert "known are ana" in error
    assert "pass --create" in error
    assert error.count("\n") == 1


def test_a_dry_run_shows_the_script_and_the_command_and_does_nothing(hpcq, queue, fake_slurm):
    line = "submit-pilots --batch slurm -n 2 --memory 4GB --walltime 1:00:00 --require cvmfs:cms.cern.ch --dry-run"
    status, output, error = hpcq(line)
    assert (status, error) == (0, "")
    script, _, command = output.rpartition("# command: ")
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=hpcq-ana\n")
    connection = state_dir.connection_file("ana")
    assert script.endswith(
        f"exec {sys.executable} -P -m hpcq.pilot --connection {connection} --cores 1 --memory 4096 --walltime 3600 "
        "--require cvmfs:cms.cern.ch --batch slurm\n"
    )
    assert shlex.split(command)[:3] == ["sbatch", "--parsable", "--array=0-1"]
    assert fake_slurm.calls("sbatch") == []
    assert not state_dir.jobs_dir("ana").exists()
    status, output, _ = hpcq(line + " --json")
    assert json.loads(output)["command"][0] == "sbatch"


def test_submit_show_cancel(hpcq, queue, fake_slurm, manager):
    status, output, error = hpcq("submit-pilots --batch slurm -n 2")
    assert (status, error) == (0, "")
    assert output.startswith("submitted 2 pilots for queue ana to slurm: 4711_0 to 4711_1\n")
    assert manager["told"] == ["ana"]

    status, output, error = hpcq("pilots")
    assert status == 0
    assert error == "hpcq: only batch jobs are shown: the manager of 'ana' does not answer\n"
    assert "4711_1     pending  Priority" in output

    manager["pilots"] = [{"job_id": "4711_0", "state": "ready", "cores": 2, "cores_busy": 1, "tasks_done": 3}]
    fake_slurm.set_jobs({"4711_0": "RUNNING|n1|None", "4711_1": "PENDING||Priority"})
    status, output, error = hpcq("pilots --json")
    assert (status, error) == (0, "")
    assert [(row["job_id"], row["state"], row["hostname"]) for row in json.loads(output)] == [
        ("4711_0", "ready", "n1"),
        ("4711_1", "pending", ""),
    ]

    assert hpcq("cancel-pilots 4711")[:2] == (0, "gone: 4711_0, 4711_1\n")
    asked = len(fake_slurm.calls("squeue"))
    assert "cancelled" in hpcq("pilots")[1]
    assert len(fake_slurm.calls("squeue")) == asked  # their end is on record
    assert hpcq("cancel-pilots --all")[:2] == (0, "nothing was cancelled\n")


def test_a_failed_start_is_shown_with_the_end_of_its_output(hpcq, queue, fake_slurm, manager):
    hpcq("submit-pilots --batch slurm")
    [job] = load_jobs("ana")
    job.output.write_text("starting\nModuleNotFoundError: No module named 'hpcq'\n")
    fake_slurm.set_jobs({"4711": "FAILED|n1|NonZeroExitCode"})
    manager["pilots"] = []
    status, output, _ = hpcq("pilots")
    assert status == 0
    assert "failed start" in output
    assert f"4711 ended (NonZeroExitCode) and its pilot never reported; its script: {job.script}\n" in output
    assert "    | ModuleNotFoundError: No module named 'hpcq'\n" in output


def test_only_the_pending_ones(hpcq, queue, fake_slurm):
    hpcq("submit-pilots --batch slurm -n 3")
    fake_slurm.set_jobs({"4711_0": "RUNNING|n1|None", "4711_1": "PENDING||JobHeldUser", "4711_2": "PENDING||Priority"})
    _, output, _ = hpcq("cancel-pilots --pending --json")
    assert json.loads(output) == {"gone": ["4711_1", "4711_2"], "left": {}}
    assert fake_slurm.calls("scancel")[0]["argv"] == ["scancel", "--quiet", "4711_[1-2]"]


def test_what_does_not_go_is_said(hpcq, queue, fake_slurm):
    hpcq("submit-pilots --batch slurm")
    fake_slurm.behave({"scancel": {"becomes": "COMPLETING|n1|None"}})
    status, output, error = hpcq("cancel-pilots --all --timeout 0")
    assert (status, output) == (3, "nothing was cancelled\n")
    assert error.startswith("hpcq: not gone after 0 s, seen from ")
    assert error.endswith("4711 (completing)\n")


def test_a_batch_system_that_does_not_answer(hpcq, queue, fake_slurm):
    hpcq("submit-pilots --batch slurm")
    fake_slurm.behave(
        {"squeue": {"status": 1, "stderr": "slurm_load_jobs error: Unable to contact slurm controller\n"}}
    )
    status, output, error = hpcq("pilots")
    assert status == 3
    assert "unknown" in output
    assert "hpcq: squeue refused: " in error
    status, output, error = hpcq("cancel-pilots --all --timeout 0")
    assert status == 3  # no answer is not an end
    assert "4711 (no answer)" in error


def test_refused(hpcq, queue, fake_slurm):
    fake_slurm.behave({"sbatch": {"status": 1, "stderr": "sbatch: error: invalid partition specified: nope\n"}})
    status, output, error = hpcq("submit-pilots --batch slurm --partition nope")
    assert (status, output) == (3, "")
    assert error.startswith('hpcq: sbatch refused: "invalid partition specified: nope" (host ')
    assert error.count("\n") == 1
    assert "99% full" in hpcq("submit-pilots --batch slurm --partition nope -v")[2]


def test_sbatch_missing(hpcq, queue, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = hpcq("submit-pilots --batch slurm")
    assert status == 3
    assert error.startswith("hpcq: sbatch not found on ")
    assert "`--batch local` needs no batch system" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--batch lsf", "unknown batch system 'lsf'; known are local, pbs, slurm, torque"),
        ("--memory lots", "--memory 'lots' is not a size"),
        ("--walltime 8:00", "--walltime '8:00' is not a time"),
        ("--walltime 0", "walltime_s 0 is out of range"),
        ("-n 0", "count 0 is out of range"),
        ("--require example.org", "--require 'example.org' is not"),
        ("--vpn magic", "'magic' is not one of"),
        ("--option constraint=knl --batch slurm", "is not one option of the form"),
        ("--template /no/such/file", "template /no/such/file cannot be read"),
        ("--partition x", "partition means nothing to --batch local"),
        ("--account 'a\nb' --batch slurm", "account holds a newline"),
        ("--environment-setup 'if true'", "is not valid shell"),
        ("--name ../x", "queue name '../x' cannot be used"),
    ],
)
def test_bad_input_is_one_line(hpcq, queue, arguments, words):
    status, output, error = hpcq(f"submit-pilots {arguments}")
    assert (status, output) == (2, "")
    assert words in error
    assert error.count("\n") == 1
    assert not load_jobs("ana")


def test_an_undefined_variable_in_the_users_template(hpcq, queue, tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text("#!/bin/bash\n#SBATCH --partition={{ queue_name }}\nexec {{ pilot_argv }}\n")
    status, _, error = hpcq(f"submit-pilots --batch slurm --template {template}")
    assert status == 2
    assert error == f"hpcq: template {template}, line 2: 'queue_name' is undefined\n"


def test_ids_that_are_not_of_this_queue(hpcq, queue):
    status, _, error = hpcq("cancel-pilots 17 4")
    assert status == 2
    assert error == "hpcq: no pilot of this queue is 17, 4; see `hpcq pilots --all`\n"


def test_a_queue_can_be_made_for_later(hpcq, state):
    status, output, _ = hpcq("submit-pilots --name later --create --environment-setup 'exit 0'")
    assert status == 0
    assert "for queue later to local" in output
    assert state_dir.connection_file("later").exists()
    get_batch_system("local").cancel(load_jobs("later"))


def test_no_queue_is_made_for_what_cannot_be_submitted(hpcq, state):
    assert hpcq("submit-pilots --name later --create --template /no/such/file")[0] == 2
    assert not (state / "later").exists()


def test_local_from_submission_to_cancellation(hpcq, queue, tmp_path):
    template = tmp_path / "t"
    template.write_text("#!/bin/sh\n: {{ pilot_argv }}\nexec sleep 600\n")
    assert hpcq(f"submit-pilots -n 2 --template {template}")[0] == 0
    assert hpcq("pilots")[1].count("running") == 2
    first, second = load_jobs("ana")
    assert hpcq(f"cancel-pilots {first.id}")[1] == f"gone: {first.id}\n"
    assert hpcq("cancel-pilots --all")[1] == f"gone: {second.id}\n"
    assert hpcq("pilots")[1].count("cancelled") == 2


def test_an_empty_queue(hpcq, queue):
    assert hpcq("pilots")[:2] == (0, "queue ana has no pilots\n")
    assert json.loads(hpcq("pilots --json")[1]) == []


def test_pbs_from_submission_to_cancellation(hpcq, queue, fake_pbs, manager):
    fake_pbs.set(slots=1, banner=True)
    assert hpcq("submit-pilots --batch pbs -n 3 --cores 2 --queue short")[1].startswith(
        "submitted 3 pilots for queue ana to pbs: 0[0].pbs1 to 0[2].pbs1\n"
    )
    manager["pilots"] = [{"job_id": "0[0].pbs1", "state": "ready", "hostname": "n1", "cores": 2, "cores_busy": 1}]
    output = hpcq("pilots")[1]
    assert re.search(r"0\[0\]\.pbs1 +ready +Job run at .* n1 +1/2", output)
    assert re.search(r"0\[2\]\.pbs1 +pending +Not Running: Not enough free nodes available", output)
    shown = hpcq("pilots show '0[0]'")[1]
    assert shown.startswith("job 0[0].pbs1 of pbs, submitted ")
    assert "  | #PBS -l select=1:ncpus=2\n" in shown
    assert "it printed nothing yet to " in shown
    assert hpcq("pilots show 0")[2] == "hpcq: 0 is 3 jobs, 0[0].pbs1 to 0[2].pbs1; say which\n"
    assert hpcq("cancel-pilots '0[2]'")[1] == "gone: 0[2].pbs1\n"
    status, _, error = hpcq("cancel-pilots 0 --timeout 0")
    assert status == 3
    assert error.endswith("0[0].pbs1 (r)\n")  # it is killed, and takes its time
    fake_pbs.later(10)
    assert hpcq("cancel-pilots --all")[:2] == (0, "gone: 0[0].pbs1\n")
    assert fake_pbs.calls("qdel")[:2] == [["qdel", "0[2].pbs1"], ["qdel", "0[0-1].pbs1"]]


def test_the_story_of_a_failed_start_on_pbs(hpcq, queue, fake_pbs, manager):
    manager["pilots"] = []
    fake_pbs.set(runs=5, exit=127)
    hpcq("submit-pilots --batch pbs")
    [job] = load_jobs("ana")
    job.messages.write_text("-sh: 1: /var/spool/pbs/mom_priv/jobs/0.pbs1.SC: not found\n")
    hpcq("pilots")
    fake_pbs.later(5)
    status, output, _ = hpcq("pilots show 0 --lines 3")
    assert status == 0
    assert "  exit       127\n" in output
    assert "its pilot never reported" in output
    assert "  | -sh: 1: /var/spool/pbs/mom_priv/jobs/0.pbs1.SC: not found\n" in output
    assert json.loads(hpcq("pilots show 0 --json")[1])["pilots"][0]["failed_start"]
