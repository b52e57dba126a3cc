"""The guard of a runner that executes functions itself: a process that only waits.

A crash of such a runner leaves orphans that nobody could name any more, a daemon with a session of its own among them.
So the runner is a fork of the process the pilot started; that one stays behind as the reaper of all that comes after
it, kills what is left when the runner ends, and ends in the same way, so that the pilot sees the runner's own status.
It shares its memory with the runner and costs next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
from pathlib import Path

from hpcq.pilot.processes import kill_own_descendants

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_reaper() -> None:
    """Orphans of our tasks become our children, so that they can be found and ended."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int) -> None:
    """Be killed when ``parent``, which has just forked us, ends first."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def forks_die_with_us() -> bool:
    """Have every fork of this process killed when it ends, without anything that the fork has to do for it; whether
    that can be had: not where no C compiler was, then each fork says `die_with`."""
    library = Path(__file__).resolve().parents[1] / "preload" / "forks_die.so"
    try:
        return not ctypes.CDLL(str(library)).forks_die()
    except OSError:
        return False


def end_children() -> bool:
    """Reap the children that have ended; kill the others with all they started. Whether there were any."""
    found = False
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            found = True
    except ChildProcessError:
        return found
    kill_own_descendants()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    return True


def stay_behind(channels: list[socket.socket]) -> None:
    """Fork; return in the child. The parent closes its ends of these channels and ends when the child does."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with(parent)
        become_reaper()
        return
    for channel in channels:
        channel.close()
    while (found := os.waitpid(-1, 0))[0] != child:
        pass
    end_children()
    _end_as(os.waitstatus_to_exitcode(found[1]))


def _end_as(status: int) -> None:
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the runner's dump is enough
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)
