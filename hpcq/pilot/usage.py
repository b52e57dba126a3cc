"""What a task used, as its runner can tell for next to nothing: ``getrusage`` gives CPU seconds and peaks exactly.

The peak of an interpreter is that of its life, not of its task; so it is set back (``/proc/self/clear_refs``) after
each task that raised it, which costs nothing as long as tasks are small. Memory counts mapped files here, which can be
dropped: good for a report, not for ending a task (see `sampler`).
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from typing import NamedTuple

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_NOTICEABLE_KB = 4096
"""Growth of the peak that is worth setting it back."""

_QUICK = 0.0005
"""Seconds in which a task can neither start a process nor use noticeable memory: its own CPU time is all there is."""

_QUICK_AT_MOST = 100
"""Quick tasks in a row of which that is believed: together they may leak."""


class Used(NamedTuple):
    """What a task used at its most (MB), and its CPU seconds."""

    memory: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0


NOTHING_USED = Used()


class Meter:
    """Reads the counters of this process and of the children it has reaped."""

    def __init__(self) -> None:
        self._base_kb = 0
        self._cpu = self._children = 0.0
        self._quick = 0
        self.peak_mb = 0.0
        self.grew = False
        self.read(1.0)

    def read(self, seconds: float) -> float:
        """CPU seconds since the last time; `peak_mb` is the peak of memory since then, `grew` whether it is new.

        ``seconds`` is how long the task took.
        """
        before = self._cpu
        if seconds < _QUICK and self._quick < _QUICK_AT_MOST:
            self._quick += 1
            self.grew = False
            self.peak_mb = self._base_kb / 1024
        else:
            self._quick = 0
            self._read_memory_and_children()
        self._cpu = time.process_time() + self._children
        return self._cpu - before

    def leave_out(self, cpu: float) -> None:
        """These CPU seconds since the last time are not to be read."""
        self._cpu += cpu

    def _read_memory_and_children(self) -> None:
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._children = children.ru_utime + children.ru_stime
        self.peak_mb = own.ru_maxrss / 1024
        self.grew = own.ru_maxrss > self._base_kb + _NOTICEABLE_KB
        if self.grew:
            self._set_back()

    def _set_back(self) -> None:
        with contextlib.suppress(OSError):  # then the peak remains an upper bound
            descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(descriptor, b"5")
            finally:
                os.close(descriptor)
        self._base_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_mb() -> float:
    """What this process holds now, mapped files left out."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * PAGE_MB


def disk_bytes(path: str) -> int:
    """What is allocated on disk below ``path``; what vanishes meanwhile is left out."""
    total = 0
    pending = [path]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
    return total
