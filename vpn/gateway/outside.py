"""Connections from the gateway's host to the outside, made for pilots: policy, names, limits, log.

``Outside.connect`` gives a connected socket; ``Outside.carry`` does the whole of a connection: room for it under
the limits, connect, pump, a line in the access log. Names are resolved here, and what is decided on, and then
connected to, are the addresses that came out: a name cannot change its meaning in between. Addresses are tried as
RFC 8305 says ("happy eyeballs"): the families in turn, the next 250 ms after the one before, first come first kept.

``OutsideError`` is every way this can fail; ``kind`` is what a proxy tells its client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from vpn.gateway.accesslog import Access, AccessLog, now_text
from vpn.gateway.ledger import Ledger
from vpn.gateway.policy import Address, Names, Policy, plain_name
from vpn.relay.bucket import Budget, TokenBucket
from vpn.relay.pump import Carried, End, Limits, pump, ready, reset_on_close

Kind = Literal["denied", "unresolved", "refused", "unreachable", "timeout", "busy", "failed"]

STAGGER = 0.25  # seconds between two attempts (RFC 8305, section 5)
CONNECT_DEADLINE = 30.0
RESOLVE_DEADLINE = 15.0
LOOK_UPS = 32  # at once; a name server that does not answer holds one for its time
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL}


class OutsideError(Exception):
    """A connection that was not made; ``message`` is one line for the log."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message


@dataclass(frozen=True)
class OutsideLimits:
    """What pilots may use: connections at once, and bytes a second each way (0: no limit)."""

    connections: int = 20_000
    connections_per_client: int = 4_000
    rate: float = 0.0
    rate_per_client: float = 0.0


@dataclass
class Usage:
    """One client: connections open now, those that ended, bytes of the latter, and what it may still use."""

    limits: Limits
    open: set[Open] = field(default_factory=set)
    connections: int = 0
    up: int = 0
    down: int = 0
    is_over: bool = False

    def total(self) -> tuple[int, int]:
        """Bytes up and down, open connections included."""
        return (
            self.up + sum(one.carried.up for one in self.open),
            self.down + sum(one.carried.down for one in self.open),
        )


@dataclass(eq=False)
class Open:
    """One connection, from its request to its line in the log."""

    client: str
    host: str
    port: int
    began: float
    at: str
    carried: Carried = field(default_factory=Carried)
    address: str = ""
    outcome: str = "ok"


