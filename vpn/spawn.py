"""Start one program from a single-threaded process: fork, arrange, exec.

Used only inside keepers. ``subprocess`` is not enough: descriptors received from another process must get the
numbers the program expects, and the death signal must be set between fork and exec, which is safe only in a
process without threads. The child reports a failure to exec through a pipe that exec closes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from collections.abc import Mapping

from vpn import kernel
from vpn.messages import Spawn

TERMINAL_SIGNALS = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
)
_file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
_RESET = (*TERMINAL_SIGNALS, signal.SIGCHLD, signal.SIGTERM, signal.SIGPIPE)


def leave_terminal_alone() -> None:
    """Ignore what a terminal sends to a whole group: it is meant for the command, not for its keepers."""
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def raise_file_limit() -> None:
    """Let a keeper hold as many descriptors as it may; what it starts gets the limit it came with."""
    hard = _file_limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def spawn(request: Spawn, fds: Mapping[int, int]) -> int:
    """Start ``request.argv``; ``fds`` maps the number in the child to a descriptor here. Returns the pid.

    Raises OSError (errno and file as exec would give them) when the program cannot be started.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:  # the user's limit of processes
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        _child(request, fds, writer, parent)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        report = file.read()
    if report:
        os.waitpid(pid, 0)
        code, _, name = report.partition(b" ")
        raise OSError(int(code), os.strerror(int(code)), os.fsdecode(name))
    return pid


def _child(request: Spawn, fds: Mapping[int, int], writer: int, parent: int) -> None:
    blame = request.argv[0]
    try:
        if request.new_session:
            os.setsid()
        if request.may_mount:
            kernel.keep_rights(kernel.CAP_SYS_ADMIN)
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for number in _RESET:
            signal.signal(number, signal.SIG_DFL)
        writer = _place(fds, writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, _file_limit)
        blame = request.cwd
        os.chdir(request.cwd)
        blame = request.argv[0]
        os.execvpe(blame, request.argv, request.env)  # noqa: S606  (an argv, no shell)
    except (OSError, ValueError) as error:  # ValueError: a null byte, or a variable whose name has "=" in it
        os.write(writer, b"%d %s" % (getattr(error, "errno", None) or errno.EINVAL, blame))
    finally:
        os._exit(127)


def _place(fds: Mapping[int, int], writer: int) -> int:
    """Move every descriptor to its number; first out of the way, so that none is overwritten."""
    above = max(fds, default=2) + 1
    writer = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, above)
    moved = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for target, fd in fds.items()}
    for target, fd in moved.items():
        os.dup2(fd, target, inheritable=True)
    return writer
