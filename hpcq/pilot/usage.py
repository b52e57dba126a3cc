"""What a task used, as its runner can tell for next to nothing: ``getrusage`` gives CPU seconds and peaks exactly.

The peak of an interpreter is that of its life, not of its task; so it is set back (``/proc/self/clear_refs``) after
each task that raised it, which costs nothing as long as tasks are small. Memory counts mapped files here, which can be
dropped: good for a report, not for ending a task (see `sampler`).
"""

from __future__ import annotations

import contextlib
import os
import resource
from typing import NamedTuple

PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
_NOTICEABLE_KB = 4096
"""Growth of the peak that is worth setting it back."""


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
        self._cpu = 0.0
        self.peak_mb = 0.0
        self.grew = False
        self.read()

    def read(self) -> float:
        """CPU seconds since the last time; `peak_mb` is the peak of memory since then, `grew` whether it is new."""
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.peak_mb = own.ru_maxrss / 1024
        self.grew = own.ru_maxrss > self._base_kb + _NOTICEABLE_KB
        if self.grew:
            self._set_back()
        before, self._cpu = self._cpu, own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        return self._cpu - before

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
