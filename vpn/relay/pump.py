"""Bytes carried both ways between two connected sockets, with half-close.

``pump`` runs in an event loop and returns when both directions have ended. A direction ends when its source has
no more (its destination is then shut down for writing, and the other direction goes on); an error of either
socket ends both, and both are then reset when they are closed, which is what the two programs would have seen
of each other. A direction whose destination is slow stops reading: nothing piles up here.

Between plain sockets bytes go by splice(2) through a pipe and never enter this process. A pipe is taken from a
pool only while bytes are in it, so that many idle connections cost none.
"""

from __future__ import annotations

import asyncio
import collections
import fcntl
import os
import socket
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Protocol

from vpn.relay.bucket import Budget

PIPE_SIZE = 1 << 20  # bytes: the most an unprivileged user may ask for (/proc/sys/fs/pipe-max-size)
SPARE_PIPES = 16
_MOVE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_UNLIMITED = Budget()


@dataclass
class Carried:
    """Bytes carried so far: ``up`` from the first socket to the second, ``down`` back."""

    up: int = 0
    down: int = 0
    error: str = ""


@dataclass(frozen=True)
class Limits:
    """What may pass each way; unlimited as it is made."""

    up: Budget = _UNLIMITED
    down: Budget = _UNLIMITED


class Direction(Protocol):
    """One way of a pump; made with its callbacks, told to start and to stop."""

    carried: int
    ended: bool

    def start(self) -> None:
        """Begin to wait for bytes."""

    def stop(self) -> None:
        """Release what is held; called once, always."""


class Splice:
    """One direction between plain sockets."""

    def __init__(self, source: socket.socket, target: socket.socket, budget: Budget, owner: Pumping) -> None:
        self.carried = 0
        self.ended = False
        self._source = source
        self._target = target
        self._budget = budget
        self._owner = owner
        self._loop = owner.loop
        self._pipe: tuple[int, int] | None = None
        self._held = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to wait for bytes."""
        self._loop.add_reader(self._source, self._on_readable)

    def stop(self) -> None:
        """Release what is held; called once, always."""
        self._loop.remove_reader(self._source)
        self._loop.remove_writer(self._target)
        if self._timer is not None:
            self._timer.cancel()
        self._release()

    def _on_readable(self) -> None:
        granted = self._budget.take(PIPE_SIZE, self._loop.time())
        if not granted:
            self._pause()
            return
        moved = 0
        try:
            if self._pipe is None:
                self._pipe = take_pipe()
            moved = os.splice(self._source.fileno(), self._pipe[1], granted, flags=_MOVE)
        except (BlockingIOError, InterruptedError):
            self._release()
            return
        except OSError as error:
            self._owner.fail(error)
            return
        finally:
            if moved < granted:
                self._budget.give_back(granted - moved)
        if moved == 0:
            self._release()
            self._finish()
            return
        self._held = moved
        self._flush(waiting=False)

    def _pause(self) -> None:
        self._loop.remove_reader(self._source)
        wait = self._budget.wait(PIPE_SIZE, self._loop.time())
        self._timer = self._loop.call_later(wait, self.start)

    def _on_writable(self) -> None:
        self._flush(waiting=True)

    def _flush(self, *, waiting: bool) -> None:
        assert self._pipe is not None
        try:
            while self._held:
                moved = os.splice(self._pipe[0], self._target.fileno(), self._held, flags=_MOVE)
                self._held -= moved
                self.carried += moved
        except (BlockingIOError, InterruptedError):
            if not waiting:
                self._loop.remove_reader(self._source)
                self._loop.add_writer(self._target, self._on_writable)
            return
        except OSError as error:
            self._owner.fail(error)
            return
        self._release()
        if waiting:
            self._loop.remove_writer(self._target)
            self.start()

    def _release(self) -> None:
        if self._pipe is None:
            return
        if self._held:  # what is left in it is nobody's: no other connection may get it
            close_pipe(self._pipe)
        else:
            give_pipe(self._pipe)
        self._pipe = None

    def _finish(self) -> None:
        self._loop.remove_reader(self._source)
        self.ended = True
        with suppress(OSError):
            self._target.shutdown(socket.SHUT_WR)
        self._owner.on_ended()


class Pumping:
    """The two directions of one pump, and its end."""

    def __init__(self, carried: Carried) -> None:
        self.loop = asyncio.get_running_loop()
        self.carried = carried
        self.done: asyncio.Future[None] = self.loop.create_future()
        self.directions: list[Direction] = []

    def on_ended(self) -> None:
        """A direction has no more bytes."""
        if all(direction.ended for direction in self.directions) and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """A socket broke: both directions end."""
        self.carried.error = self.carried.error or str(error)
        for direction in self.directions:
            direction.ended = True
        self.on_ended()

    def count(self) -> None:
        """Bring the count up to date."""
        self.carried.up, self.carried.down = (direction.carried for direction in self.directions)

    async def run(self) -> Carried:
        """Until both directions have ended; cancelled, both sockets are to be reset."""
        with ExitStack() as stack:
            stack.callback(self.count)
            for direction in self.directions:
                stack.callback(direction.stop)
                direction.start()
            await self.done
        return self.carried


async def pump(
    inner: socket.socket, outer: socket.socket, limits: Limits | None = None, carried: Carried | None = None
) -> Carried:
    """Carry bytes between two connected, non-blocking stream sockets until both directions have ended.

    Neither socket is closed; after an error, or a cancellation, both are set up to be reset by their close. The
    count is kept in ``carried`` when one is given, so that it is known whatever ends the pump.
    """
    pumping = Pumping(carried or Carried())
    limits = limits or Limits()
    pumping.directions = [
        Splice(inner, outer, limits.up, pumping),
        Splice(outer, inner, limits.down, pumping),
    ]
    complete = False
    try:
        await pumping.run()
        complete = not pumping.carried.error
    finally:
        if not complete:
            reset_on_close(inner)
            reset_on_close(outer)
    return pumping.carried


def reset_on_close(sock: socket.socket) -> None:
    """Have the peer see a reset instead of an orderly end (SO_LINGER with no time, socket(7))."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


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


_spare: collections.deque[tuple[int, int]] = collections.deque()


def take_pipe() -> tuple[int, int]:
    """An empty pipe, as large as may be; raises OSError at the limit of open files."""
    if _spare:
        return _spare.pop()
    pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    with suppress(OSError):  # beyond /proc/sys/fs/pipe-user-pages-soft it stays as it is
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
    return pipe


def give_pipe(pipe: tuple[int, int]) -> None:
    """Take back a pipe that is empty."""
    if len(_spare) < SPARE_PIPES:
        _spare.append(pipe)
    else:
        close_pipe(pipe)


def close_pipe(pipe: tuple[int, int]) -> None:
    """Close both ends."""
    os.close(pipe[0])
    os.close(pipe[1])
