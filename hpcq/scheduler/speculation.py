"""When a running task deserves a second copy: it takes much longer than others of its category did.

Every task that is announced as begun gets a time at which to look at it again; whoever has ended by then is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import islice

from hpcq.scheduler.pilots import Openings, Pilot
from hpcq.scheduler.records import Record, TaskState

LOOK_AGAIN = 1.0
"""Seconds until the next look at a task whose category is not known yet, or for which there was no room."""

CANDIDATES = 64
"""Pilots with room that are considered for one copy."""


class Speculation:
    """Watches running tasks. ``multiplier``: how many times the typical time makes an outlier."""

    def __init__(self, multiplier: float) -> None:
        self.multiplier = multiplier
        self._due: list[tuple[float, int, int]] = []

    @property
    def wants_tick(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self._due)

    def watch(self, record: Record, now: float) -> None:
        """It has begun."""
        heappush(self._due, (self._time(record, now), record.id, record.attempts))

    def again(self, record: Record, now: float) -> None:
        """It is an outlier for which there was no room."""
        heappush(self._due, (now + LOOK_AGAIN, record.id, record.attempts))

    def _time(self, record: Record, now: float) -> float:
        typical = record.category.typical
        if typical is None:
            return now + LOOK_AGAIN
        return max(record.since + self.multiplier * typical, now + 1e-3)

    def outliers(self, tasks: dict[int, Record], now: float) -> Iterator[Record]:
        """The tasks that have run too long by now and have no copy."""
        while self._due and self._due[0][0] <= now:
            _, number, attempts = heappop(self._due)
            record = tasks.get(number)
            if record is None or record.state is not TaskState.RUNNING or record.attempts != attempts:
                continue
            if record.second is not None:
                continue
            typical = record.category.typical
            if typical is None or now - record.since < self.multiplier * typical:
                heappush(self._due, (self._time(record, now), number, attempts))
            else:
                yield record


def room_for_copy(record: Record, openings: Openings, now: float) -> Pilot | None:
    """A pilot that could begin a copy at once, on another host if there is one."""
    second_best = None
    for pilot in islice(openings, CANDIDATES):
        if pilot is record.pilot or record.id in pilot.claimed or not pilot.can_now(record.claimed, now):
            continue
        if pilot.host != record.pilot.host:
            return pilot
        second_best = second_best or pilot
    return second_best
