"""One pilot as the scheduler accounts for it, and the list of pilots that have room."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator

import msgspec

from hpcq.scheduler.events import PilotReady
from hpcq.scheduler.needs import Needs
from hpcq.scheduler.records import Demand, Record

LOOKAHEAD = 0.05
"""Seconds of expected work sent ahead to each core of a pilot."""

SHORT = 1.0
"""Tasks expected to last longer (seconds) are not sent ahead: a round trip is nothing to them."""

BACKLOG_LIMIT = 2048
"""Tasks a pilot may hold in advance, however short."""

OVERHEAD = 20e-6
"""Seconds any task costs a pilot besides running: keeps the expectation of an empty task above zero."""


class Pilot:
    """One pilot that is ready or draining. ``claimed`` tasks hold resources; ``backlog`` waits there, in order.

    ``load`` is how much of what it may hold in advance it holds, 1 for all. ``listed`` is what the scheduler's sum of
    free cores counts of it, ``progress`` when something last ended there. ``paused``: nothing can run there while
    its tunnel is being made anew.
    """

    __slots__ = (
        "asked_back", "backlog", "blocked", "claimed", "cores", "disk", "draining", "ends_at", "features", "free_cores",
        "free_disk", "free_gpus", "free_memory", "gpus", "host", "listed", "load", "memory", "name", "paused",
        "progress", "wan",
    )  # fmt: skip

    def __init__(self, ready: PilotReady, now: float) -> None:
        self.name = ready.pilot
        self.host = ready.host
        self.cores = self.free_cores = ready.cores
        self.memory = self.free_memory = ready.memory
        self.disk = self.free_disk = ready.disk
        self.gpus = self.free_gpus = ready.gpus
        self.wan = ready.wan
        self.features = ready.features
        self.ends_at = now + ready.time_left
        self.draining = False
        self.blocked = False
        self.paused = False
        self.claimed: dict[int, Record] = {}
        self.backlog: OrderedDict[int, Record] = OrderedDict()  # taken from its beginning, which a dict is slow to find
        self.load = 0.0
        self.listed = 0
        self.asked_back = False
        self.progress = now

    @property
    def usable(self) -> bool:
        """Whether anything new may be placed here."""
        return not self.draining and not self.blocked and not self.paused

    def find(self, number: int) -> Record | None:
        """The task of that id if it is here."""
        return self.claimed.get(number) or self.backlog.get(number)

    def could_ever(self, needs: Needs, now: float) -> bool:
        """Whether the whole pilot, empty, would do, for as long as the task may take."""
        return (
            self.cores >= needs.cores
            and self.memory >= needs.memory
            and self.disk >= needs.disk
            and self.gpus >= needs.gpus
            and (self.wan or needs.network != "wan")
            and needs.features <= self.features
            and (not needs.walltime or self.ends_at - now >= needs.walltime)
        )

    def has_room(self, needs: Needs) -> bool:
        """Whether what is free would do."""
        if needs.whole:
            return not self.claimed
        return (
            self.free_cores >= needs.cores
            and self.free_memory >= needs.memory
            and self.free_disk >= needs.disk
            and self.free_gpus >= needs.gpus
        )

    def can_now(self, needs: Needs, now: float) -> bool:
        """Whether such a task could begin at once."""
        return not self.backlog and self.has_room(needs) and self.could_ever(needs, now)

    def weight(self, demand: Demand) -> float | None:
        """What one more task of the demand would add to ``load``; None if it is not to be sent ahead."""
        needs = demand.needs
        expected = demand.ready.head().category.seconds
        if expected is None:
            seconds = LOOKAHEAD
        elif expected <= SHORT:
            seconds = min(expected, LOOKAHEAD) + OVERHEAD
        else:
            return 1.0 if self._is_large(needs) else None  # it keeps its place in the line against smaller ones
        return max(1 / BACKLOG_LIMIT, seconds * needs.cores / (LOOKAHEAD * self.cores))

    def _is_large(self, needs: Needs) -> bool:
        return (
            needs.whole
            or needs.cores > 1
            or needs.gpus > 0
            or needs.memory * self.cores > self.memory
            or needs.disk * self.cores > self.disk
        )

    def admits(self, weight: float) -> bool:
        """Whether it may hold one more task in advance that weighs so much."""
        return not self.asked_back and (not self.backlog or self.load + weight <= 1 + 1e-9)

    def take(self, record: Record, needs: Needs, weight: float | None) -> None:
        """Hold a task: with its resources, or, with a weight, in advance."""
        if needs.whole:
            needs = msgspec.structs.replace(needs, cores=self.cores, memory=self.memory, disk=self.disk, gpus=self.gpus)
        record.claimed = needs
        if weight is None:
            self._claim(record)
        else:
            record.load = weight
            self.backlog[record.id] = record
            self.load += weight

    def _claim(self, record: Record) -> None:
        needs = record.claimed
        self.claimed[record.id] = record
        self.free_cores -= needs.cores
        self.free_memory -= needs.memory
        self.free_disk -= needs.disk
        self.free_gpus -= needs.gpus

    def promote(self) -> None:
        """Give resources to what waits, in order, as far as they go: just what the pilot itself does."""
        while self.backlog:
            record = next(iter(self.backlog.values()))
            if not self.has_room(record.claimed):
                return
            self._unhold(record)
            self._claim(record)

    def _unhold(self, record: Record) -> None:
        del self.backlog[record.id]
        self.load = self.load - record.load if self.backlog else 0.0

    def release(self, record: Record) -> None:
        """It is no longer here."""
        if record.id in self.claimed:
            needs = record.claimed
            del self.claimed[record.id]
            self.free_cores += needs.cores
            self.free_memory += needs.memory
            self.free_disk += needs.disk
            self.free_gpus += needs.gpus
        else:
            self._unhold(record)

    def held(self) -> list[Record]:
        """Everything it has, in the order it would be done."""
        return [*self.claimed.values(), *self.backlog.values()]

    def overdue(self, now: float) -> list[Record]:
        """What waits here and could no longer end before the pilot does."""
        if self.ends_at == math.inf:
            return []
        left = self.ends_at - now
        return [record for record in self.backlog.values() if record.claimed.walltime > left]


def may_be_sent_ahead(demand: Demand) -> bool:
    """Whether there could be a pilot that takes the demand's next task in advance: it is short, or large."""
    needs = demand.needs
    expected = demand.ready.head().category.seconds
    return (
        expected is None
        or expected <= SHORT
        or needs.cores > 1
        or bool(needs.memory or needs.disk or needs.gpus or needs.whole)
    )


