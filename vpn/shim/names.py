"""Names as addresses that stand for them, one for one, for as long as a session lives. Pure.

A program asks for a name's address before it connects, but a SOCKS5 server takes names only to connect to them. So the
program is given an address of 198.18.0.0/15 (RFC 2544: for tests, no host's), and a connection to that address is a
connection to the name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

POOL = ipaddress.ip_network("198.18.0.0/15")
_FIRST = int(POOL.network_address) + 1
CAPACITY = POOL.num_addresses - 2
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")


class BadNameError(ValueError):
    """Not a name a resolver would take (RFC 1123, and the underscore some hosts have)."""


class PoolEmptyError(Exception):
    """As many names were asked for as there are addresses to stand for them."""


def plain_name(name: str) -> str:
    """A name as it is compared: lower case, no dot at its end; raises BadNameError."""
    plain = name.lower().removesuffix(".")
    if len(plain) > 253 or _NAME.fullmatch(plain) is None:
        raise BadNameError(f"{name[:80]!r} is not a host name")
    return plain


class NamePool:
    """The addresses given so far."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._by_name: dict[str, int] = {}
        self._names: list[str] = []

    def address_of(self, name: str) -> ipaddress.IPv4Address:
        """The address that stands for a name; raises BadNameError or PoolEmptyError."""
        plain = plain_name(name)
        number = self._by_name.get(plain)
        if number is None:
            if len(self._names) >= self._capacity:
                raise PoolEmptyError
            number = self._by_name[plain] = len(self._names)
            self._names.append(plain)
        return ipaddress.IPv4Address(_FIRST + number)

    def name_of(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
        """The name an address stands for; None for an address that stands for none."""
        plain = address.ipv4_mapped or address if address.version == 6 else address
        number = int(plain) - _FIRST
        return self._names[number] if plain.version == 4 and 0 <= number < len(self._names) else None


class Seen:
    """Which name an address was last the answer to, for reverse look-ups; the oldest are forgotten."""

    def __init__(self, limit: int = 65536) -> None:
        self._limit = limit
        self._names: dict[ipaddress.IPv4Address | ipaddress.IPv6Address, str] = {}

    def learn(self, name: str, addresses: Iterable[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
        """A look-up had these answers."""
        for address in addresses:
            self._names.pop(address, None)
            self._names[address] = name
        while len(self._names) > self._limit:
            del self._names[next(iter(self._names))]

    def name_of(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
        """The name, if there was one."""
        return self._names.get(address)
