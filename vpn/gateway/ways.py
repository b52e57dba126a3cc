"""The ways of a pilot's datagrams to the outside, shared by what the relay brings (``association``) and what arrives at
the gateway's device (``device``).

Every target gets a connected socket of its own, so that what comes back can only come from there and refusals are
heard of: UDP's, or for echo requests a ping socket (icmp(7)), where this host lets its users have them. Targets are
decided on like connections, counted, and have a line each in the access log; the least recently used goes when there
are too many. The pilot's limits are those of its connections: what exceeds them is delayed a little, or lost.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import socket
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from vpn.gateway.outside import Open, Outside, OutsideError
from vpn.gateway.policy import Address
from vpn.relay.bucket import Budget, Shaper

K = TypeVar("K", bound=Hashable)
Protocol = Literal["udp", "icmp"]

SOONEST = 0.001  # seconds between two looks at a limit that binds
BATCH = 64  # datagrams of one target before others have their turn
_REFUSED = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}
_PING_PORT = 9  # ping sockets have none, but only one that is "connected" to a port has a peer to be asked for


@dataclass(eq=False)
class Way(Generic[K]):
    """One target: ``used`` is the event loop's time."""

    key: K
    host: str
    sock: socket.socket
    one: Open
    stack: ExitStack
    used: float = 0.0


class Limited(Generic[K]):
    """One direction: what comes is delivered as fast as ``budget`` allows."""

    def __init__(self, budget: Budget, deliver: Callable[[Way[K], bytes], None]) -> None:
        self._shaper: Shaper[tuple[Way[K], bytes]] = Shaper(budget)
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, way: Way[K], data: bytes) -> None:
        """Take a datagram."""
        self._shaper.add((way, data), len(data), self._loop.time())
        if self._timer is None:
            self._pass_on()

    def close(self) -> None:
        """Forget what waits."""
        if self._timer is not None:
            self._timer.cancel()

    def _pass_on(self) -> None:
        now = self._loop.time()
        for way, data in self._shaper.pop_ready(now):
            if way.sock.fileno() >= 0:  # else it was the least recently used
                self._deliver(way, data)
        wait = self._shaper.wait(now)
        self._timer = None if wait is None else self._loop.call_later(max(wait, SOONEST), self._pass_on)


class Ways(Generic[K]):
    """At most ``most`` ways of one client; ``key`` is what the caller knows one by.

    ``answer`` is called with what came back, ``refuse`` when a target has said that it cannot be reached.
    """

    def __init__(
        self, outside: Outside, client: str, most: int, answer: Callable[[K, bytes], None], refuse: Callable[[K], None]
    ) -> None:
        self._outside = outside
        self._client = client
        self._most = most
        self._answer = answer
        self._refuse = refuse
        self._loop = asyncio.get_running_loop()
        self._ways: collections.OrderedDict[K, Way[K]] = collections.OrderedDict()  # the least recently used first
        limits = outside.limits_of(client)
        self._up: Limited[K] = Limited(limits.up, self._send_out)
        self._down: Limited[K] = Limited(limits.down, self._bring_back)

    def __len__(self) -> int:
        return len(self._ways)

    def __contains__(self, key: K) -> bool:
        return key in self._ways

    def send(self, key: K, data: bytes) -> None:
        """Send a datagram on a way that is open."""
        self._use(self._ways[key])
        self._up.put(self._ways[key], data)

    async def open(self, key: K, host: str, port: int, protocol: Protocol = "udp") -> None:
        """Open a way; raises OutsideError, which is logged. What an address is asked for does not wait."""
        asked = port if protocol == "udp" else None
        with ExitStack() as stack:
            one = stack.enter_context(self._outside.slot(self._client, host, port, protocol))
            address = self._outside.permit(await self._outside.resolve(host), asked)[0]
            one.address = str(address)
            sock = stack.enter_context(_connected(address, port, protocol))
            self._outside.refuse_own(sock, asked)
            way = Way(key, str(sock.getpeername()[0]), sock, one, stack.pop_all(), self._loop.time())
        if (other := self._ways.get(key)) is not None:  # opened meanwhile
            self._close(other)
        while len(self._ways) >= self._most:
            self._close(next(iter(self._ways.values())))
        self._ways[key] = way
        self._loop.add_reader(sock, self._on_readable, way)

    def expire(self, before: float) -> None:
        """Close ways that were not used since a time of the event loop's."""
        while self._ways and (oldest := next(iter(self._ways.values()))).used < before:
            self._close(oldest)

    def close(self) -> None:
        """Close all of them."""
        self._up.close()
        self._down.close()
        for way in list(self._ways.values()):
            self._close(way)

    def _close(self, way: Way[K]) -> None:
        self._ways.pop(way.key, None)
        self._loop.remove_reader(way.sock)
        way.stack.close()

    def _use(self, way: Way[K]) -> None:
        way.used = self._loop.time()
        self._ways.move_to_end(way.key)

    def _send_out(self, way: Way[K], data: bytes) -> None:
        try:
            way.sock.send(data)
            way.one.carried.extra[0] += len(data)
        except OSError as error:
            self._on_error(way, error)

    def _bring_back(self, way: Way[K], data: bytes) -> None:
        way.one.carried.extra[1] += len(data)
        self._answer(way.key, data)

    def _on_readable(self, way: Way[K]) -> None:
        self._use(way)
        for _ in range(BATCH):
            try:
                data, where = way.sock.recvfrom(65535)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_error(way, error)
                return
            if where[0] == way.host:  # the kernel sees to it, but for ping sockets
                self._down.put(way, data)

    def _on_error(self, way: Way[K], error: OSError) -> None:
        if error.errno in _REFUSED:
            self._refuse(way.key)


def _connected(address: Address, port: int, protocol: Protocol) -> socket.socket:
    """A socket that speaks with this target only; raises OutsideError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    number = socket.IPPROTO_ICMP if protocol == "icmp" else 0
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, number)
    except OSError as error:
        if protocol == "icmp" and error.errno in (errno.EACCES, errno.EPERM, errno.EPROTONOSUPPORT):
            advice = "the sysctl net.ipv4.ping_group_range does not name the gateway's group"
            raise OutsideError("denied", f"this host gives nobody a ping socket: {advice}") from None
        raise OutsideError("busy", f"no socket for {address}: {error.strerror}") from None
    try:
        sock.connect((str(address), port if protocol == "udp" else _PING_PORT))
    except OSError as error:
        sock.close()
        raise OutsideError("unreachable", f"{address} port {port}: {error.strerror}") from None
    return sock
