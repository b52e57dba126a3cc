"""asyncio and TLS driving `protocol`: bytes in, messages up; messages down, bytes out. Decides nothing.

A `Link` is one connection, the same class on both sides. Messages sent during one turn of the event loop leave
together in one write, which is what batches them under load. Its owner gets `on_messages` and, exactly once,
`on_closed` with the reason in words.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any

from hpcq import connection as conn
from hpcq import messages as m
from hpcq.errors import AuthenticationError, ProtocolError, QueueNotFoundError
from hpcq.protocol import Connection, State, frame
from hpcq.reach import reach
from hpcq.secure import secure

log = logging.getLogger("hpcq.transport")

FIRST_WORD_TIMEOUT = 10.0
"""Seconds the other side has to say its first word after the TLS handshake."""

CONNECT_TIMEOUT = 10.0
"""Seconds to reach one address of a manager."""

TURN_TIMEOUT = 60.0
"""Seconds until a manager that was reached has come to us: there may be a thousand before us."""

CHUNK = 256 * 1024
"""Bytes given to TLS at a time."""


class Link(asyncio.Protocol):
    """One connection. ``heard_at`` and ``spoke_at`` are loop times of the last bytes each way."""

    def __init__(
        self,
        connection: Connection[Any],
        on_messages: Callable[[Link, list[Any]], None],
        on_closed: Callable[[Link, str], None],
    ) -> None:
        self.connection = connection
        self._on_messages = on_messages
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytearray] = []
        self._unsent: deque[memoryview] = deque()
        self._paused = False
        self._closing = False
        self._first_word: asyncio.TimerHandle | None = None
        self._reason = ""
        self.peer = ""
        self.heard_at = self.spoke_at = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the clock for the other side's first word."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        address = transport.get_extra_info("peername")
        self.peer = f"{address[0]}:{address[1]}" if address else "?"
        self._first_word = self._loop.call_later(
            FIRST_WORD_TIMEOUT, self.abort, f"no first word within {FIRST_WORD_TIMEOUT:.0f} s"
        )

    def data_received(self, data: bytes) -> None:
        """Hand up what the bytes complete; close on anything that is not our protocol."""
        self.heard_at = self._loop.time()
        try:
            while received := self.connection.receive(data):
                opening = self._first_word is not None
                if self._first_word is not None:
                    self._first_word.cancel()
                    self._first_word = None
                self._on_messages(self, received)
                if not opening or self._transport is None:
                    return
                data = b""  # what came together with the first word
        except ProtocolError as error:
            log.warning("%s sent bytes that are not ours: %s", self.peer, error)
            if self._first_word is not None:  # it has our key: perhaps another version, which understands this much
                self.send(m.Refused(str(error)[:1000]))
                self.close(str(error))
            else:
                self.abort(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner, once."""
        if self._first_word is not None:
            self._first_word.cancel()
            self._first_word = None
        self._transport = None
        reason = self._reason or (f"connection lost: {exc}" if exc else "connection closed by the other side")
        self._on_closed(self, reason)

    @property
    def is_open(self) -> bool:
        """Whether something sent now may still arrive."""
        return self._transport is not None and self.connection.state is not State.FAILED

    def send(self, message: Any, *, now: bool = False) -> None:
        """Send with everything else of this turn of the loop, or ``now``; nothing happens on a closed link."""
        if self._transport is None:
            return
        if not self._outgoing and not now:
            self._loop.call_soon(self.flush)
        self._outgoing.append(frame(message))
        if now:
            self.flush()

    def flush(self) -> None:
        """Send now what is waiting."""
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None:
            self.spoke_at = self._loop.time()
            self._unsent.append(memoryview(outgoing[0] if len(outgoing) == 1 else b"".join(outgoing)))
            self._pump()

    def _pump(self) -> None:
        """Give the transport no more than it can send soon: TLS copies all it is given."""
        while self._unsent and not self._paused and self._transport is not None:
            head = self._unsent.popleft()
            if len(head) > CHUNK:
                self._unsent.appendleft(head[CHUNK:])
            self._transport.write(head[:CHUNK])
        if self._closing and not self._unsent and self._transport is not None:
            self._transport.close()

    def pause_writing(self) -> None:
        """The other side takes no more for now."""
        self._paused = True

    def resume_writing(self) -> None:
        """It takes more."""
        self._paused = False
        self.spoke_at = self._loop.time()
        self._pump()

    def detach(self, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Give the connection up to somebody who reads it as a stream; of use after a first word only."""
        assert self._transport is not None
        self.flush()
        transport, self._transport = self._transport, None
        reader = asyncio.StreamReader(limit, self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return reader, asyncio.StreamWriter(transport, protocol, reader, self._loop)

    def hand_over(self) -> socket.socket:
        """Give up the TCP connection to somebody who begins anew on it; of use after a first word, once answered."""
        assert self._transport is not None
        self.flush()
        transport, self._transport = self._transport, None
        sock: socket.socket = transport.get_extra_info("socket").dup()
        transport.abort()  # says nothing to the other side
        return sock

    def close(self, reason: str) -> None:
        """Close after what was sent has left."""
        self._reason = self._reason or reason
        self._closing = True
        self.flush()
        self._pump()

    def abort(self, reason: str) -> None:
        """Close at once."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()


async def connect(info: conn.ConnectionInfo, make: Callable[[], Link]) -> Link:
    """Connect to the manager of a connection file, at whichever of its addresses it is.

    Raises:
        QueueNotFoundError: none answers.
        AuthenticationError: only such answer whose key is not the queue's, or who do not know ours.
    """
    tls = conn.pilot_tls(info)
    failures = []
    stranger: AuthenticationError | None = None
    async with reach(info.addresses, info.port, CONNECT_TIMEOUT) as reached:
        async for address, found in reached:
            if isinstance(found, str):
                failures.append(f"{address}: {found}")
                continue
            try:
                return await _secured(found, tls, make)
            except ssl.SSLError as error:
                stranger = AuthenticationError(
                    f"whoever listens at {address}:{info.port} is not the manager of queue {info.queue!r} "
                    f"({error.reason or error}); start its program again, or remove its connection file"
                )
                stranger.__cause__ = error
            except (OSError, TimeoutError) as error:
                failures.append(f"{address}: {error or 'no answer'}")
    if stranger is not None:
        raise stranger
    raise QueueNotFoundError(
        f"the manager of queue {info.queue!r} (process {info.pid} on {info.hostname}, port {info.port}) does not "
        f"answer ({'; '.join(failures) or 'it has no address'}): its program has ended or cannot be reached from here"
    )


async def _secured(sock: socket.socket, tls: ssl.SSLContext, make: Callable[[], Link]) -> Link:
    try:
        _, link = await secure(sock, tls, make, server_hostname=conn.MANAGER_NAME, timeout=TURN_TIMEOUT)
    except BaseException:
        sock.close()
        raise
    return link


def manager_side(on_messages: Callable[[Link, list[Any]], None], on_closed: Callable[[Link, str], None]) -> Link:
    """A link for the side that listens."""
    return Link(Connection(m.FirstWord, m.FromPilot), on_messages, on_closed)


def pilot_side(on_messages: Callable[[Link, list[Any]], None], on_closed: Callable[[Link, str], None]) -> Link:
    """A link for a pilot."""
    return Link(Connection(m.FirstAnswer, m.ToPilot), on_messages, on_closed)
