"""Who of too many strangers has to go: the one who has waited longest of the address that most come from. Pure.

So whoever opens connections without end pushes out his own, not those of pilots on other nodes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Crowd(Generic[T]):
    """Members, each with an address, at most ``limit`` of them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._groups: dict[str, dict[T, None]] = {}  # in the order they came
        self._group_of: dict[T, str] = {}

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._group_of))

    def __len__(self) -> int:
        return len(self._group_of)

    def add(self, member: T, address: str) -> T | None:
        """Take one in; who has to go for it, and is a member no more."""
        group = neighbourhood(address)
        self._groups.setdefault(group, {})[member] = None
        self._group_of[member] = group
        if len(self._group_of) <= self._limit:
            return None
        largest = max(self._groups, key=lambda name: len(self._groups[name]))
        oldest = next(iter(self._groups[largest]))
        self.remove(oldest)
        return oldest

    def remove(self, member: T) -> None:
        """One is gone; those who are none are ignored."""
        group = self._group_of.pop(member, None)
        if group is not None:
            del self._groups[group][member]
            if not self._groups[group]:
                del self._groups[group]


def neighbourhood(address: str) -> str:
    """What one host can have of addresses: itself, by IPv6 its network of 64 bits."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
