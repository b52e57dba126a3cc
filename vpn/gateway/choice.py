"""Which of several gateways serves the next pilot. Pure: no sockets, no clock.

Wherever a gateway is named, several can be: ``A,B``. A pilot goes to the one with the fewest clients of ours, those
that have just failed last, and next to last the one it had before: a pilot that asks again does so because that one was
of no use to it. None is left out: what is in trouble may be the only one that serves.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

from vpn.errors import UsageError
from vpn.gateway.reference import check_reference

DEFAULT = "default"
TROUBLE = 30.0
"""Seconds for which a gateway that gave no credential is asked last."""


def gateway_names(text: str) -> tuple[str, ...]:
    """The gateways of a comma-separated list, in its order, by name or HOST:PORT; none means the default one.

    Raises:
        UsageError: what can be neither, or is there twice.
    """
    names = tuple(check_reference(name.strip()) for name in text.split(",")) if text else (DEFAULT,)
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"gateway {name!r} is named twice in {text!r}")
    return names


class Choice:
    """Clients of each gateway, and which are in trouble. Times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._clients: collections.Counter[str] = collections.Counter()
        self._trouble: dict[str, float] = {}

    def order(self, names: Sequence[str], before: str, now: float) -> list[str]:
        """The gateways in the order to ask them; ``before`` is the one this client had, empty for none."""
        return sorted(names, key=lambda name: (self.in_trouble(name, now), name == before, self._clients[name]))

    def in_trouble(self, name: str, now: float) -> bool:
        """Whether it failed a short while ago."""
        return self._trouble.get(name, now) > now

    def took(self, name: str) -> None:
        """It is asked for a client, or serves one; each is to be followed by a `left`."""
        self._clients[name] += 1

    def left(self, name: str) -> None:
        """It has one client less."""
        self._clients[name] -= 1
        if not self._clients[name]:
            del self._clients[name]

    def failed(self, name: str, now: float) -> None:
        """It gave no credential."""
        self._trouble[name] = now + TROUBLE

    def served(self, name: str) -> None:
        """It gave one."""
        self._trouble.pop(name, None)
