"""``local`` with real processes: they outlive their submitter, end as they are told, and are never mistaken."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpcq.batch.base import JobState, PilotRequest, get_batch_system, load_jobs, output_tail
from hpcq.batch.local import LocalBatch
from hpcq.batch.local_supervisor import start_time
from hpcq.errors import BatchError, TemplateError, UsageError


def request(*argv: str, **values) -> PilotRequest:
    return PilotRequest(queue="q", pilot_argv=argv, **values)


def sh(script: str, **values) -> PilotRequest:
    return request("/bin/sh", "-c", script, **values)


def await_status(job, wanted: JobState):
    """Look until the job is in the wanted state; the test's time limit is the deadline."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        status = LocalBatch().status([job])[job.id]
        if status.state is wanted:
            return status
        select.select([], [], [], 0.02)
    raise AssertionError(f"still {status}")


def await_output(job, line: str) -> None:
    deadline = time.monotonic() + 90
    while line not in output_tail(job):
        assert time.monotonic() < deadline, output_tail(job)
        select.select([], [], [], 0.02)


def record(job, kind: str = "process") -> dict:
    index = job.id.partition("_")[2] or "0"
    return json.loads((job.directory / f"{kind}-{index}.json").read_text())


def await_empty_group(group: int) -> None:
    """Look until a process group is no more (members that were killed still have to be reaped)."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        select.select([], [], [], 0.02)
    raise AssertionError(f"group {group} still has members")


@pytest.fixture(autouse=True)
def leave_nothing():
    yield
    local = LocalBatch()
    local.kill_delay = 0.0
    local.cancel([job for job in load_jobs("q") if (job.directory / "process-0.json").exists()])


def test_output_environment_and_end():
    [job] = LocalBatch().submit(
        sh('echo "$HPCQ_JOB_ID $X"; echo err >&2', environment={"X": "a  b"}, setup=("echo setup",))
    )
    status = await_status(job, JobState.DONE)
    assert status.exit_code == 0
    assert output_tail(job) == ["setup", f"{job.id} a  b", "err"]
    assert job.output.stat().st_mode & 0o077 == 0
    assert load_jobs("q") == [job]


def test_each_of_several_has_its_own_output():
    jobs = LocalBatch().submit(sh("echo $HPCQ_JOB_ID", count=3))
    for job in jobs:
        await_status(job, JobState.DONE)
        assert output_tail(job) == [job.id]


def test_exit_status_and_signal():
    [job] = LocalBatch().submit(sh("exit 3"))
    assert await_status(job, JobState.FAILED).reason == "exit status 3"
    [job] = LocalBatch().submit(sh("kill -SEGV $$"))
    status = await_status(job, JobState.FAILED)
    assert (status.exit_code, status.reason) == (-11, "killed by SIGSEGV")


def test_a_program_that_is_not_there_says_so_in_the_output():
    [job] = LocalBatch().submit(request("/no/such/python"))
    assert await_status(job, JobState.FAILED).exit_code == 127
    assert "/no/such/python" in output_tail(job)[-1]


def test_an_interpreter_that_is_not_there(tmp_path):
    template = tmp_path / "t"
    template.write_text("#!/no/such/shell\n{{ pilot_argv }}\n")
    [job] = LocalBatch().submit(sh("true", template=template))
    assert await_status(job, JobState.FAILED).exit_code == 127
    assert output_tail(job) == ["hpcq: /no/such/shell cannot be started: No such file or directory"]
    template.write_text("{{ pilot_argv }}\n")
    with pytest.raises(TemplateError, match="must begin with #!"):
        LocalBatch().submit(sh("true", template=template))


def test_jobs_outlive_the_program_that_submitted_them():
    code = (
        "from hpcq.batch.base import *\n"
        "r = PilotRequest(queue='q', pilot_argv=('/bin/sh', '-c', 'read x < /dev/null; echo up; exec sleep 600'))\n"
        "print(get_batch_system('local').submit(r)[0].id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=90)
    [job] = load_jobs("q")
    assert done.stdout.strip() == job.id
    await_output(job, "up")
    assert get_batch_system("local").status([job])[job.id].state is JobState.RUNNING
    get_batch_system("local").cancel([job])
    await_status(job, JobState.CANCELLED)


def test_cancel_lets_the_pilot_finish():
    [job] = LocalBatch().submit(sh("trap 'echo drained; exit 0' TERM; echo up; while :; do sleep 600 & wait $!; done"))
    await_output(job, "up")
    LocalBatch().cancel([job])
    assert await_status(job, JobState.CANCELLED).exit_code == 0
    assert "drained" in output_tail(job)
    LocalBatch().cancel([job])


def test_cancel_kills_what_does_not_listen_and_its_children():
    [job] = LocalBatch().submit(sh("trap '' TERM; echo up; sleep 600; sleep 600"))
    await_output(job, "up")
    local = LocalBatch()
    local.kill_delay = 0.3
    local.cancel([job])
    assert await_status(job, JobState.CANCELLED).exit_code == -signal.SIGKILL
    await_empty_group(record(job)["pid"])


def test_what_a_job_leaves_in_its_group_is_ended_with_it():
    [job] = LocalBatch().submit(sh("sleep 600 & exit 5"))
    await_status(job, JobState.FAILED)
    await_empty_group(record(job)["pid"])


def test_a_stopped_job_is_suspended_and_can_be_cancelled():
    [job] = LocalBatch().submit(sh("echo up; exec sleep 600"))
    await_output(job, "up")
    os.kill(record(job)["pid"], signal.SIGSTOP)
    await_status(job, JobState.SUSPENDED)
    LocalBatch().cancel([job])
    await_status(job, JobState.CANCELLED)


def edit(job, **changes) -> None:
    path = job.directory / "process-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_recycled_pid_is_not_the_job(tmp_path):
    [job] = LocalBatch().submit(sh("exit 0"))
    await_status(job, JobState.DONE)
    (job.directory / "exit-0.json").unlink()
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        edit(job, pid=bystander.pid, supervisor_pid=bystander.pid)
        status = LocalBatch().status([job])[job.id]
        assert (status.state, status.raw_state) == (JobState.FAILED, "VANISHED")
        LocalBatch().cancel([job])
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_killed_supervisor_loses_the_exit_status_and_nothing_else():
    [job] = LocalBatch().submit(sh("echo up; exec sleep 600"))
    await_output(job, "up")
    os.kill(record(job)["supervisor_pid"], signal.SIGTERM)  # not this one: it waits for its jobs
    os.kill(record(job)["supervisor_pid"], signal.SIGKILL)
    assert LocalBatch().status([job])[job.id].state is JobState.RUNNING
    LocalBatch().cancel([job])
    status = await_status(job, JobState.FAILED)
    assert "ended unseen" in status.reason


def test_other_hosts_and_other_boots():
    [job] = LocalBatch().submit(sh("exec sleep 600"))
    original = record(job)
    try:
        edit(job, boot_id="another")
        assert LocalBatch().status([job])[job.id].state is JobState.NODE_FAIL
        LocalBatch().cancel([job])
        edit(job, host="elsewhere")
        status = LocalBatch().status([job])[job.id]
        assert (status.state, status.hosts, status.is_listed) == (JobState.UNKNOWN, "elsewhere", True)
        with pytest.raises(BatchError, match="runs on elsewhere; cancel it there"):
            LocalBatch().cancel([job])
        assert start_time(original["pid"]) == original["start_time"]
    finally:
        edit(job, **original)


def test_no_record_is_unknown(tmp_path):
    [job] = LocalBatch().submit(sh("exit 0"))
    await_status(job, JobState.DONE)
    status = LocalBatch().status([replace(job, directory=tmp_path)])[job.id]
    assert (status.state, status.is_listed) == (JobState.UNKNOWN, False)


def test_without_exit_descriptors_it_still_works(monkeypatch):
    """As on kernels before 5.3."""
    monkeypatch.delattr(os, "pidfd_open")
    [job] = LocalBatch().submit(sh("echo up; exec sleep 600"))
    await_output(job, "up")
    LocalBatch().cancel([job])
    await_status(job, JobState.CANCELLED)


@pytest.mark.parametrize("value", ["a b; rm -rf /", "$(x)", "`x`", "é'\"\\", "", "-n", "*" * 5000])
def test_hostile_arguments_arrive_as_they_are(value):
    code = "import sys; print(ascii(sys.argv[1]))"
    [job] = LocalBatch().submit(request(sys.executable, "-I", "-c", code, value))
    await_status(job, JobState.DONE)
    assert output_tail(job) == [ascii(value)]


@pytest.mark.parametrize("name", ["partition", "account", "qos", "constraint"])
def test_options_of_a_scheduler_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} means nothing to --batch local"):
        LocalBatch().submit(sh("true", **{name: "x"}))


def test_a_pilot_does_not_inherit_ignored_signals_or_descriptors():
    code = (
        "import os, signal\n"
        "print(all(signal.getsignal(s) is signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGHUP)))\n"
        "print(os.getsid(0) == os.getpid())\n"
        "with os.scandir('/proc/self/fd') as them:\n"
        "    print([n for n in sorted(int(e.name) for e in them) if n > 3 and os.path.exists(f'/proc/self/fd/{n}')])\n"
    )
    with Path(os.devnull).open() as file:
        os.set_inheritable(file.fileno(), True)
        [job] = LocalBatch().submit(request(sys.executable, "-I", "-c", f"exec({code!r})"))
    await_status(job, JobState.DONE)
    assert output_tail(job) == ["True", "True", "[]"]


def test_when_one_cannot_be_started_none_is_left(tmp_path):
    (tmp_path / "script.sh").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "process-2.json" / "in the way").mkdir(parents=True)
    supervisor = Path(sys.modules[start_time.__module__].__file__)
    argv = [sys.executable, "-I", str(supervisor), str(tmp_path), "4", "local-x"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "the jobs could not be started: IsADirectoryError" in done.stderr
    for index in range(2):
        await_empty_group(json.loads((tmp_path / f"process-{index}.json").read_text())["pid"])


def test_one_that_has_no_group_of_its_own_yet_is_not_left_either(tmp_path):
    (tmp_path / "process-1.json" / "in the way").mkdir(parents=True)
    supervisor = sys.modules[start_time.__module__].__file__
    program = (
        "import importlib.util as u, sys, time\n"
        f"spec = u.spec_from_file_location('supervisor', {supervisor!r}); one = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(one)\n"
        "one._become_job = lambda _directory, index, *_: index or time.sleep(1000)\n"
        "sys.exit(one.main(sys.argv[1:]))\n"
    )
    argv = [sys.executable, "-c", program, str(tmp_path), "2", "local-x"]
    assert subprocess.run(argv, capture_output=True, timeout=90, check=False).returncode == 1
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(json.loads((tmp_path / "process-0.json").read_text())["pid"])
        assert select.select([descriptor], [], [], 90)[0], "it lives on"
        os.close(descriptor)


def test_a_pilot_has_the_users_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    [job] = LocalBatch().submit(sh("echo locale $LC_ALL"))
    await_output(job, "locale C.UTF-8")
