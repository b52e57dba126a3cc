"""Bandwidth limits as token buckets. Pure: time is an argument, in seconds; rates are in bytes a second.

``TokenBucket`` is one limit, ``SharedBucket`` one of several processes; ``Budget`` is several limits that hold
together (a pilot's, and the gateway's). What was granted and not used is given back. ``Shaper`` is for datagrams, which
cannot be split and need not arrive: what exceeds the limit waits for a moment, as before a link, or is dropped.
"""

from __future__ import annotations

import collections
from collections.abc import MutableSequence, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

BURST = 0.05  # seconds of the rate that may pass at once
QUANTUM = 16384  # bytes: less is not granted, unless less is wanted; many small pieces cost more than a short wait
DELAY = 0.2  # seconds a datagram may wait for its turn
WAITING = 1 << 20  # bytes of datagrams that may


class TokenBucket:
    """Grants ``rate`` bytes a second, and at most ``burst`` bytes at once."""

    def __init__(self, rate: float, burst: float = 0.0, now: float = 0.0) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate} bytes a second lets nothing pass")
        self.rate = rate
        self.burst = max(burst or rate * BURST, float(QUANTUM))
        self.level = self.burst
        self._now = now

    def available(self, now: float) -> float:
        """Bytes that may pass at ``now``; a clock that goes back adds nothing."""
        if now > self._now:
            self.level = min(self.burst, self.level + (now - self._now) * self.rate)
        self._now = now
        return self.level

    def take(self, count: float) -> None:
        """Spend bytes that were available."""
        self.level -= count

    def give_back(self, count: float) -> None:
        """Return what was taken and not used."""
        self.level = min(self.burst, self.level + count)

    def wait(self, wanted: int, now: float) -> float:
        """Seconds until a grant of ``wanted`` bytes, or of a quantum, is possible."""
        missing = min(wanted, QUANTUM) - self.available(now)
        return max(0.0, missing / self.rate)


class SharedBucket(TokenBucket):
    """A bucket of several processes: each keeps it by itself, and takes out of it what the others say they spent.

    ``spent`` are bytes of each process, in memory that they share; a process writes its ``own`` place only. Two that
    ask at the same moment may be granted the same bytes: both pay for them after that, so the rate holds.
    """

    def __init__(
        self, rate: float, spent: MutableSequence[float] | memoryview[float], own: int, burst: float = 0.0
    ) -> None:
        super().__init__(rate, burst)
        self._spent = spent
        self._own = own
        self._seen = self._others()

    def available(self, now: float) -> float:
        """Bytes that may pass at ``now``; negative after the others took more than there was."""
        others = self._others()
        self.level -= others - self._seen  # before what time adds: that is bounded by the burst
        self._seen = others
        return super().available(now)

    def take(self, count: float) -> None:
        """Spend bytes that were available."""
        super().take(count)
        self._spent[self._own] += count

    def give_back(self, count: float) -> None:
        """Return what was taken and not used."""
        super().give_back(count)
        self._spent[self._own] -= count

    def _others(self) -> float:
        return sum(self._spent) - self._spent[self._own]


class Budget:
    """Limits that hold together; without any, everything is granted."""

    def __init__(self, buckets: Sequence[TokenBucket] = ()) -> None:
        self._buckets = tuple(buckets)

    def __bool__(self) -> bool:
        """Whether there is any limit."""
        return bool(self._buckets)

    def take(self, wanted: int, now: float) -> int:
        """Bytes that may pass now: ``wanted``, fewer, or 0 (then ``wait``)."""
        granted = wanted
        for bucket in self._buckets:
            granted = min(granted, int(bucket.available(now)))
        if granted < min(wanted, QUANTUM):
            return 0
        for bucket in self._buckets:
            bucket.take(granted)
        return granted

    def take_whole(self, size: int, waiting: int, now: float) -> bool:
        """Spend ``size`` bytes, the first of ``waiting``, or nothing; what they exceed a quantum by is owed.

        Who has more waiting than a quantum needs one, as everybody: many small datagrams get no more than others.
        """
        if any(bucket.available(now) < min(waiting, QUANTUM) for bucket in self._buckets):
            return False
        for bucket in self._buckets:
            bucket.take(size)
        return True

    def give_back(self, count: int) -> None:
        """Return what was granted and not used."""
        for bucket in self._buckets:
            bucket.give_back(count)

    def wait(self, wanted: int, now: float) -> float:
        """Seconds until something may be granted."""
        return max((bucket.wait(wanted, now) for bucket in self._buckets), default=0.0)


class Shaper(Generic[T]):
    """Datagrams before a limit, in their order."""

    def __init__(self, budget: Budget) -> None:
        self.dropped = 0
        self._budget = budget
        self._queue: collections.deque[tuple[T, int, float]] = collections.deque()
        self._waiting = 0

    def add(self, item: T, size: int, now: float) -> None:
        """One of ``size`` bytes has come."""
        self._drop_old(now)
        if self._waiting + size > WAITING:
            self.dropped += 1
            return
        self._waiting += size
        self._queue.append((item, size, now))

    def pop_ready(self, now: float) -> list[T]:
        """Those that may pass now."""
        ready = []
        self._drop_old(now)
        while self._queue and self._budget.take_whole(self._queue[0][1], self._waiting, now):
            ready.append(self._pop())
        return ready

    def wait(self, now: float) -> float | None:
        """Seconds until one more may pass; None when there is none."""
        return self._budget.wait(self._waiting, now) if self._queue else None

    def _drop_old(self, now: float) -> None:
        while self._queue and now - self._queue[0][2] > DELAY:
            self._pop()
            self.dropped += 1

    def _pop(self) -> T:
        item, size, _ = self._queue.popleft()
        self._waiting -= size
        return item
