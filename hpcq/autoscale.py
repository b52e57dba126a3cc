"""How many pilots a queue should have: decided from its waiting work, within limits. Pure: time is passed in.

Wanted are the pilots that work, and as many as the waiting tasks would fill: by whichever of cores, memory, disk and
GPUs a task takes most of, and by how long its kind is known to last, since a pilot is not worth starting for less than
`WORTHWHILE` seconds. Tasks that such pilots could never run do not count. From there::

    wanted - (working + on their way) --> submit, ``step`` jobs per ``interval`` at most, never more than ``backlog``
                                          waiting in the batch system, nor more than ``max`` pilots in all
    idle for ``idle_timeout``         --> sent away, down to ``min``; above ``max`` at once
    not started, and nothing to do    --> cancelled after ``idle_timeout``; above ``max`` at once

A refused submission makes it wait, each time longer; after `REFUSALS` in a row, or `FAILED_STARTS` pilots in a row that
never came to serve, it *pauses* and says why, until its limits are set again. What may not be here: clocks, batch
systems, sockets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from hpcq.errors import UsageError

WORTHWHILE = 60.0
"""Seconds of work that make it worth starting a pilot."""
REFUSALS = 10
"""Refused submissions in a row after which no more are tried."""
FAILED_STARTS = 3
"""Pilots in a row that never came to serve after which no more are submitted."""
FIRST_WAIT, LONGEST_WAIT = 30.0, 600.0
"""Seconds after a refused submission before the next is tried; they double."""
MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What autoscaling keeps to. Pilots and jobs are counted, times are in seconds.

    Raises:
        UsageError: a value that cannot be, by name.
    """

    min: int = 0
    max: int = 10
    step: int = 5
    interval: float = 30.0
    backlog: int = 20
    idle_timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("min", "max", "step", "backlog"):
            value = getattr(self, name)
            least = 0 if name in ("min", "max") else 1
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
                raise UsageError(f"{name} must be a whole number from {least} to {MOST}, not {value!r}")
        for name in ("interval", "idle_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UsageError(f"{name} must be a number of seconds, not {value!r}")
        if self.min > self.max:
            raise UsageError(f"min {self.min} is more than max {self.max}")

    def changed(self, changes: Mapping[str, object]) -> Limits:
        """These limits with some changed; those that are None stay.

        Raises:
            UsageError: an unknown name, or a value that cannot be.
        """
        names = [one.name for one in fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise UsageError(f"unknown limit {unknown[0]!r}; known are {', '.join(names)}")
        given = {name: value for name, value in changes.items() if value is not None}
        return Limits(**{**{name: getattr(self, name) for name in names}, **given})


@dataclass(frozen=True)
class Shape:
    """What one pilot will have: MB, seconds; 0 or None where it is not known beforehand and so limits nothing.

    ``nodes`` is the number of pilots in a job.
    """

    cores: int = 1
    memory: int = 0
    disk: int = 0
    gpus: int = 0
    walltime: float | None = None
    nodes: int = 1


@dataclass(frozen=True)
class Work:
    """Waiting tasks of one kind: how many, what each takes (MB, seconds), how long they are expected to last."""

    count: int
    cores: int = 1
    memory: int = 0
    disk: int = 0
    gpus: int = 0
    walltime: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Picture:
    """How things are: waiting work; pilots that work; idle ones and since when; pilots that are on their way, and how
    many jobs of them have not started yet.
    """

    work: Sequence[Work] = ()
    working: int = 0
    idle: Mapping[str, float] = field(default_factory=dict)
    coming: int = 0
    pending: int = 0


@dataclass(frozen=True)
class Decision:
    """Jobs to submit, idle pilots to send away, jobs that have not started to cancel."""

    submit: int = 0
    leave: tuple[str, ...] = ()
    cancel: int = 0


def pilots_for(work: Iterable[Work], shape: Shape) -> int:
    """How many pilots of this shape the waiting tasks would fill."""
    total = sum(_share(one, shape) for one in work)
    return math.ceil(total - 1e-9)


def _share(work: Work, shape: Shape) -> float:
    """What part of pilots these tasks fill, 0 if such a pilot could not run one."""
    pairs = ((work.cores, shape.cores), (work.memory, shape.memory), (work.disk, shape.disk))
    if any(has and takes > has for takes, has in pairs) or work.gpus > shape.gpus:
        return 0.0
    if shape.walltime is not None and work.walltime > shape.walltime:
        return 0.0
    places = min([shape.cores // work.cores, *(has // takes for takes, has in pairs[1:] if has and takes)])
    if work.gpus:
        places = min(places, shape.gpus // work.gpus)
    lasting = 1.0 if work.seconds is None else min(1.0, work.seconds / WORTHWHILE)
    return work.count * lasting / places


@dataclass
class Autoscale:
    """See the module. Ask `decide` every now and then; tell it what became of submissions and pilots."""

    limits: Limits
    shape: Shape
    paused: str = ""
    _recent: deque[tuple[float, int]] = field(default_factory=deque)
    _refusals: int = 0
    _failed: int = 0
    _not_before: float = -math.inf
    _needless_since: float | None = None

    def set_limits(self, limits: Limits) -> None:
        """Keep to these from now on; a pause is over."""
        self.limits = limits
        self.resume()

    def pause(self, why: str) -> None:
        """Submit nothing until the limits are set again."""
        self.paused = self.paused or why

    def resume(self) -> None:
        """Forget what went wrong."""
        self.paused = ""
        self._refusals = self._failed = 0
        self._not_before = -math.inf

    def submitted(self, jobs: int, now: float) -> None:
        """So many jobs were submitted."""
        self._refusals = 0
        self._recent.append((now, jobs))

    def refused(self, why: str, now: float) -> None:
        """The batch system refused a submission, or did not answer."""
        self._refusals += 1
        self._not_before = now + min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(self._refusals - 1, 10))
        if self._refusals >= REFUSALS:
            self.pause(f"{self._refusals} submissions in a row were refused; the last: {why}")

    def failed(self, why: str) -> None:
        """A pilot never reported, or says that it cannot serve."""
        self._failed += 1
        if self._failed >= FAILED_STARTS:
            self.pause(f"{self._failed} pilots in a row never came to serve; the last: {why}")

    def served(self) -> None:
        """A pilot is ready: whatever failed before was not the fault of what we submit."""
        self._failed = 0

    def decide(self, picture: Picture, now: float) -> Decision:
        """What to do now."""
        limits = self.limits
        needed = pilots_for(picture.work, self.shape)
        everyone = picture.working + len(picture.idle) + picture.coming
        missing = max(needed - picture.coming, limits.min - everyone)
        jobs = min(-(-missing // self.shape.nodes), (limits.max - everyone) // self.shape.nodes)
        if jobs > 0:
            self._needless_since = None
            return Decision(submit=self._ramp(jobs, picture.pending, now))
        cancel = self._needless(picture, everyone, needed, now)
        left = everyone - cancel * self.shape.nodes
        return Decision(leave=self._leavers(picture, left, now), cancel=cancel)

    def _ramp(self, jobs: int, pending: int, now: float) -> int:
        """How many of the missing jobs may be submitted now."""
        while self._recent and self._recent[0][0] <= now - self.limits.interval:
            self._recent.popleft()
        if self.paused or now < self._not_before:
            return 0
        budget = self.limits.step - sum(count for _, count in self._recent)
        return max(0, min(jobs, budget, self.limits.backlog - pending))

    def _needless(self, picture: Picture, everyone: int, needed: int, now: float) -> int:
        """Jobs that wait in the batch system for nothing."""
        excess = (everyone - self.limits.max) // self.shape.nodes
        spare = min(everyone - self.limits.min, picture.coming - needed) // self.shape.nodes
        if spare <= 0 or not picture.pending:
            self._needless_since = None
            spare = 0
        elif self._needless_since is None:
            self._needless_since = now
        if self._needless_since is None or now - self._needless_since < self.limits.idle_timeout:
            spare = 0
        return max(0, min(picture.pending, max(spare, excess)))

    def _over(self, picture: Picture, everyone: int) -> tuple[str, ...]:
        """Idle pilots above the limit."""
        return _longest(picture.idle)[: max(0, everyone - self.limits.max)]

    def _leavers(self, picture: Picture, left: int, now: float) -> tuple[str, ...]:
        over = self._over(picture, left)
        old = [name for name in _longest(picture.idle) if now - picture.idle[name] >= self.limits.idle_timeout]
        spare = max(0, left - self.limits.min)
        return tuple(dict.fromkeys([*over, *old[:spare]]))


def _longest(idle: Mapping[str, float]) -> tuple[str, ...]:
    """Idle pilots, the longest idle first."""
    return tuple(sorted(idle, key=lambda name: (idle[name], name)))
