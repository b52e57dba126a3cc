"""The listening side of a manager, or of a pilot that gives files to others: lets connections in through TLS, as many
at a time as it can greet soon.

A thousand pilots may come in one second, and a handshake takes milliseconds. Were all begun at once, all would end
late, past everybody's patience, and then all come again. So a few are under way at a time and the others wait in the
kernel's queue, in order. Those that keep silent do not count for long, and the oldest of them makes room when there are
too many: strangers cannot shut the door. May not live here: what is said after the handshake.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import weakref
from collections.abc import Callable

from hpcq.secure import secure

log = logging.getLogger("hpcq.door")

HANDSHAKE_TIMEOUT = 10.0
"""Seconds a stranger has to finish the TLS handshake."""

BACKLOG = 4096
"""Connections that may wait in the kernel's queue (it takes fewer where ``net.core.somaxconn`` says so)."""

AT_ONCE = 32
"""Handshakes under way, of those that answer."""

PATIENCE = 1.0
"""Seconds after which a handshake that is not finished no longer counts as one of these."""

UNFINISHED = 512
"""Handshakes under way, the silent ones included."""

RETRY = 1.0
"""Seconds to wait when no connection can be accepted, for want of open files say."""


class Door:
    """Accepts connections on ``listener`` until it is closed; ``make`` gives the protocol of each."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._tls = tls
        self._make = make
        self._shaking: dict[asyncio.Task[None], asyncio.TimerHandle] = {}
        self._fresh: set[asyncio.Task[None]] = set()
        self._guests: weakref.WeakSet[asyncio.Protocol] = weakref.WeakSet()
        self._accepting = False
        self._closed = False
        self.port = int(listener.getsockname()[1])
        listener.setblocking(False)
        self._accept_more()

    def _accept_more(self) -> None:
        if not self._accepting and not self._closed:
            self._accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def _accept_no_more(self) -> None:
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._listener)

    def _accept(self) -> None:
        while len(self._fresh) < AT_ONCE:
            try:
                channel, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no open file, no memory; or an error of that connection, or of the network
                self._accept_no_more()
                log.error("no connection can be accepted: %s; trying again in %.0f s", error.strerror, RETRY)
                self._loop.call_later(RETRY, self._accept_more)
                return
            self._begin(channel)
        self._accept_no_more()

    def _begin(self, channel: socket.socket) -> None:
        if len(self._shaking) >= UNFINISHED:
            next(iter(self._shaking)).cancel()
        task = self._loop.create_task(self._shake_hands(channel))
        self._shaking[task] = self._loop.call_later(PATIENCE, self._counts_no_more, task)
        self._fresh.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._shaking.pop(task).cancel()
        self._counts_no_more(task)

    def _counts_no_more(self, task: asyncio.Task[None]) -> None:
        self._fresh.discard(task)
        self._accept_more()

    async def _shake_hands(self, channel: socket.socket) -> None:
        try:
            _, guest = await secure(channel, self._tls, self._make, timeout=HANDSHAKE_TIMEOUT)
        except OSError as error:  # ssl.SSLError is one
            channel.close()
            log.debug("a stranger was not let in: %s", error)
        except BaseException:
            channel.close()
            raise
        else:
            self._guests.add(guest)

    def shut(self) -> None:
        """Let nobody in any more; those who are in stay."""
        if not self._closed:
            self._accept_no_more()
            self._closed = True
            self._listener.close()

    async def close(self) -> None:
        """Let nobody in, and hang up on everybody, also those still in their handshake."""
        self.shut()
        await _turns()  # a task that is cancelled before it has begun would not close its socket
        for task in list(self._shaking):
            task.cancel()
        if self._shaking:
            await asyncio.wait(list(self._shaking))
        for guest in list(self._guests):
            abort = getattr(guest, "abort", None)
            if abort is not None:
                abort("the queue is closed")
        await _turns()  # the transport is told in one turn of the loop, what is above it in the next


async def _turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def listener(address: str | None, port: int) -> socket.socket:
    """One socket for both families, so that there is one port to publish; IPv4 alone where there is no IPv6.

    Raises:
        OSError: the port is taken, or the address is not this host's.
    """
    if address is None and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"  # noqa: S104 - the other side must know our key
    if address is None:
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(where[:2], family=family, backlog=BACKLOG)
