"""Between plain sockets: splice(2) through a pipe, so that bytes never enter this process.

A pipe is taken from a pool only while bytes are in it: many idle connections cost none. Beyond the kernel's limits
for pipes of one user a pipe is smaller, and at the limit of open files the connection fails.
"""

from __future__ import annotations

import collections
import fcntl
import os
import socket
from contextlib import suppress

from vpn.relay.bucket import Budget
from vpn.relay.direction import Direction, Owner

PIPE_SIZE = 1 << 20  # bytes: the most an unprivileged user may ask for (/proc/sys/fs/pipe-max-size)
SPARE_PIPES = 16
_MOVE = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Splice(Direction):
    """From one plain socket to another."""

    chunk = PIPE_SIZE

    def __init__(self, source: socket.socket, target: socket.socket, budget: Budget, owner: Owner) -> None:
        super().__init__(source, target, budget, owner)
        self._pipe: tuple[int, int] | None = None
        self._held = 0

    def take_in(self, limit: int) -> int:
        """Move bytes into a pipe."""
        if self._pipe is None:
            self._pipe = take_pipe()
        self._held = os.splice(self.source.fileno(), self._pipe[1], limit, flags=_MOVE)
        return self._held

    def put_out(self) -> None:
        """Move bytes out of the pipe."""
        while self._held and self._pipe is not None:
            moved = os.splice(self._pipe[0], self.target.fileno(), self._held, flags=_MOVE)
            self._held -= moved
            self.carried += moved

    def release(self) -> None:
        """Give the pipe back; what is left in one is nobody's, and no other connection may get it."""
        if self._pipe is not None:
            (close_pipe if self._held else give_pipe)(self._pipe)
            self._pipe = None


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