class Outside:
    """The way out for every pilot of a gateway. ``ledger``: ``limits.rate`` is also of other processes."""

    def __init__(
        self,
        policy: Policy,
        log: AccessLog | None = None,
        limits: OutsideLimits | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.policy = policy
        self.names = Names()  # shared with who resolves
        self.usage: dict[str, Usage] = {}
        self._log = log
        self._limits = limits or OutsideLimits()
        self._open = 0
        self._total = _total(self._limits.rate, ledger)

    async def connect(self, client: str, host: str, port: int) -> socket.socket:
        """A connected socket, ready for a pump; raises OutsideError, which is logged."""
        with self.slot(client, host, port) as one:
            return await self.reach(one)

    async def carry(
        self, client: str, inner: End, host: str, port: int, connected: Callable[[], Awaitable[None]] | None = None
    ) -> Carried:
        """Connect, say so by ``connected``, and pump until both sides have ended; raises OutsideError.

        ``inner`` is left to the caller to close; it is then reset where the outside was, and a plain socket also
        where nothing was reached.
        """
        try:
            with self.slot(client, host, port) as one, await self.reach(one) as outer:
                if connected is not None:
                    await connected()
                return await pump(inner, outer, self.usage[client].limits, one.carried)
        except OutsideError:
            if isinstance(inner, socket.socket):
                reset_on_close(inner)
            raise

    @contextmanager
    def slot(self, client: str, host: str, port: int, protocol: str = "tcp") -> Iterator[Open]:
        """Room for one connection of a client, counted and logged; raises OutsideError when there is none."""
        one = Open(client, host, port, time.monotonic(), now_text())
        usage = self._usage(client)
        usage.open.add(one)
        self._open += 1
        try:
            if len(usage.open) > self._limits.connections_per_client or self._open > self._limits.connections:
                raise OutsideError(
                    "busy", f"{client} has {len(usage.open) - 1} connections open, all have {self._open - 1}"
                )
            yield one
        except OutsideError as refusal:
            one.outcome = f"{refusal.kind}: {refusal.message}"
            raise
        except asyncio.CancelledError:
            one.outcome = "cut off"
            raise
        finally:
            self._open -= 1
            self._close(usage, one, protocol)

    async def reach(self, one: Open) -> socket.socket:
        """Resolve, decide, connect; raises OutsideError."""
        allowed = self.permit(await self.resolve(one.host), one.port)
        sock = await connect_first(allowed, one.port)
        one.address = str(sock.getpeername()[0])
        try:
            self.refuse_own(sock, one.port)
        except OutsideError:
            sock.close()
            raise
        return ready(sock)

    def refuse_own(self, sock: socket.socket, port: int | None) -> None:
        """Raise OutsideError when a connected socket ended at this host itself, at an address it has got since the
        policy was made: what comes from an address to the same one has not left.
        """
        here, there = (str(name[0]) for name in (sock.getsockname(), sock.getpeername()))
        if here == there:
            address = ipaddress.ip_address(there.partition("%")[0])
            self.policy.learn_own(address)
            self.permit([(address, self.names.of(address, time.monotonic()))], port)

    async def resolve(self, host: str) -> list[tuple[Address, frozenset[str]]]:
        """The addresses of a host and the names each is known by here; raises OutsideError."""
        with suppress(ValueError):
            address = ipaddress.ip_address(host)
            return [(address, self.names.of(address, time.monotonic()))]
        name = plain_name(host)
        found = await _look_up(name)
        if self.policy.cares(name):
            self.names.learn(name, found, 0.0, time.monotonic())
        return [(address, frozenset({name})) for address in found]

    def permit(self, found: Sequence[tuple[Address, frozenset[str]]], port: int | None) -> list[Address]:
        """Those that pilots may connect to (``port`` None: ping); raises OutsideError when there is none."""
        verdicts = [(address, self.policy.decide(address, port, names)) for address, names in found]
        allowed = [address for address, verdict in verdicts if verdict.allowed]
        if not allowed:
            raise OutsideError("denied", verdicts[0][1].reason)
        return allowed

    def forget(self, client: str) -> None:
        """Drop the figures of a client that is gone for good, now or when the last of its connections has ended."""
        usage = self.usage.get(client)
        if usage is not None:
            usage.is_over = True
            self._drop(client, usage)

    def _drop(self, client: str, usage: Usage) -> None:
        if usage.is_over and not usage.open:
            self.usage.pop(client, None)

    def limits_of(self, client: str) -> Limits:
        """What this client may still send and receive."""
        return self._usage(client).limits

    def _usage(self, client: str) -> Usage:
        usage = self.usage.get(client)
        if usage is None:
            own = self._limits.rate_per_client
            up, down = (Budget([*_buckets(own), *total]) for total in self._total)
            usage = self.usage[client] = Usage(Limits(up, down))
        return usage

    def _close(self, usage: Usage, one: Open, protocol: str) -> None:
        usage.open.discard(one)
        usage.connections += 1
        usage.up += one.carried.up
        usage.down += one.carried.down
        self._drop(one.client, usage)
        if self._log is not None:
            outcome = one.outcome if one.outcome != "ok" else one.carried.error or "ok"
            seconds = round(time.monotonic() - one.began, 3)
            self._log.record(
                Access(
                    one.at, one.client, one.host, one.port, one.address, outcome,
                    one.carried.up, one.carried.down, seconds, protocol,
                )
            )  # fmt: skip


def own_addresses() -> list[str]:
    """Every address of this host, IPv4 and IPv6."""
    import psutil  # noqa: PLC0415  (only the daemon needs it)

    families = (socket.AF_INET, socket.AF_INET6)
    return [
        entry.address.partition("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in families
    ]


async def connect_first(addresses: Sequence[Address], port: int, deadline: float = CONNECT_DEADLINE) -> socket.socket:
    """Connect to the first of these that answers; raises OutsideError with what the last ones said."""
    attempts: dict[asyncio.Task[socket.socket], Address] = {}
    problems: list[tuple[Address, OSError]] = []
    waiting = list(reversed(_in_turn(addresses)))
    try:
        async with asyncio.timeout(deadline):
            while waiting or attempts:
                if waiting:
                    address = waiting.pop()
                    attempts[asyncio.create_task(_connect(address, port))] = address
                pause = STAGGER if waiting else None
                done, _ = await asyncio.wait(attempts, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    address = attempts.pop(task)
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not isinstance(error, OSError):
                        raise error
                    problems.append((address, error))
    except TimeoutError:
        raise OutsideError("timeout", f"{addresses[0]} port {port} did not answer within {deadline:g} s") from None
    finally:
        await _abandon(attempts)
    raise _explain(problems, port)


async def _abandon(attempts: Iterable[asyncio.Task[socket.socket]]) -> None:
    tasks = list(attempts)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, socket.socket):
            result.close()


async def _connect(address: Address, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (str(address), port))
    except BaseException:
        sock.close()
        raise
    return sock


def _in_turn(addresses: Sequence[Address]) -> list[Address]:
    """The families in turn, the first one's first (RFC 8305, section 4)."""
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    turns = [each for pair in zip(first, second, strict=False) for each in pair]
    return [*turns, *first[len(second) :], *second[len(first) :]]


def _explain(problems: Sequence[tuple[Address, OSError]], port: int) -> OutsideError:
    address, error = problems[0]
    text = f"{address} port {port}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno == errno.ECONNREFUSED:
        return OutsideError("refused", text)
    if error.errno in _UNREACHABLE:
        return OutsideError("unreachable", text)
    return OutsideError("timeout" if error.errno == errno.ETIMEDOUT else "failed", text)


_resolvers = concurrent.futures.ThreadPoolExecutor(LOOK_UPS, "look-up")


def _ask_resolver(name: str) -> list[Any]:
    return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)


async def _look_up(name: str) -> list[Address]:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_DEADLINE):
            found = await loop.run_in_executor(_resolvers, _ask_resolver, name)
    except (OSError, UnicodeError) as error:
        raise OutsideError("unresolved", f"{name}: {getattr(error, 'strerror', None) or error}") from None
    except TimeoutError:
        raise OutsideError("unresolved", f"{name}: no answer from the name servers in {RESOLVE_DEADLINE:g} s") from None
    addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
    if not addresses:
        raise OutsideError("unresolved", f"{name} has no address")
    return list(dict.fromkeys(addresses))


def _total(rate: float, ledger: Ledger | None) -> tuple[list[TokenBucket], list[TokenBucket]]:
    if rate and ledger is not None:
        up, down = ledger.buckets(rate)
        return [up], [down]
    return _buckets(rate), _buckets(rate)


def _buckets(rate: float) -> list[TokenBucket]:
    return [TokenBucket(rate)] if rate else []
