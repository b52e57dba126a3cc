"""UDP of a pilot through the gateway: one association, which is one connection of the relay.

Every target gets a connected socket of its own, so that what comes back can only come from there and refusals are
heard of. Targets are decided on like connections, counted, and have a line each in the access log; the least
recently used goes when there are too many. The pilot's limits are those of its connections: what exceeds them is
delayed a little, or lost. The association ends with its connection, or when nothing came from the pilot for ``IDLE``.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import ipaddress
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

from vpn.gateway.outside import Open, Outside, OutsideError
from vpn.relay.bucket import Budget, Shaper
from vpn.relay.socks5 import Datagram, Target, give_datagram, take_datagram
from vpn.relay.tls import TlsStream

IDLE = 300.0  # seconds
TARGETS = 64
UNSENT_LIMIT = 1 << 20  # bytes that may wait for the pilot; more is dropped, as UDP is
SOONEST = 0.001  # seconds between two looks at a limit that binds
_HEADER = 300


class Way:
    """One target of an association."""

    def __init__(self, target: Target, sock: socket.socket, one: Open, stack: AsyncExitStack) -> None:
        self.target = target
        self.sock = sock
        self.one = one
        self.stack = stack


class Limited:
    """One way of an association: what comes is delivered as fast as ``budget`` allows."""

    def __init__(self, budget: Budget, deliver: Callable[[Way, bytes], None]) -> None:
        self._shaper: Shaper[tuple[Way, bytes]] = Shaper(budget)
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, way: Way, data: bytes) -> None:
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


class Association:
    """The datagrams of one inner port."""

    def __init__(self, stream: TlsStream, client: str, outside: Outside) -> None:
        self.stream = stream
        self.client = client
        self.outside = outside
        self.loop = asyncio.get_running_loop()
        self._ways: collections.OrderedDict[Target, Way] = collections.OrderedDict()
        self._back: collections.deque[bytes] = collections.deque()
        self._waiting = 0
        self._wake = asyncio.Event()
        limits = outside.limits_of(client)
        self._up = Limited(limits.up, self._send_out)
        self._down = Limited(limits.down, self._bring_back)

    async def run(self) -> None:
        """Until the pilot ends it, or is silent for long."""
        sender = asyncio.create_task(self._send_back())
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    datagram = await self.stream.receive(take_datagram, 65535 + _HEADER)
                await self._on_datagram(datagram)
        except (TimeoutError, OSError, ValueError):
            pass  # its end, or no datagrams: either way it is over
        finally:
            sender.cancel()
            self._up.close()
            self._down.close()
            await asyncio.gather(sender, return_exceptions=True)
            for way in list(self._ways.values()):
                await self._close(way)

    async def _on_datagram(self, datagram: Datagram) -> None:
        way = self._ways.get(datagram.target)
        if way is None:
            try:
                way = await self._open(datagram.target)
            except OutsideError:
                self._answer(Datagram(datagram.target, b"", True))
                return
        self._ways.move_to_end(datagram.target)
        self._up.put(way, datagram.data)

    def _send_out(self, way: Way, data: bytes) -> None:
        try:
            way.sock.send(data)
            way.one.carried.extra[0] += len(data)
        except OSError as error:
            self._on_error(way, error)

    def _bring_back(self, way: Way, data: bytes) -> None:
        way.one.carried.extra[1] += len(data)
        self._answer(Datagram(way.target, data))

    async def _open(self, target: Target) -> Way:
        while len(self._ways) >= TARGETS:
            await self._close(next(iter(self._ways.values())))
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(self.outside.slot(self.client, target.host, target.port, "udp"))
            address = self.outside.permit(await self.outside.resolve(target.host), target.port)[0]
            one.address = str(address)
            family = socket.AF_INET if ipaddress.ip_address(address).version == 4 else socket.AF_INET6
            sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            try:
                sock.connect((str(address), target.port))
            except OSError as error:
                raise OutsideError("unreachable", f"{address} port {target.port}: {error.strerror}") from None
            self.outside.refuse_own(sock, target.port)
            way = self._ways[target] = Way(target, sock, one, stack.pop_all())
        self.loop.add_reader(way.sock, self._on_readable, way)
        return way

    async def _close(self, way: Way) -> None:
        self._ways.pop(way.target, None)
        self.loop.remove_reader(way.sock)
        await way.stack.aclose()

    def _on_readable(self, way: Way) -> None:
        with suppress(BlockingIOError):
            for _ in range(64):
                try:
                    data = way.sock.recv(65535)
                except BlockingIOError:
                    raise
                except OSError as error:
                    self._on_error(way, error)
                    return
                self._down.put(way, data)

    def _on_error(self, way: Way, error: OSError) -> None:
        if error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
            self._answer(Datagram(way.target, b"", True))

    def _answer(self, datagram: Datagram) -> None:
        data = give_datagram(datagram)
        if self._waiting + len(data) > UNSENT_LIMIT:
            return
        self._waiting += len(data)
        self._back.append(data)
        self._wake.set()

    async def _send_back(self) -> None:
        with suppress(OSError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                data = b"".join(self._back)
                self._back.clear()
                await self.stream.send(data)
                self._waiting -= len(data)
