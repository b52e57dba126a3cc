"""A queue that submits its own pilots: local ones come for waiting tasks and leave when there are none."""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from hpcq import PythonTask, Queue, Task, autoscale, scaling
from hpcq.batch.base import load_jobs
from hpcq.batch.local import LocalBatch
from hpcq.cli.main import run
from hpcq.errors import UsageError

DEADLINE = 90.0


def until(condition, what):
    """Pilots and batch jobs tell nobody when they change: look until it is so."""
    end = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.1)
    return value


@pytest.fixture
def hpcq(capsys):
    def typed(line: str) -> tuple[int, str, str]:
        status = run(shlex.split(line))
        output = capsys.readouterr()
        return status, output.out, output.err

    return typed


def test_pilots_come_for_work_and_leave_without(hpcq):
    with Queue("ana") as queue:
        queue.autoscale("local", max=2, idle_timeout=0.5, cores=2)
        assert load_jobs("ana") == []
        for number in range(8):
            queue.submit(PythonTask(pow, 2, number))
        assert sorted(queue.wait(DEADLINE).output for _ in range(8)) == [2**number for number in range(8)]
        assert 1 <= len(load_jobs("ana")) <= 2
        until(lambda: all(pilot.state == "gone" for pilot in queue.pilots()), "idle pilots have left")
        assert {pilot.message for pilot in queue.pilots()} == {"autoscaling: it had nothing to do"}
        queue.submit(PythonTask(pow, 2, 10))
        assert queue.wait(DEADLINE).output == 1024
        assert "limits  0 to 2 pilots" in hpcq("autoscale --name ana")[1]


def test_tasks_that_no_such_pilot_could_run_bring_none():
    with Queue("ana") as queue:
        queue.autoscale("local", max=2, cores=2)
        queue.submit(Task("true", cores=3))
        queue.submit(Task("true"))
        assert queue.wait(DEADLINE).outcome == "success"
        assert len(load_jobs("ana")) == 1


def test_a_feature_that_pilots_turn_out_to_lack_brings_no_more_of_them(hpcq):
    with Queue("ana") as queue:
        queue.autoscale("local", max=9, idle_timeout=0.5)
        queue.submit(Task("true", features={"host=elsewhere"}))
        until(lambda: queue.pilots() and all(pilot.state == "gone" for pilot in queue.pilots()), "one came and left")
        told = json.loads(hpcq("autoscale --name ana --json")[1])
        assert (told["needed"], told["coming"], len(load_jobs("ana"))) == (0, 0, 1)


def test_limits_change_while_it_runs(hpcq):
    with Queue("ana") as queue:
        status, output, _ = hpcq("submit-pilots --name ana --autoscale -n 1 --cores 1")
        assert (status, output.splitlines()[0]) == (0, "state   on (local)")
        assert hpcq("autoscale set --name ana --min 2 --max 3")[0] == 0
        assert len(queue.wait_for_pilots(2, DEADLINE)) == 2
        told = json.loads(hpcq("autoscale --name ana --json")[1])
        assert (told["limits"]["min"], told["limits"]["max"], told["limits"]["step"]) == (2, 3, 5)
        assert hpcq("autoscale set --name ana --max 1")[::2] == (2, "hpcq: min 2 is more than max 1\n")
        hpcq("autoscale set --name ana --min 0 --max 1")
        until(lambda: sum(pilot.state == "ready" for pilot in queue.pilots()) == 1, "one has left")
        hpcq("autoscale stop --name ana")
        assert hpcq("autoscale --name ana")[1] == "autoscaling is not in use\n"
        assert "begin with" in hpcq("autoscale set --name ana --max 1")[2]


def test_pilots_that_never_report_pause_it(hpcq, tmp_path, caplog):
    template = tmp_path / "broken.sh.j2"
    template.write_text("#!/bin/bash\n: {{ pilot_argv }}\necho the node is on fire\nexit 7\n")
    with Queue("ana") as queue:
        queue.autoscale("local", min=3, max=9, template=template)
        until(lambda: "paused" in hpcq("autoscale --name ana")[1], "it is paused")
        assert "3 pilots in a row never came to serve" in hpcq("autoscale --name ana")[1]
        assert 3 <= len(load_jobs("ana")) <= 5  # two may come in the place of two that failed before the third
        assert queue.why_deserted().startswith("autoscaling is paused: 3 pilots")
        number = queue.submit(Task("true"))
        assert "autoscaling is paused" in queue.explain(number)
        until(lambda: any("is paused (see" in record.message for record in caplog.records), "it is logged")


