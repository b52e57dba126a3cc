"""Ending a runner with everything it started, and not a process more."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable

import psutil

DEATH_TIMEOUT_MS = 2000
"""Milliseconds a killed process has to die; one in uninterruptible sleep may take longer and is looked at again."""


def _descendants(pid: int) -> list[int]:
    """Living descendants: zombies are done, whoever has to reap them."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
    return found


def kill_descendants(pid: int) -> None:
    """Kill all that descends from ``pid``, again and again until nothing is left that could have forked meanwhile."""
    _kill_all(lambda: _descendants(pid))


def kill_session(leader: int) -> None:
    """Kill what is left of the session of a process that has ended; its orphans are no longer its descendants."""
    _kill_all(lambda: _members(leader))


def _kill_all(find: Callable[[], list[int]]) -> None:
    for _ in range(100):
        alive = find()
        if not alive:
            return
        _kill(alive)


def _members(session: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def _kill(pids: list[int]) -> None:
    poll = select.poll()
    handles = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                handle = os.pidfd_open(pid)
                handles.append(handle)
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                poll.register(handle, select.POLLIN)
        left = len(handles)
        while left > 0 and (dead := poll.poll(DEATH_TIMEOUT_MS)):
            for handle, _event in dead:
                poll.unregister(handle)
            left -= len(dead)
    finally:
        for handle in handles:
            os.close(handle)


def kill_tree(pid: int) -> None:
    """Kill ``pid`` and all that descends from it.

    It is stopped first, so that it starts nothing new; orphans of its children stay its own, since it is their reaper.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)
    kill_descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
