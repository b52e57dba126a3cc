"""The event loop of processes that carry bytes: readers that are called at once, by the selector itself.

asyncio takes a dozen calls from the kernel's answer to a reader: a list of events, a list of handles, a context for
each. In a process that is busy they cost 10 us. In one that slept for 10 ms, because the other side is that far away,
nothing of them is in the processor's caches any more, and they cost 40 to 70 us. A request and its answer take four
such wake-ups in a tunnel. So what matters for a round trip is how much code and data lies between a wake-up and the
send after it, not how often it could be run in a second.

Measured on a virtual machine of 2 cores, 20 ms away, from the wake-up to recv(2) and from there to send(2), medians:
by asyncio 70 to 100 and 60 to 80 us, here 25 and 50, which is what OpenSSL takes for one byte when it is cold. Without
a delay the relay added 0.14 ms to a round trip, now 0.10; at 20 ms 0.81 and 0.52, where two relays of 40 lines of C
without TLS add 0.25 and two of Python with TLS and nothing else 0.41: the rest is the kernel's, waking four processes
on idle processors. Measure it on an idle machine: with others at work the caches of an idle moment are not seen, nor
the difference.

``watch`` is ``add_reader`` for a callback that is short, raises nothing and awaits nothing. With any other event loop
it is just that.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_BEYOND_WRITING = ~select.EPOLLOUT
_BEYOND_READING = ~select.EPOLLIN


class DirectSelector(selectors.EpollSelector):
    """Epoll, and readers called as soon as it answers; everything else is left to the event loop as ever.

    A direct reader is registered with the event loop too, with a handle as ``data[0]``: by it the event loop says that
    the reader is gone, or another is in its place. What is here is only the shorter way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_error: Callable[[Exception], object] | None = None
        self._readers: dict[int, Callable[[], object]] = {}
        self._handles: dict[int, object] = {}
        inner: Any = self
        self._ask: Callable[[float, int], list[tuple[int, int]]] = inner._selector.poll
        self._keys: dict[int, selectors.SelectorKey] = inner._fd_to_key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Call direct readers; what else is ready."""
        if timeout is None:
            timeout = -1
        elif timeout > 0:
            timeout = math.ceil(timeout * 1e3) * 1e-3  # at least that: epoll_wait(2) counts milliseconds
        else:
            timeout = 0
        readers, ready = self._readers, []
        for fd, event in self._ask(timeout, len(self._keys) or 1):
            if event & _BEYOND_WRITING and (reader := readers.get(fd)) is not None:
                try:
                    reader()
                except Exception as error:
                    if self.on_error is None:
                        raise
                    self.on_error(error)
                found = selectors.EVENT_WRITE if event & _BEYOND_READING else 0
            else:
                found = (event & _BEYOND_READING and selectors.EVENT_WRITE) | (
                    event & _BEYOND_WRITING and selectors.EVENT_READ
                )
            if found and (key := self._keys.get(fd)) is not None:  # None: a reader before has unregistered it
                ready.append((key, found & key.events))
        return ready

    def call_directly(self, fd: int, reader: Callable[[], object]) -> None:
        """From now on call the reader of a descriptor, which is registered already, directly."""
        self._readers[fd], self._handles[fd] = reader, self._keys[fd].data[0]

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As ever; nothing of a descriptor that had the number before is left."""
        key = super().register(fileobj, events, data)
        self._forget(key.fd)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """As ever, and its reader is not called any more."""
        key = super().unregister(fileobj)
        self._forget(key.fd)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """As ever; a reader is called for as long as it is the same one."""
        key = super().modify(fileobj, events, data)
        if key.fd in self._handles and data[0] is not self._handles[key.fd]:
            self._forget(key.fd)
        return key

    def _forget(self, fd: int) -> None:
        self._readers.pop(fd, None)
        self._handles.pop(fd, None)


class DirectLoop(asyncio.SelectorEventLoop):
    """An event loop with direct readers."""

    def __init__(self) -> None:
        self.selector = DirectSelector()
        super().__init__(self.selector)
        self.selector.on_error = self._on_error

    def _on_error(self, error: Exception) -> None:
        self.call_exception_handler({"message": "an error in a direct reader", "exception": error})


def watch(loop: asyncio.AbstractEventLoop, sock: socket.socket, reader: Callable[[], object]) -> None:
    """Call a reader whenever a socket has something, directly where the event loop can; ``remove_reader`` ends it."""
    loop.add_reader(sock, reader)
    if isinstance(loop, DirectLoop):
        loop.selector.call_directly(sock.fileno(), reader)


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` with such a loop."""
    with asyncio.Runner(loop_factory=DirectLoop) as runner:
        return runner.run(main)
