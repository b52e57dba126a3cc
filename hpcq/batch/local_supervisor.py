"""The parent of pilots that run on this host: starts them, outlives the command line, records how they ended.

Run as a file (``python -I local_supervisor.py DIRECTORY COUNT ID``), so it imports nothing but the standard
library and starts fast. It detaches itself, and the command returns once every job's process is recorded. For
job K it writes, each file whole or not at all:

| file | what |
|---|---|
| ``process-K.json`` | pid and start time of the job's process and of this one, host, boot id |
| ``exit-K.json`` | the exit status, -N for signal N |

A job's process waits for a byte from here before it becomes the script, and ends without it. So whenever this
is killed, there is no running job without a record; one that is running goes on, only its exit status is
lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

_GO = b"\x01"
_OWNER_ONLY = 0o600


def start_time(pid: int) -> int | None:
    """Return when ``pid`` started, in clock ticks since boot, or None if there is no such process.

    With the boot id this names a process for good: a recycled pid has another start time.
    """
    fields = stat_fields(pid)
    return None if fields is None else int(fields[19])


def stat_fields(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` from the state on (see proc(5)), or None if there is no such
    process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets, which may itself hold spaces and brackets.
    return text.rpartition(")")[2].split()


def boot_id() -> str:
    """Return the id of this boot of the kernel; pids and start times mean nothing in another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def main(arguments: list[str]) -> int:
    """Detach, start the jobs, report to the caller that they are recorded, and wait for their ends."""
    directory, count, job_id = Path(arguments[0]), int(arguments[1]), arguments[2]
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(write_end)
        return _await_report(read_end)
    os.close(read_end)
    os.setsid()
    os.umask(0o077)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when its jobs have ended
    jobs: dict[int, int] = {}
    try:
        for index in range(count):
            jobs[_start(directory, index, _id_of(job_id, index, count), count)] = index
    except BaseException as error:
        for pid in jobs:  # nobody will hear of them
            os.kill(pid, signal.SIGKILL)  # it may have no group of its own yet
            _kill_group(pid)
        os.write(write_end, f"{type(error).__name__}: {error}".encode())
        raise
    _drop_terminal()
    os.write(write_end, _GO)
    os.close(write_end)
    _record_ends(directory, jobs)
    return 0


def _id_of(job_id: str, index: int, count: int) -> str:
    return job_id if count == 1 else f"{job_id}_{index}"


def _await_report(read_end: int) -> int:
    """In the command's own process: wait until the detached one has recorded its jobs, or failed."""
    report = b"".join(iter(lambda: os.read(read_end, 4096), b""))
    if report == _GO:
        return 0
    sys.stderr.write(f"the jobs could not be started: {report.decode(errors='replace') or 'killed'}\n")
    return 1


def _drop_terminal() -> None:
    """Let go of the caller's descriptors: a pipe held open would keep whoever reads it waiting."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _start(directory: Path, index: int, job_id: str, count: int) -> int:
    """Fork a job's process, record it, and let it go on; return its pid."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(write_end)
            _become_job(directory, index, job_id, count, read_end)
        finally:
            os._exit(127)
    os.close(read_end)
    _write_json(
        directory / f"process-{index}.json",
        {
            "pid": pid,
            "start_time": start_time(pid),
            "supervisor_pid": os.getpid(),
            "supervisor_start_time": start_time(os.getpid()),
            "host": socket.gethostname(),
            "boot_id": boot_id(),
        },
    )
    os.write(write_end, _GO)
    os.close(write_end)
    return pid


def _become_job(directory: Path, index: int, job_id: str, count: int, read_end: int) -> None:
    """Become the script, in a session of its own, as if a batch system had started it."""
    os.setsid()
    output = directory / ("output.txt" if count == 1 else f"output_{index}.txt")
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _OWNER_ONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    if os.read(read_end, 1) != _GO:
        return
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    # Ignored signals are inherited: a pilot that cannot be told to stop would be killed instead. Python
    # itself ignores the last two.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    script = directory / "script.sh"
    argv = [*_interpreter(script), str(script)]
    try:
        os.execve(argv[0], argv, {**os.environ, "HPCQ_JOB_ID": job_id})  # noqa: S606
    except OSError as error:
        os.write(2, f"hpcq: {argv[0]} cannot be started: {error.strerror}\n".encode())


def _interpreter(script: Path) -> list[str]:
    """Return the words of the ``#!`` line, as the kernel splits it.

    The interpreter is started rather than the script, which may be on a file system mounted noexec.
    """
    with script.open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix("#!").strip().split(None, 1)


def _record_ends(directory: Path, jobs: dict[int, int]) -> None:
    """Wait for every job; when one ends, end what it left in its process group, as a batch system would."""
    while jobs:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        pid = ended.si_pid if ended else 0
        if pid in jobs:
            # Before it is reaped, while its id cannot have become another group's.
            _kill_group(pid)
        _, status = os.waitpid(pid, 0)
        if pid in jobs:
            path = directory / f"exit-{jobs.pop(pid)}.json"
            with contextlib.suppress(OSError):  # a full disk: the other jobs' ends are still to be waited for
                _write_json(path, {"exit_code": os.waitstatus_to_exitcode(status)})


def _kill_group(pid: int) -> None:
    """Kill a job; one that was killed before it had a group of its own has none."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _write_json(path: Path, content: dict[str, object]) -> None:
    """Write a small record under its name in one step (the umask makes it private)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
