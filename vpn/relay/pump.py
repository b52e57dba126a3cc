"""Bytes carried both ways between two connections, with half-close: the event loop's side of a relay.

``pump`` returns when both directions have ended. A direction ends when its source has no more (its destination is
then told, and the other direction goes on); an error of either connection ends both, and both are then reset when
they are closed, which is what the two programs would have seen of each other. A direction whose destination is
slow stops reading: nothing piles up here. The first end is the program's: when it is reset, what it had sent is not
sent on for longer than the second takes it at once (``resets``). Either end may be a plain socket or a TLS stream, not
both the latter.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from vpn.kernel import RESEND
from vpn.relay.bucket import Budget
from vpn.relay.direction import Direction
from vpn.relay.resets import resets
from vpn.relay.sealed import Seal, Unseal
from vpn.relay.splice import Splice
from vpn.relay.tls import TlsStream

_TCP_RTO_MAX_MS = 44  # linux/tcp.h
_UNLIMITED = Budget()
End = socket.socket | TlsStream


@dataclass(frozen=True)
class Limits:
    """What may pass each way; unlimited as it is made."""

    up: Budget = _UNLIMITED
    down: Budget = _UNLIMITED


class Carried:
    """Bytes carried so far, live: ``up`` from the first end to the second, ``down`` back; ``error`` if it broke."""

    def __init__(self) -> None:
        self.error = ""
        self.extra = [0, 0]
        self.directions: tuple[Direction, Direction] | None = None

    @property
    def up(self) -> int:
        """Bytes from the first end to the second."""
        return self.extra[0] + (self.directions[0].carried if self.directions else 0)

    @property
    def down(self) -> int:
        """Bytes from the second end to the first."""
        return self.extra[1] + (self.directions[1].carried if self.directions else 0)


class Pumping:
    """The two directions of one pump, and its end."""

    def __init__(self, inner: End, outer: End, limits: Limits, carried: Carried) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = self.loop.create_future()
        self._program = socket_of(inner)
        self.carried = carried
        carried.directions = self.directions = (
            self._direction(inner, outer, limits.up),
            self._direction(outer, inner, limits.down),
        )

    def _direction(self, source: End, target: End, budget: Budget) -> Direction:
        if isinstance(source, TlsStream):
            assert isinstance(target, socket.socket)
            return Unseal(source, target, budget, self)
        if isinstance(target, TlsStream):
            return Seal(source, target, budget, self)
        return Splice(source, target, budget, self)

    def on_ended(self) -> None:
        """A direction has carried everything."""
        if all(direction.ended for direction in self.directions) and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """A socket broke: both directions end."""
        self.carried.error = self.carried.error or str(error)
        for direction in self.directions:
            direction.ended = True
        self.on_ended()

    async def run(self) -> None:
        """Until both directions have ended."""
        with ExitStack() as stack:
            for direction in self.directions:
                stack.callback(direction.stop)
            broken = resets()
            broken.watch(self._program, self.directions[0].on_reset)
            stack.callback(broken.forget, self._program)
            for direction in self.directions:
                direction.start()
            await self.done


async def pump(inner: End, outer: End, limits: Limits | None = None, carried: Carried | None = None) -> Carried:
    """Carry bytes between two connected, non-blocking ends until both directions have ended.

    Neither is closed; both are set up to be reset by their close, until everything was carried: also the kernel's,
    when this process is killed. Cut off, a transfer must not look complete to either side. The count is kept in
    ``carried`` when one is given, so that it is known whatever ends the pump.
    """
    pumping = Pumping(inner, outer, limits or Limits(), carried or Carried())
    for end in (inner, outer):
        reset_on_close(end)
    await pumping.run()
    if not pumping.carried.error:
        for end in (inner, outer):
            end_on_close(end)
    return pumping.carried


def reset_on_close(end: End) -> None:
    """Have the peer see a reset instead of an orderly end (SO_LINGER with no time, socket(7))."""
    _set_linger(end, struct.pack("ii", 1, 0))


def end_on_close(end: End) -> None:
    """Have the peer see the orderly end again."""
    _set_linger(end, struct.pack("ii", 0, 0))


def _set_linger(end: End, value: bytes) -> None:
    with suppress(OSError):
        socket_of(end).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)


def socket_of(end: End) -> socket.socket:
    """The socket below."""
    return end.sock if isinstance(end, TlsStream) else end


def resume_soon(sock: socket.socket) -> socket.socket:
    """Between pilot and gateway: after an outage this connection goes on within `RESEND` seconds, where it can."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, RESEND * 1000)
    return sock


def ready(sock: socket.socket) -> socket.socket:
    """A socket as a pump wants it: not blocking, no delay, and dead peers noticed (tcp(7))."""
    sock.setblocking(False)
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    return sock
