"""Where pilots may go: a gateway's allow-list, decided on addresses. Pure: no look-ups, no clock.

Rules are text: ``host.example.org:1094``, ``*.cern.ch``, ``192.0.2.0/24:443``, ``[2001:db8::]/32:1094-1099``,
``default`` (every public address), each with a port, a range of ports, or none for all. Without rules, ``default``
holds. A name matches by the names an address was *resolved from here* (``Names``): what a client claims does not
count, so a name that is made to point elsewhere gains nothing.

Denied whatever the names say: this host's own addresses, loopback, link-local and multicast, and the private
ranges, in which a site keeps what is not meant for the outside. A rule that names such a network itself
(``10.1.0.0/16``) opens it; one that names a host (``se.site.example:1094``) opens private ranges only; ``*``
opens none. IPv4 addresses inside IPv6 ones (mapped, 6to4, NAT64, Teredo) are looked at as well.
"""

from __future__ import annotations

import collections
import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from vpn.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAMES_LIMIT = 65536  # addresses with a remembered name
LINGER = 3600.0  # seconds beyond its time to live that an answer counts: programs keep addresses longer than that

_NEVER = (
    "0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4",
    "::/128", "::1/128", "fe80::/10", "ff00::/8",
)  # fmt: skip
_PRIVATE = (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15",
    "fc00::/7", "fec0::/10", "64:ff9b:1::/48",
)  # fmt: skip
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_RULE = re.compile(
    r"(?:\[(?P<six>[^\]]+)\](?P<bits>/\d{1,3})?|(?P<host>[^:\[\]]+)|(?P<bare>[^\[\]]*:[^\[\]]*:[^\[\]]*))"
    r"(?::(?P<low>\d{1,5})(?:-(?P<high>\d{1,5}))?)?"
)


@dataclass(frozen=True)
class Verdict:
    """Whether a connection may be made; ``reason`` says why not."""

    allowed: bool
    reason: str = ""


@dataclass(frozen=True)
class Rule:
    """One line of the allow-list: a network, a name (``.x`` for all below x), or neither (every public address)."""

    text: str
    low: int = 1
    high: int = 65535
    network: Network | None = None
    name: str = ""

    def matches(self, address: Address, port: int | None, names: Collection[str]) -> bool:
        """Whether it speaks of this destination; ``names`` are the address's own, ``port`` None is any."""
        if port is not None and not self.low <= port <= self.high:
            return False
        if self.network is not None:
            return address in self.network
        return not self.name or any(self.matches_name(name) for name in names)

    def matches_name(self, name: str) -> bool:
        """Whether it names this name."""
        name = plain_name(name)
        return name == self.name or (self.name.startswith(".") and name.endswith(self.name))


class _Ground(NamedTuple):
    """A network that is denied unless a rule opens it."""

    network: Network
    why: str
    opened_by_name: bool

    def opened(self, rule: Rule) -> bool:
        if rule.network is not None:
            return rule.network.version == self.network.version and rule.network.subnet_of(self.network)  # type: ignore[arg-type]
        return self.opened_by_name and bool(rule.name) and not rule.name.startswith(".")


def _own(address: Address) -> _Ground:
    return _Ground(ipaddress.ip_network(address), "the gateway's own host", False)


