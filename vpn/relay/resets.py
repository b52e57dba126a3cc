"""Connections that break while nobody reads them.

A direction whose target takes no more does not read its source, so that nothing piles up; nor does it hear then that
the source was reset. A program that was killed amid an upload is gone, but what the relays and the gateway have
received of it would still be sent: megabytes of each connection, for seconds on a slow link, and for as long as the
target takes nothing, for ever. Without a tunnel the kernel throws such bytes away at once.

epoll(7) tells of an error whatever else is asked for. One descriptor for each event loop asks for nothing else, so
that a connection costs two calls in its life and none for its bytes.
"""

from __future__ import annotations

import asyncio
import select
import socket
import weakref
from collections.abc import Callable


class Resets:
    """The connections of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], object]] = {}
        loop.add_reader(self._epoll, self._tell)

    def watch(self, sock: socket.socket, on_reset: Callable[[], object]) -> None:
        """Call once when this connection breaks, until ``forget``."""
        self._told[sock.fileno()] = on_reset
        self._epoll.register(sock, select.EPOLLET)  # errors are always told; once, though nobody takes them

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed, and its number another's."""
        if self._told.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock)

    def _tell(self) -> None:
        for fd, events in self._epoll.poll(0):
            if events & select.EPOLLERR and (on_reset := self._told.get(fd)) is not None:
                on_reset()


_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Resets] = weakref.WeakKeyDictionary()


def resets() -> Resets:
    """Those of the running event loop."""
    loop = asyncio.get_running_loop()
    found = _of_loops.get(loop)
    if found is None:
        found = _of_loops[loop] = Resets(loop)
    return found
