"""Watching tasks that take long: the memory, disk and CPU of a runner's whole tree, every `INTERVAL` seconds.

One look serves all runners and is made in a thread; tasks younger than `YOUNG` are left to their runner's own counters.

*Memory* is what is resident and cannot be dropped: anonymous and shared-memory pages (``RssAnon + RssShmem``), not
mapped files, which are cache (a ROOT file read through mmap costs nothing). Pages that several processes of a task
share would count once for each; so when the sum is over the limit, it is taken again by ``Pss``, which divides them
among their users and is dearer to read. What an interpreter held before the task does not count for it.
*Disk* is what is allocated below the runner's directory, its captured output included. Large trees are measured more
seldom, so that this takes at most a fiftieth of a core. So are very many processes, at some 0.1 ms each, so that looks
take one part in `SHARE` of a core; but every `SELDOM` seconds there is one.

May not live here: what follows when a task is over its limit (`core`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import psutil

from hpcq.messages import TaskSpec
from hpcq.pilot.processes import descendants
from hpcq.pilot.usage import NOTHING_USED, Used, disk_bytes

INTERVAL = 0.5
"""Seconds between two looks."""

SHARE = 20
"""Looks take at most one part in so many of a core's time."""

SELDOM = 5.0
"""Seconds between two looks at most: limits are to hold."""

YOUNG = 0.1
"""Seconds a task has run before it is looked at."""

_DISK_SHARE = 50
_TICKS = os.sysconf("SC_CLK_TCK")


class Target(NamedTuple):
    """A task at work: the runner's process (not counted itself: it guards), directory, and what it had before.

    ``held`` is memory (MB), ``spent`` CPU seconds.
    """

    lane: int
    task: TaskSpec
    pid: int
    directory: str
    held: float
    spent: float


class Seen(NamedTuple):
    """What one look found, and what is to be said when it is too much."""

    target: Target
    used: Used
    excess: str


class Sampler:
    """Looks at what ``targets`` gives and calls ``exceeded`` for those over their limits."""

    def __init__(self, targets: Callable[[], list[Target]], exceeded: Callable[[Target, str], None]) -> None:
        self._targets = targets
        self._exceeded = exceeded
        self._most: dict[int, tuple[int, Used]] = {}
        self._disks: dict[int, Disk] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        rest = INTERVAL
        while True:
            await asyncio.sleep(rest)
            targets = self._targets()
            rest = INTERVAL
            if targets:
                found, cost = await asyncio.to_thread(self._look, targets)
                rest = pause_after(cost)
                for seen in found:
                    self._note(seen)

    def most(self, lane: int, task: int) -> Used:
        """The most a task was seen to use."""
        number, used = self._most.get(lane, (0, NOTHING_USED))
        return used if number == task else NOTHING_USED

    def forget(self, lane: int) -> None:
        """This lane is no more."""
        self._most.pop(lane, None)
        self._disks.pop(lane, None)

    def _look(self, targets: list[Target]) -> tuple[list[Seen], float]:
        """What is found, and the CPU seconds it took to find."""
        began = time.thread_time()
        found = [self._look_at(target) for target in targets]
        return found, time.thread_time() - began

    def _look_at(self, target: Target) -> Seen:
        pids = descendants(target.pid)
        limit = target.task.memory
        memory = sum(map(_own_mb, pids)) - target.held
        if limit and memory > limit and len(pids) > 1:
            memory = sum(map(_pss_mb, pids)) - target.held
        cpu = sum(map(_cpu_seconds, pids)) - target.spent
        disk = self._disks.setdefault(target.lane, Disk()).measure(target.directory)
        used = Used(max(0.0, memory), disk, max(0.0, cpu))
        return Seen(target, used, _excess(target.task, used))

    def _note(self, seen: Seen) -> None:
        target, used = seen.target, seen.used
        before = self.most(target.lane, target.task.id)
        most = Used(max(used.memory, before.memory), max(used.disk, before.disk), max(used.cpu, before.cpu))
        self._most[target.lane] = (target.task.id, most)
        if seen.excess:
            self._exceeded(target, seen.excess)


def pause_after(cost: float) -> float:
    """Seconds to the next look, when one took ``cost`` CPU seconds."""
    return min(SELDOM, max(INTERVAL, SHARE * cost))


class Disk:
    """The size of one directory, measured no more often than it is cheap."""

    def __init__(self) -> None:
        self._size = 0.0
        self._next = 0.0

    def measure(self, directory: str) -> float:
        """MB allocated below it, by the last look."""
        began = time.monotonic()
        if began >= self._next:
            self._size = disk_bytes(directory) / 2**20
            ended = time.monotonic()
            self._next = ended + _DISK_SHARE * (ended - began) - INTERVAL
        return self._size


def _excess(task: TaskSpec, used: Used) -> str:
    for name, asked, measured in (("memory", task.memory, used.memory), ("disk", task.disk, used.disk)):
        if asked and measured > asked:
            return f"it used {measured:.0f} MB of {name} and had asked for {asked} MB; ask for more with {name}="
    return ""


def _own_mb(pid: int) -> float:
    kilobytes = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:  # noqa: PTH123
        for line in file:
            if line.startswith(("RssAnon:", "RssShmem:")):
                kilobytes += int(line.split()[1])
    return kilobytes / 1024


def _pss_mb(pid: int) -> float:
    try:
        return min(_own_mb(pid), psutil.Process(pid).memory_full_info().pss / 2**20)
    except (psutil.Error, OSError):
        return _own_mb(pid)


def _cpu_seconds(pid: int) -> float:
    """Of the process and the children it has waited for."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
        fields = file.read().rpartition(b")")[2].split()  # the name before it may have blanks and brackets
        return sum(map(int, fields[11:15])) / _TICKS
    return 0.0
