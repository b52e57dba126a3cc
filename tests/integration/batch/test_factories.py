"""`hpcq.work_queue.Factory` through Slurm and PBS, as their commands see it."""

import time

import pytest

import hpcq
import hpcq.work_queue as wq
from hpcq.batch.base import JobState, get_batch_system, load_jobs

DEADLINE = 90


def eventually(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def queue(state):
    with wq.WorkQueue(port=0, name="fits") as queue:
        for _ in range(3):
            queue.submit(wq.Task("true"))
        yield queue


def ids():
    return [job.id for job in load_jobs("fits")]


def test_slurm(fake_slurm, queue, caplog):
    factory = wq.Factory("slurm", manager=queue)
    factory.max_workers, factory.cores, factory.memory = 2, 4, 2000
    factory.batch_options = "--partition=short --account='a b'"
    with factory:
        (call,) = fake_slurm.calls("sbatch")  # for three tasks no more than two workers, as one array
        assert "--array=0-1" in call["argv"]
        script = fake_slurm.submitted()
        assert {"#SBATCH --cpus-per-task=4", "#SBATCH --partition=short"} <= set(script.splitlines())
        assert "--account=a b" in script.replace('"', "").replace("'", "")
        assert ids() == ["4711_0", "4711_1"]
        fake_slurm.set_jobs({"4711_0": "RUNNING|n1|None", "4711_1": "FAILED|n2|NonZeroExitCode"})
        fake_slurm.behave({"sbatch": {"stdout": "4712"}})
        factory.start()  # asks it to look again
        eventually(lambda: "4712" in ids(), "another worker for the one that failed")
        fake_slurm.behave({"sbatch": {"status": 1, "stderr": "QOSMaxSubmitJobPerUserLimit"}})
        factory.max_workers = 3
        eventually(lambda: "QOSMaxSubmitJobPerUserLimit" in caplog.text, "the refusal is told")
    cancelled = {number for call in fake_slurm.calls("scancel") for number in call["argv"][1:]}
    assert cancelled >= {"4711_0", "4712"}
    assert "4711_1" not in cancelled


def test_pbs(fake_pbs, queue):
    fake_pbs.set(down=True)
    factory = wq.Factory("pbs", manager_name="fits")
    factory.min_workers = factory.max_workers = 2
    with pytest.raises(hpcq.BatchError):
        factory.start()
    fake_pbs.set(down=False, slots=1, runs=5, exit=1)
    with factory:
        assert ids() == ["0[0].pbs1", "0[1].pbs1"]
        assert get_batch_system("pbs").status(load_jobs("fits"))["0[0].pbs1"].state is JobState.RUNNING
        fake_pbs.later(6)
        factory.start()  # asks it to look again
        eventually(lambda: len(ids()) == 3, "another worker for the one that ended")
        assert ids()[2] == "1.pbs1"
    ended = {number for call in fake_pbs.calls("qdel") for number in call[1:]}
    assert ended == {"0[1].pbs1", "1.pbs1"}
