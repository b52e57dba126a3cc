"""Who has which content, who is getting it, and whom to send the next one to. Pure.

A pilot that asks is told one of: take it from this pilot; the manager gives it; wait; nobody has it. The manager gives
a content itself only while no pilot has it, to `SEEDS` pilots at once: the others wait for the first of these and take
it from them. So however many pilots need a file, it leaves the manager about `SEEDS` times. A pilot gives to
`PER_PEER` others at once. One that did not give (unreachable, evicted) is avoided by whoever met it, so in the end the
manager gives it itself: a network that keeps pilots apart costs time, never a task. One that will not have what it
asked for, or not to give, says so (`Holders.ended`): others wait for those only who may get it.
"""

from __future__ import annotations

from collections import Counter

import msgspec

SEEDS = 3
PER_PEER = 3


class Give(msgspec.Struct, frozen=True):
    """The manager gives it."""


class TakeFrom(msgspec.Struct, frozen=True):
    """That pilot gives it."""

    pilot: str


class Wait(msgspec.Struct, frozen=True):
    """Until somebody has it or is free."""


class Nobody(msgspec.Struct, frozen=True):
    """Nobody has it."""


Answer = Give | TakeFrom | Wait | Nobody


class Holders:
    """The state. A pilot gets a content from one source at a time: ``None`` stands for the manager."""

    def __init__(self, seeds: int = SEEDS, per_peer: int = PER_PEER) -> None:
        self._seeds = seeds
        self._per_peer = per_peer
        self._serving: set[str] = set()
        self._have: dict[bytes, dict[str, None]] = {}
        self._gets: dict[bytes, dict[str, str | None]] = {}
        self._load: Counter[str] = Counter()
        self.given: Counter[bytes] = Counter()

    def pilot_serves(self, pilot: str) -> None:
        """This pilot gives to others."""
        self._serving.add(pilot)

    def pilot_gone(self, pilot: str) -> None:
        """It has and gets nothing any more; what others were getting from it they must ask for again."""
        self._serving.discard(pilot)
        for digest in [d for d, have in self._have.items() if pilot in have]:
            self.lost(pilot, digest)
        for digest in [d for d, gets in self._gets.items() if pilot in gets]:
            self.ended(pilot, digest)

    def gained(self, pilot: str, digest: bytes) -> None:
        """It has it now."""
        self.ended(pilot, digest)
        if pilot in self._serving:
            self._have.setdefault(digest, {})[pilot] = None

    def lost(self, pilot: str, digest: bytes) -> None:
        """It has it no more."""
        have = self._have.get(digest, {})
        have.pop(pilot, None)
        if not have:
            self._have.pop(digest, None)

    def ended(self, pilot: str, digest: bytes) -> None:
        """What it was getting, it gets no more (or has)."""
        gets = self._gets.get(digest, {})
        source = gets.pop(pilot, None)
        if source is not None:
            self._load[source] -= 1
            if not self._load[source]:
                del self._load[source]
        if not gets:
            self._gets.pop(digest, None)

    def ask(self, pilot: str, digest: bytes, avoid: set[str], manager_has: bool) -> Answer:
        """What a pilot that wants it shall do; an earlier attempt of its own is over."""
        self.ended(pilot, digest)
        others = [p for p in self._have.get(digest, ()) if p != pilot and p not in avoid]
        free = [p for p in others if self._load[p] < self._per_peer]
        if free:
            best = min(free, key=lambda p: self._load[p])
            self._load[best] += 1
            self._gets.setdefault(digest, {})[pilot] = best
            return TakeFrom(best)
        gets = self._gets.get(digest, {})
        if others or any(getter not in avoid for getter in gets if gets[getter] is not None):
            return Wait()
        if manager_has:
            if sum(source is None for source in gets.values()) >= self._seeds:
                return Wait()
            self._gets.setdefault(digest, {})[pilot] = None
            self.given[digest] += 1
            return Give()
        return Wait() if gets else Nobody()

    def has(self, digest: bytes) -> bool:
        """Whether any pilot has it."""
        return digest in self._have

    def check(self) -> None:
        """Every invariant, for tests."""
        load = Counter(source for gets in self._gets.values() for source in gets.values() if source is not None)
        assert load == self._load
        assert all(count <= self._per_peer for count in load.values())
        for gets in self._gets.values():
            assert sum(source is None for source in gets.values()) <= self._seeds
        assert all(have for have in self._have.values())
        assert all(gets for gets in self._gets.values())
        assert all(pilot in self._serving for have in self._have.values() for pilot in have)