class Policy:
    """Rules, and what is denied here; ``own`` are this host's addresses. Raises UsageError for a bad rule."""

    def __init__(self, rules: Iterable[str] = (), own: Iterable[str] = ()) -> None:
        self.rules = tuple(parse_rule(text) for text in rules) or (Rule("default"),)
        self._grounds = tuple(
            [_Ground(ipaddress.ip_network(text), "an address only for this host or link", False) for text in _NEVER]
            + [_Ground(ipaddress.ip_network(text), "a private address of the site", True) for text in _PRIVATE]
            + [_own(ipaddress.ip_address(text.partition("%")[0])) for text in dict.fromkeys(own)]
        )

    def learn_own(self, address: Address) -> None:
        """This host has got another address since."""
        ground = _own(plain_address(address))
        if ground not in self._grounds:
            self._grounds = (*self._grounds, ground)

    def decide(self, address: Address, port: int | None, names: Collection[str] = ()) -> Verdict:
        """Whether a pilot may connect to this address and port; with None, whether it may ping the address, which it
        may where any port is open.
        """
        address = plain_address(address)
        if port is not None and not 0 < port < 65536:
            return Verdict(False, f"{port} is not a port")
        matching = [rule for rule in self.rules if rule.matches(address, port, names)]
        where = "" if port is None else f" port {port}"
        if not matching:
            return Verdict(False, f"{_shown(address, names)}{where} is not on the gateway's allow-list")
        for ground in self._grounds:
            if any(inner in ground.network for inner in _faces(address)) and not any(map(ground.opened, matching)):
                advice = f"if it is meant: --allow {address}{'' if port is None else f':{port}'}"
                return Verdict(False, f"{_shown(address, names)} is {ground.why}; {advice}")
        return Verdict(True)

    @property
    def grounds(self) -> list[Network]:
        """Networks that are denied unless a rule opens them."""
        return [ground.network for ground in self._grounds]

    def cares(self, name: str) -> bool:
        """Whether a rule names it, so that its addresses must be remembered."""
        return any(rule.name and rule.matches_name(name) for rule in self.rules)


class Names:
    """Which names this gateway's own resolver gave for an address; bounded, the oldest forgotten first."""

    def __init__(self, limit: int = NAMES_LIMIT) -> None:
        self._limit = limit
        self._names: collections.OrderedDict[Address, dict[str, float]] = collections.OrderedDict()

    def learn(self, name: str, addresses: Iterable[Address], ttl: float, now: float) -> None:
        """An answer that was received at ``now`` (seconds) and counts for ``ttl`` of them, and ``LINGER``."""
        for address in addresses:
            known = self._names.setdefault(plain_address(address), {})
            known[plain_name(name)] = max(now + ttl + LINGER, known.get(plain_name(name), 0.0))
            self._names.move_to_end(plain_address(address))
            while len(self._names) > self._limit:
                self._names.popitem(last=False)

    def of(self, address: Address, now: float) -> frozenset[str]:
        """The names of an address that count at ``now``."""
        known = self._names.get(plain_address(address))
        if known is None:
            return frozenset()
        for name in [name for name, until in known.items() if until <= now]:
            del known[name]
        if not known:
            del self._names[plain_address(address)]
        return frozenset(known)


def parse_rule(text: str) -> Rule:
    """One rule; raises UsageError naming it."""
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise UsageError(_complaint(text))
    low = int(match["low"] or 1)
    high = int(match["high"] or match["low"] or 65535)
    if not 0 < low <= high < 65536:
        raise UsageError(f"--allow {text}: {match['low']}-{match['high'] or match['low']} are not ports (1…65535)")
    target = match["host"] or match["bare"] or f"{match['six']}{match['bits'] or ''}"
    if target in ("default", "*"):
        return Rule(text, low, high)
    try:
        return Rule(text, low, high, ipaddress.ip_network(target, strict=False))
    except ValueError:
        pass
    if match["host"] is None or _NAME.fullmatch(target) is None or target.rpartition(".")[2].isdigit():
        raise UsageError(_complaint(text))
    return Rule(text, low, high, name=plain_name(target.removeprefix("*")))


def plain_name(name: str) -> str:
    """A host name as it is compared: lower case, no dot at its end."""
    return name.rstrip(".").lower()


def plain_address(address: Address) -> Address:
    """IPv4 for an IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2); no zone."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or (ipaddress.IPv6Address(int(address)) if address.scope_id else address)
    return address


def _faces(address: Address) -> Iterator[Address]:
    """The address, and the IPv4 addresses that packets to it may end at."""
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        if address.sixtofour is not None:
            yield address.sixtofour
        if address.teredo is not None:
            yield from address.teredo
        if address in _NAT64 or int(address) >> 32 == 0:
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _shown(address: Address, names: Collection[str]) -> str:
    return f"{address} ({', '.join(sorted(names))})" if names else str(address)


def _complaint(text: str) -> str:
    return f"--allow {text!r} is none of HOST[:PORT], *.DOMAIN[:PORT], NETWORK[:PORT], default[:PORT]"
