"""Which lane takes the next task, and when there is a new one. Pure, like `core`, of which this is a part.

A lane that is free comes first, then a new one if what the task needs is free, then one that takes it in advance.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from hpcq.messages import TaskSpec
from hpcq.pilot.durations import Durations
from hpcq.pilot.lanes import Command, Free, Kill, Kind, Lane, LaneState, Start, kind_of, same_claim

AHEAD = 0.015
"""Seconds of expected work given to a lane in advance."""

AHEAD_LIMIT = 64
"""Tasks given in advance at most: what certainly fits into a socket's buffer."""

STUCK = 0.04
"""Seconds a task may keep those given behind it waiting before they are recalled."""

IDLE_LANES = 2
"""Lanes beyond the number of cores that may be idle before a new one ends another: their interpreters take memory."""

START_TIMEOUT = 120.0
"""Seconds a runner has to get ready; a cold Python on a shared file system is slow, one that hangs is ended."""


class Choice:
    """All lanes and what is free. What is to be done for a choice is added to ``orders``."""

    def __init__(
        self, cores: int, memory: int, disk: int, cpus: Sequence[tuple[int, ...]] = (), gpus: Sequence[str] = ()
    ) -> None:
        self.cores = cores
        self.free = Free(cores, memory, disk, cpus, gpus)
        self.lanes: dict[int, Lane] = {}
        self.durations = Durations(AHEAD)
        self.orders: list[Command] = []
        self._next_lane = 1

    def lane_for(self, task: TaskSpec, now: float) -> Lane | None:
        """The lane that takes the task now, perhaps a new one; None: it has to wait."""
        kind = kind_of(task)
        fits = self.free.fits(task)
        ahead: Lane | None = None
        soon = False
        for lane in self.lanes.values():
            soon = soon or (lane.kind == kind and lane.recovering)
            if lane.kind != kind or lane.doom is not None or lane.recalling or lane.spent or lane.late:
                continue
            if not lane.tasks:
                if fits and self.free.gpus.issuperset(lane.gpus):
                    return lane
            elif self._takes_ahead(lane, task, now) and (ahead is None or lane.expected < ahead.expected):
                ahead = lane
        return self._new_lane(kind, now) if fits and not soon else ahead

    def _takes_ahead(self, lane: Lane, task: TaskSpec, now: float) -> bool:
        expected = self.durations.known(task)
        if expected is None or len(lane.tasks) >= AHEAD_LIMIT or lane.state is LaneState.STARTING:
            return False
        if lane.kind.isolation == "fresh":
            return False
        if now >= lane.head_since + STUCK:  # it would be recalled at once
            return False
        return same_claim(lane.tasks[0], task) and lane.expected + expected <= AHEAD

    def start_ahead(self, kind: Kind, now: float) -> None:
        """Have a runner ready for the next task of that kind."""
        if not kind.gpus and not any(lane.idle and lane.kind == kind for lane in self.lanes.values()):
            self._new_lane(kind, now)

    def _new_lane(self, kind: Kind, now: float) -> Lane:
        idle = [lane for lane in self.lanes.values() if lane.idle]
        gpus = self.free.devices(kind.gpus, {gpu for lane in idle for gpu in lane.gpus}) if kind.gpus else ()
        self._end_idle(idle, set(gpus))
        lane = Lane(self._next_lane, kind, gpus, now, now + START_TIMEOUT)
        self._next_lane += 1
        self.lanes[lane.number] = lane
        self.orders.append(Start(lane.number, kind, gpus))
        return lane

    def _end_idle(self, idle: list[Lane], gpus: Set[str]) -> None:
        """Make room for one more lane: the longest idle goes first, and whoever may hold memory of these GPUs."""
        surplus = len(idle) - self.cores - IDLE_LANES
        for index, lane in enumerate(sorted(idle, key=lambda lane: lane.head_since)):
            if index <= surplus or not gpus.isdisjoint(lane.gpus):
                lane.spent = True
                self.orders.append(Kill(lane.number))
