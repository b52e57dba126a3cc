"""What is learned of tasks of one kind: how long they take, how much memory and disk they use, what to give the next.

Allocation modes, after Work Queue's categories (cctools, ``category.c``; Tovar et al., "A Job Sizing Strategy for
High-Throughput Scientific Workflows", IEEE TPDS 29, 2018). They concern what a task does not say itself:

- ``fixed``: what the category was given, else no limit. A task that uses more ends as ``resources``.
- ``max``: the most any task has used so far.
- ``max_throughput``: the amount *a* at which a finished task costs least, counting memory times seconds: all tasks try
  with *a*, those that need more run once more with the most seen.

Until `ENOUGH` tasks have ended, the category's own figures serve as the first guess. A task that ends as ``resources``
runs again with the most seen, then with all the category allows (a whole pilot, if it sets no maximum), then ends.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import msgspec

from hpcq.scheduler.events import CategorySet
from hpcq.scheduler.needs import Needs

MODES = ("fixed", "max", "max_throughput")

ENOUGH = 5
"""Tasks that must have ended before anything is allotted, or judged, by what they used."""

RECENT = 101
"""Runs from which the typical time is taken."""

RELEARN = 1.1
"""Allotments are computed anew when so many times as many tasks have ended as at the last time."""


class Usage:
    """How much of one resource tasks have used: counts and seconds by amount, amounts rounded up to two figures."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def add(self, amount: float, seconds: float) -> None:
        """One task used so much, for so long."""
        bucket = rounded(amount)
        self.seconds[bucket] = self.seconds.get(bucket, 0.0) + max(seconds, 1e-3)

    @property
    def most(self) -> int:
        """The most seen."""
        most: int = max(self.seconds, default=0)
        return most

    def cheapest(self) -> int:
        """The first allotment at which a task costs least, the second try with the most seen included."""
        most, left = self.most, sum(self.seconds.values())
        total, best, least = left, most, math.inf
        for amount, seconds in sorted(self.seconds.items()):
            left -= seconds
            cost = amount * total + most * left
            if cost < least:
                best, least = amount, cost
        return best


def rounded(amount: float) -> int:
    """Up to two significant figures, so that allotments do not change with every task."""
    whole = max(1, math.ceil(amount))
    unit: int = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // unit) * unit


class Category:
    """Tasks of one kind. ``seconds`` is a moving average of their length, None before the first has ended."""

    __slots__ = (
        "_relearn_at",
        "alive",
        "count",
        "disk",
        "disk_used",
        "kind",
        "memory",
        "memory_used",
        "recent",
        "seconds",
        "settings",
    )  # fmt: skip
    WEIGHT = 0.2

    def __init__(self, kind: str = "") -> None:
        self.kind = kind
        self.settings = CategorySet(kind)
        self.seconds: float | None = None
        self.recent: deque[float] | None = None
        self.alive = 0
        self.count = 0
        self.memory = self.disk = 0
        self.memory_used = Usage()
        self.disk_used = Usage()
        self._relearn_at = float(ENOUGH)

    @property
    def learns(self) -> bool:
        """Whether allotments follow what was measured."""
        return self.settings.mode != "fixed"

    @property
    def allots(self) -> bool:
        """Whether its tasks may get what they did not ask for themselves."""
        return self.learns or bool(self.settings.memory or self.settings.disk)

    def set(self, settings: CategorySet) -> None:
        """What the user wants of it from now on."""
        self.settings = settings
        self.memory, self.disk = settings.memory, settings.disk
        self._relearn_at = float(ENOUGH)
        if self.learns and self.count >= ENOUGH:
            self._relearn()

    def took(self, seconds: float) -> None:
        """One more run has ended, whichever way."""
        known = self.seconds
        self.seconds = seconds if known is None else known + self.WEIGHT * (seconds - known)

    def remember(self, seconds: float) -> None:
        """A task succeeded in so long; kept only where somebody asks for the typical time."""
        if self.recent is None:
            self.recent = deque(maxlen=RECENT)
        self.recent.append(seconds)

    @property
    def typical(self) -> float | None:
        """The median of the last successes; None before `ENOUGH` of them."""
        if self.recent is None or len(self.recent) < ENOUGH:
            return None
        return statistics.median(self.recent)

    def used(self, memory: float, disk: float, seconds: float) -> bool:
        """A task succeeded with this; returns whether allotments have changed."""
        if not self.learns:
            return False
        self.count += 1
        if memory > 0:
            self.memory_used.add(memory, seconds)
        if disk > 0:
            self.disk_used.add(disk, seconds)
        more = self.settings.mode == "max" and (memory > self.memory or disk > self.disk)
        due = self.count >= (ENOUGH if more else self._relearn_at)
        return due and self._relearn()

    def _relearn(self) -> bool:
        self._relearn_at = self.count * RELEARN
        before = self.memory, self.disk
        self.memory = self._allotment(self.memory_used, self.settings.memory, self.settings.max_memory)
        self.disk = self._allotment(self.disk_used, self.settings.disk, self.settings.max_disk)
        return (self.memory, self.disk) != before

    def _allotment(self, usage: Usage, guess: int, limit: int) -> int:
        if not usage.seconds:
            return guess
        amount = usage.most if self.settings.mode == "max" else usage.cheapest()
        return min(amount, limit) if limit else amount

    def more(self, given: Needs, level: int, memory: float, disk: float) -> Needs | None:
        """What a task gets that used so much and ended as ``resources``; None when it may not have more.

        First the most that others used, then, from ``level`` 1 on, all the category allows: a whole pilot's or its
        maximum.
        """
        if not self.learns or given.whole:
            return None
        lacks_memory, lacks_disk = 0 < given.memory < memory, 0 < given.disk < disk
        if not lacks_memory and not lacks_disk:  # measured too late to tell
            lacks_memory, lacks_disk = given.memory > 0, given.disk > 0
        settings = self.settings
        wanted = [
            _step(given.memory, memory, 0 if level else self.memory_used.most, settings.max_memory, lacks_memory),
            _step(given.disk, disk, 0 if level else self.disk_used.most, settings.max_disk, lacks_disk),
        ]
        if wanted == [given.memory, given.disk]:
            return None
        whole = None in wanted
        new_memory = given.memory + lacks_memory if wanted[0] is None else wanted[0]
        new_disk = given.disk + lacks_disk if wanted[1] is None else wanted[1]
        return msgspec.structs.replace(given, memory=new_memory, disk=new_disk, whole=whole)


def _step(given: int, used: float, most: int, limit: int, lacking: bool) -> int | None:
    """The next allotment; ``given`` when there is no more, None for all that a pilot has."""
    if not lacking:
        return given
    if most > given and most >= used:
        return min(most, limit) if limit else most
    return max(given, limit) if limit else None