class Openings:
    """Pilots that have room, in the order in which they got it.

    Whoever looks for a pilot reads on where it stopped: a pilot that was passed over comes again, at the end, when it
    has got more room. So each reader looks at each opening once, however many pilots there are.
    """

    def __init__(self) -> None:
        self._at: dict[Pilot, int] = {}
        self._log: list[Pilot] = []
        self._stamps: list[int] = []
        self._next = 1

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[Pilot]:
        return iter(self._at)

    def put(self, pilot: Pilot) -> None:
        """It has room, perhaps more than before: it goes to the end."""
        at = self._at
        at.pop(pilot, None)
        at[pilot] = self._next
        self._log.append(pilot)
        self._stamps.append(self._next)
        self._next += 1
        if len(self._log) > 2 * len(at) + 64:
            self._log = list(at)
            self._stamps = list(at.values())

    def drop(self, pilot: Pilot) -> None:
        """It has none."""
        self._at.pop(pilot, None)

    def find(self, seen: int, accept: Callable[[Pilot], bool]) -> tuple[Pilot | None, int]:
        """The first from ``seen`` on that is accepted, and how far was read."""
        stamps, log, at = self._stamps, self._log, self._at
        for index in range(bisect_left(stamps, seen), len(stamps)):
            pilot, stamp = log[index], stamps[index]
            if at.get(pilot) == stamp and accept(pilot):
                return pilot, stamp
        return None, self._next
