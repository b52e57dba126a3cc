"""``local``: pilots as processes of this host, for a laptop, a single big node, or a first try.

``local_supervisor`` starts them detached, so they outlive the command line, and records their processes and
how they ended. A job is known by its pid together with that process's start time and the host's boot id, so a
recycled pid is never taken for it. Only the host that runs a job can see or cancel it, although its files may
be on a shared disk.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from hpcq.batch import records
from hpcq.batch.base import BatchJob, BatchSystem, JobState, JobStatus, PilotRequest, RenderedJob, shared_values
from hpcq.batch.command import refusal
from hpcq.batch.local_supervisor import boot_id, start_time, stat_fields
from hpcq.batch.templates import check_shell_syntax, render_template
from hpcq.errors import BatchError, TemplateError, UsageError
from hpcq.state_dir import write_private
from hpcq.units import format_duration

KILL_DELAY = 30.0
"""Seconds between SIGTERM and SIGKILL: Slurm's default KillWait, so that a pilot has the same time
everywhere.
"""
MAX_COUNT = 1000
"""Pilots of one submission: whoever asks for more has forgotten ``--batch``."""
KILL_TIME_LIMIT = 10.0
"""Seconds within which SIGKILL must have worked."""

_SUPERVISOR = Path(__file__).with_name("local_supervisor.py")


class _Process(msgspec.Struct, frozen=True):
    """``process-K.json`` as the supervisor writes it."""

    pid: int
    start_time: int | None
    supervisor_pid: int
    supervisor_start_time: int | None
    host: str
    boot_id: str


class _Exit(msgspec.Struct, frozen=True):
    exit_code: int


class LocalBatch(BatchSystem):
    """Pilots on this host. Walltime and memory are kept by the pilot itself; nothing enforces them here."""

    name = "local"
    min_gap = 0.2  # nobody else is asked
    cancel_waits = True
    kill_delay: float = KILL_DELAY

    def render(self, request: PilotRequest, directory: Path | None = None) -> RenderedJob:
        """See ``BatchSystem.render``; options that only a batch system understands are refused."""
        for name in ("partition", "account", "qos", "constraint", "reservation", "exclusive", "mail", "options"):
            if getattr(request, name):
                raise UsageError(f"{name} means nothing to --batch local: there is no scheduler; leave it out")
        if request.nodes > 1:
            raise UsageError("nodes means nothing to --batch local: there is this host only; leave it out")
        if request.count > MAX_COUNT:
            raise UsageError(f"count {request.count} is more processes than hpcq starts on one host ({MAX_COUNT})")
        directory = directory or records.new_directory(request.queue)
        origin = f"template {request.template or 'local.sh.j2'}"
        script = render_template("local.sh.j2", request.template, template_values(request))
        if not script.startswith("#!/"):
            raise TemplateError(f"{origin}: the script must begin with #! and a path, such as #!/bin/bash")
        check_shell_syntax(script, origin, self.runner)
        command = (
            sys.executable,
            "-I",
            str(_SUPERVISOR),
            str(directory),
            str(request.count),
            _job_id(directory),
        )
        return RenderedJob(script, command)

    def _launch(self, request: PilotRequest, rendered: RenderedJob, directory: Path) -> list[BatchJob]:
        result = self.runner.run(rendered.command, keep_locale=True)
        script = records.script_path(directory)
        if result.status != 0:
            raise refusal(result, f"script {script}")
        indexes: list[int | None] = [None] if request.count == 1 else list(range(request.count))
        return [
            BatchJob(
                id=_job_id(directory) if index is None else f"{_job_id(directory)}_{index}",
                batch=self.name,
                queue=request.queue,
                directory=directory,
                script=script,
                output=records.output_path(directory, index),
                submitted_at=time.time(),
            )
            for index in indexes
        ]

    def status(self, jobs: Sequence[BatchJob]) -> dict[str, JobStatus]:
        """See ``BatchSystem.status``; reads records and ``/proc`` only."""
        return {job.id: _status(job) for job in jobs}

    def cancel(self, jobs: Sequence[BatchJob]) -> None:
        """See ``BatchSystem.cancel``. SIGTERM to each job's process group, SIGKILL after ``kill_delay``.

        Returns when all have ended.

        Raises:
            BatchError: a job of another host, or one that even SIGKILL did not end in time.
        """
        with contextlib.ExitStack() as stack:
            running = {}
            for job in jobs:
                process = _running_process(job)
                if process is not None:
                    running[job.id] = (process, stack.enter_context(_exit_descriptor(process)))
                    with contextlib.suppress(OSError):  # a full disk: it is cancelled, and called killed
                        write_private(_cancel_path(job), b"{}")
            _signal_groups([process for process, _ in running.values()], signal.SIGTERM, signal.SIGCONT)
            _wait_for_ends(running, self.kill_delay)
            _signal_groups([process for process, _ in running.values()], signal.SIGKILL)
            _wait_for_ends(running, KILL_TIME_LIMIT)
            if running:
                raise BatchError(f"SIGKILL did not end {', '.join(running)} on {socket.gethostname()}")
        _wait_for_records(jobs)


def template_values(request: PilotRequest) -> dict[str, object]:
    """Return the variables of ``local.sh.j2``; None where an option was not given."""
    walltime = request.walltime_s
    return {**shared_values(request), "walltime": None if walltime is None else format_duration(walltime)}


def _job_id(directory: Path) -> str:
    return f"local-{directory.name.rpartition('-')[2]}"


def _index(job: BatchJob) -> int:
    return int(job.id.partition("_")[2] or 0)


def _cancel_path(job: BatchJob) -> Path:
    return job.directory / f"cancel-{_index(job)}.json"


def _process(job: BatchJob) -> _Process | None:
    try:
        data = (job.directory / f"process-{_index(job)}.json").read_bytes()
        return msgspec.json.decode(data, type=_Process)
    except (OSError, msgspec.MsgspecError):
        return None


def _exit(job: BatchJob) -> _Exit | None:
    try:
        return msgspec.json.decode((job.directory / f"exit-{_index(job)}.json").read_bytes(), type=_Exit)
    except (OSError, msgspec.MsgspecError):
        return None


def _status(job: BatchJob) -> JobStatus:
    process, ended = _process(job), _exit(job)
    host = process.host if process else ""
    if ended is not None:
        return _ended_status(job, host, ended.exit_code)
    if process is None:
        return JobStatus(job.id, JobState.UNKNOWN, "there is no record of its process")
    if process.host != socket.gethostname():
        reason = f"only {process.host} can tell"
        return JobStatus(job.id, JobState.UNKNOWN, reason, host, raw_state="ELSEWHERE")
    if process.boot_id != boot_id():
        return JobStatus(job.id, JobState.NODE_FAIL, "the host was restarted", host, raw_state="REBOOTED")
    return _live_status(job, process)


def _ended_status(job: BatchJob, host: str, code: int) -> JobStatus:
    if _cancel_path(job).exists():
        return JobStatus(job.id, JobState.CANCELLED, "", host, code, "CANCELLED")
    if code == 0:
        return JobStatus(job.id, JobState.DONE, "", host, code, "EXITED")
    reason = f"killed by {_signal_name(-code)}" if code < 0 else f"exit status {code}"
    return JobStatus(job.id, JobState.FAILED, reason, host, code, "EXITED")


def _live_status(job: BatchJob, process: _Process) -> JobStatus:
    """The state of a job of this boot and host whose end is not recorded (yet)."""
    state = _process_state(process.pid, process.start_time)
    if state == "T":
        return JobStatus(job.id, JobState.SUSPENDED, "stopped by a signal", process.host, raw_state="STOPPED")
    if state is not None:
        return JobStatus(job.id, JobState.RUNNING, "", process.host, raw_state="RUNNING")
    if _process_state(process.supervisor_pid, process.supervisor_start_time) is not None:
        return JobStatus(job.id, JobState.COMPLETING, "", process.host, raw_state="ENDING")
    ended = _exit(job)  # written between our first look and the supervisor's end
    if ended is not None:
        return _ended_status(job, process.host, ended.exit_code)
    reason = "it ended unseen: its supervisor had been killed"
    return JobStatus(job.id, JobState.FAILED, reason, process.host, raw_state="VANISHED")


def _process_state(pid: int, started: int | None) -> str | None:
    """Return the state letter of exactly that process, or None when it has ended (a zombie has)."""
    fields = stat_fields(pid)
    if fields is None or int(fields[19]) != started or fields[0] in ("Z", "X"):
        return None
    return fields[0].upper()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _running_process(job: BatchJob) -> _Process | None:
    """Return the process of a job that is to be cancelled, None when it has ended."""
    process = _process(job)
    if process is None or _exit(job) is not None:
        return None
    if process.host != socket.gethostname():
        raise BatchError(f"{job.id} runs on {process.host}; cancel it there (this is {socket.gethostname()})")
    return process if process.boot_id == boot_id() and _has_started(process) else None


def _has_started(process: _Process) -> bool:
    return _process_state(process.pid, process.start_time) is not None


@contextlib.contextmanager
def _exit_descriptor(process: _Process) -> Iterator[int | None]:
    """Give a descriptor that becomes readable when the process ends; None on kernels before 5.3, or if it
    has.
    """
    try:
        descriptor = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        yield None
        return
    try:
        # The descriptor is of whatever has the pid now; the start time says whether that is still the job.
        yield descriptor if start_time(process.pid) == process.start_time else None
    finally:
        os.close(descriptor)


def _signal_groups(processes: Sequence[_Process], *signals: signal.Signals) -> None:
    """Send signals to whole jobs: each is a session whose first process leads its process group."""
    for process in processes:
        for number in signals:
            if _has_started(process):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)


_Running = dict[str, tuple[_Process, int | None]]
_LOOK_INTERVAL = 0.2
_RECORD_INTERVAL = 0.01


def _wait_for_ends(running: _Running, time_limit: float) -> None:
    """Wait until the processes have ended or the time is up; remove the ended ones from ``running``."""
    deadline = time.monotonic() + time_limit
    while True:
        for job_id, (process, _) in list(running.items()):
            if not _has_started(process):
                del running[job_id]
        left = deadline - time.monotonic()
        if not running or left <= 0:
            return
        descriptors = [descriptor for _, descriptor in running.values() if descriptor is not None]
        # Where a process has no descriptor (old kernels) there is no event to wait for: look again shortly.
        complete = len(descriptors) == len(running)
        _poll(descriptors, left if complete else min(left, _LOOK_INTERVAL))


def _wait_for_records(jobs: Sequence[BatchJob]) -> None:
    """Wait until how the jobs ended is on record, or their supervisor is gone: nothing is written for them after that.

    There is no event to wait for: the supervisor is nobody's child.
    """
    deadline = time.monotonic() + KILL_TIME_LIMIT
    while any(_status(job).state is JobState.COMPLETING for job in jobs) and time.monotonic() < deadline:
        time.sleep(_RECORD_INTERVAL)


def _poll(descriptors: Sequence[int], time_limit: float) -> None:
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, select.POLLIN)
    poller.poll(max(0.0, time_limit) * 1000)
