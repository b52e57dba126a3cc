"""Which new targets of a client's datagrams are tried. Pure: ``now`` is seconds of any steady clock.

Each target that is tried costs a socket and a line in the access log, and a datagram is sent as easily to ten thousand
as to one. So a burst is tried at once, then so many a second, and the rest is lost, as datagrams are. What was refused
is refused again for a while without asking: a program that sends on and on to where it may not has a line now and then.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable
from typing import Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)

BURST = 1000
PER_SECOND = 100.0
REFUSED_FOR = 5.0  # seconds: what it was refused for may change, as when a name is asked for that a rule names
REMEMBERED = 1024  # refusals at once


class Openings(Generic[K]):
    """Those of one client; a target is what was decided on, without the port it was asked from."""

    def __init__(self) -> None:
        self.lost = 0
        self._left = float(BURST)
        self._at = 0.0
        self._refused: collections.OrderedDict[K, float] = collections.OrderedDict()  # until when, the soonest first

    def admit(self, target: K, now: float) -> Literal["try", "refuse", "lose"]:
        """What to do about a target to which there is no way."""
        while self._refused and next(iter(self._refused.values())) <= now:
            self._refused.popitem(last=False)
        if target in self._refused:
            return "refuse"
        self._left = min(float(BURST), self._left + max(0.0, now - self._at) * PER_SECOND)
        self._at = now
        if self._left < 1:
            self.lost += 1
            return "lose"
        self._left -= 1
        return "try"

    def refused(self, target: K, now: float) -> None:
        """It was tried, and may not be reached."""
        self._refused.pop(target, None)
        self._refused[target] = now + REFUSED_FOR
        if len(self._refused) > REMEMBERED:
            self._refused.popitem(last=False)
