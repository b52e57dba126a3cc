"""Ending a runner with everything it started, and not a process more."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_descendants(pid: int) -> None:
    """Kill all that descends from ``pid``, again and again until nothing is left that could have forked meanwhile."""
    while alive := [p for p in _descendants(pid) if _is_alive(p)]:
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=1)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_tree(pid: int) -> None:
    """Kill ``pid`` and all that descends from it.

    It is stopped first, so that it starts nothing new; orphans of its children stay its own, since it is their reaper.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)
    kill_descendants(pid)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