@pytest.fixture
def hasty(monkeypatch):
    """Half an hour of waiting between refused submissions, in a moment."""
    monkeypatch.setattr(scaling, "LOOK", 0.05)
    monkeypatch.setattr(autoscale, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(autoscale, "LONGEST_WAIT", 0.1)


@pytest.mark.usefixtures("hasty")
def test_a_batch_system_that_refuses_pauses_it(hpcq, fake_slurm):
    words = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n"
    fake_slurm.behave({"sbatch": {"status": 1, "stderr": words}})
    with Queue("ana") as queue:
        queue.autoscale("slurm", max=9, account="nobody")
        number = queue.submit(Task("true"))
        until(lambda: "paused" in hpcq("autoscale --name ana")[1], "it is paused")
        assert len(fake_slurm.calls("sbatch")) == 10
        told = hpcq("autoscale --name ana")[1]
        assert "paused: 10 submissions in a row were refused; the last: sbatch refused: " in told
        assert "Invalid account or account/partition combination specified" in told
        assert "`hpcq autoscale set` resumes it" in told
        assert "10 submissions in a row were refused" in queue.explain(number)
        assert "10 submissions in a row were refused" in hpcq("status --name ana")[1]
        fake_slurm.behave({})
        hpcq("autoscale set --name ana --max 3")
        until(lambda: len(load_jobs("ana")) == 1, "it goes on")
        assert len(fake_slurm.calls("sbatch")) == 11


@pytest.mark.usefixtures("hasty")
def test_slurm_jobs_whose_pilots_never_report_pause_it(hpcq, fake_slurm):
    with Queue("ana") as queue:
        queue.autoscale("slurm", min=3, max=9)
        jobs = until(lambda: load_jobs("ana"), "it has submitted")
        fake_slurm.set_jobs({job.id: "FAILED|n1|NonZeroExitCode" for job in jobs})
        until(lambda: "paused" in hpcq("autoscale --name ana")[1], "it is paused")
        told = hpcq("autoscale --name ana")[1]
        assert "3 pilots in a row never came to serve; the last: job 4711_" in told
        assert "ended (FAILED, NonZeroExitCode) and its pilot never reported; script /" in told
        assert len(fake_slurm.calls("sbatch")) == 1


def test_mistakes_are_told_at_once(hpcq, tmp_path):
    with Queue("ana") as queue:
        with pytest.raises(UsageError, match="max must be"):
            queue.autoscale("local", max=-1)
        with pytest.raises(UsageError, match="unknown pilot option 'corse'"):
            queue.autoscale("local", corse=2)
        with pytest.raises(UsageError, match="unknown batch system"):
            queue.autoscale("lsf")
        assert hpcq("submit-pilots --name ana --max 3")[::2] == (
            2,
            "hpcq: --max means something with --autoscale only\n",
        )
        assert hpcq(f"submit-pilots --name ana --autoscale --template {tmp_path}/none")[0] == 2
        assert hpcq("submit-pilots --name ana --autoscale --idle-timeout soon")[0] == 2


def test_a_live_view_on_a_terminal_ends_with_ctrl_c(tmp_path):
    """On a real terminal: rows of pilots, redrawn; Ctrl-C is how one leaves it."""
    with Queue("ana") as queue:
        queue.submit_pilots(1, batch="local")
        queue.wait_for_pilots(1, DEADLINE)
        own, its = os.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
        command = [sys.executable, "-m", "hpcq", "status", "--name", "ana", "--watch"]
        with subprocess.Popen(command, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm"}) as view:
            os.close(its)
            shown = b""
            while shown.count(b"1 ready") < 2 or b"CORES" not in shown:
                shown += os.read(own, 65536)
            view.send_signal(signal.SIGINT)
            with contextlib.suppress(OSError):
                while os.read(own, 65536):
                    pass
        os.close(own)
        assert view.returncode == 0


def test_what_was_not_foreseen_is_a_refusal_and_ends_nothing(hpcq, monkeypatch, caplog):
    """Such as no memory, or a fault of our own: it must not be tried again and again, nor end the looking."""
    looks = []
    picture = scaling.Scaling._picture

    def fail_once(self, now):
        looks.append(now)
        if len(looks) == 1:
            raise MemoryError
        return picture(self, now)

    def fail(_self, _request):
        raise MemoryError("no room")

    monkeypatch.setattr(scaling, "LOOK", 0.05)
    monkeypatch.setattr(autoscale, "REFUSALS", 1)
    monkeypatch.setattr(scaling.Scaling, "_picture", fail_once)
    monkeypatch.setattr(LocalBatch, "submit", fail)
    with Queue("ana") as queue:
        queue.autoscale("local", min=1)
        until(lambda: "paused" in hpcq("autoscale --name ana")[1], "it is paused")
        assert "1 submissions in a row were refused; the last: no room" in hpcq("autoscale --name ana")[1]
    assert "a look failed" in caplog.text
    assert "a submission failed" in caplog.text
