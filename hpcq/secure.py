"""TLS on a connected socket, as one transport of the event loop.

Why not asyncio's: of a task's round trip a good part were its two layers of transports and protocols, gone through for
every message at both ends. Here a readable socket is one callback: receive, decrypt, `data_received`; a write is
encrypted and sent at once.

::

    `secure` --handshake--> OPEN --close(), or the other side ends--> CLOSING --> LOST
                              |                                          ^
                              +--abort(), an error-----------------------+--> LOST

CLOSING: what was written leaves, then our close_notify, then the end of our direction; what still comes is thrown away,
unread by TLS, until the other side ends too, `GOODBYE` seconds at most. Were the socket closed before, the kernel might
answer with a reset, and what we said last be lost with it. LOST: `connection_lost` follows, once.

- Whatever was received is decrypted at once, so nothing waits in TLS while reading is paused.
- What was decrypted before an error is given up before the error is told.
- An end without close_notify counts as an end, as with asyncio: programs are killed, and nobody may be misled. What is
  said here must show by itself where it ends, as frames do.
- What the protocol raises costs its connection, and is told to the loop's exception handler.

May not live here: who may connect (`connection`, `door`), messages.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

CHUNK = 256 * 1024
"""Bytes received at a time, and encrypted before they are sent."""

RECORD = 16 * 1024
"""Bytes that one record of TLS holds at most."""

HIGH, LOW = 256 * 1024, 64 * 1024
"""Bytes not yet sent at which the protocol is to pause, and to go on."""

REPLIES = 4 * 1024 * 1024
"""Bytes not yet sent at which no answer of TLS's own (to a change of keys) is added: it would grow without end."""

GOODBYE = 30.0
"""Seconds to take what was written last, and to end the other direction."""

P = TypeVar("P", bound=asyncio.Protocol)


class _Scratch(threading.local):
    """Where data is received, one for each thread: a program may have several queues, each with a loop of its own.
    What is in it is used up before anything else runs there."""

    def __init__(self) -> None:
        self.room = memoryview(bytearray(CHUNK))


_scratch = _Scratch()


async def secure(
    sock: socket.socket,
    context: ssl.SSLContext,
    make: Callable[[], P],
    *,
    server_hostname: str | None = None,
    timeout: float,
) -> tuple[SecureTransport, P]:
    """Shake hands, as a server if no name is given, and connect the protocol. The socket is the transport's from then
    on, and still the caller's if this raises.

    Raises:
        ssl.SSLError: the other side is not whom the context admits, or does not speak TLS.
        OSError: the connection broke, or nothing was agreed on in ``timeout`` seconds (TimeoutError).
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    with suppress(OSError):  # not TCP. Without, a message waits up to 40 ms for an acknowledgement of the one before
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname is None, server_hostname)
    try:
        async with asyncio.timeout(timeout) as limit:
            await _shake_hands(loop, sock, tls, incoming, outgoing)
    except TimeoutError as error:
        if limit.expired():
            raise TimeoutError(f"no TLS handshake within {timeout:g} s") from error
        raise
    protocol = make()
    return SecureTransport(loop, sock, context, tls, (incoming, outgoing), protocol), protocol


async def _shake_hands(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, tls: ssl.SSLObject, incoming: ssl.MemoryBIO,
    outgoing: ssl.MemoryBIO,
) -> None:  # fmt: skip
    while True:
        done, failure = False, None
        try:
            tls.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            failure = error
        if outgoing.pending:  # with an error: the alert that says why, if it can be said
            try:
                await loop.sock_sendall(sock, outgoing.read())
            except OSError:
                if failure is None:
                    raise
        if failure is not None:
            raise failure
        if done:
            return
        data = await loop.sock_recv(sock, RECORD)
        if not data:
            raise ConnectionResetError("the connection ended during the TLS handshake")
        incoming.write(data)
        await asyncio.sleep(0)  # to receive what is there already lets nobody else run


def _peer(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:  # it has hung up already: reading will tell
        return None


class SecureTransport(asyncio.Transport):
    """One connection after its handshake. Not for an `asyncio.BufferedProtocol`."""

    def __init__(  # noqa: PLR0917 - called by `secure` alone
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        context: ssl.SSLContext,
        tls: ssl.SSLObject,
        bios: tuple[ssl.MemoryBIO, ssl.MemoryBIO],
        protocol: asyncio.BaseProtocol,
    ) -> None:
        super().__init__({"socket": sock, "sslcontext": context, "ssl_object": tls, "peername": _peer(sock)})
        self._loop = loop
        self._sock = sock
        self._tls = tls
        self._incoming, self._outgoing = bios
        self._protocol: Any = protocol
        self._room = _scratch.room
        self._unsent = bytearray()  # while there is some, the loop tells when it can be sent
        self._told_to_pause = False
        self._paused = False  # the protocol takes nothing for now
        self._listening = False  # the loop tells when something can be received
        self._ended = False  # the other side says no more
        self._closing = self._lost = False
        self._goodbye: asyncio.TimerHandle | None = None
        self._tell(protocol.connection_made, self)
        if not self._paused:
            self._listen()
            loop.call_soon(self._decrypt)  # what came together with the handshake

    def _tell(self, what: Callable[..., Any], *args: Any) -> None:
        """Call the protocol."""
        try:
            what(*args)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            context = {"message": "the protocol of a TLS connection failed", "exception": error, "transport": self}
            self._loop.call_exception_handler({**context, "protocol": self._protocol})
            self._lose(error)

    # --- reading ---

    def is_reading(self) -> bool:
        """See `asyncio.ReadTransport`."""
        return not self._paused and not self._closing

    def pause_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        if not self._closing:
            self._paused = True
            self._listen_no_more()

    def resume_reading(self) -> None:
        """See `asyncio.ReadTransport`."""
        if self._paused and not self._closing:
            self._paused = False
            self._listen()
            self._loop.call_soon(self._decrypt)

    def _listen(self) -> None:
        if not self._listening and not self._ended and not self._lost:
            self._listening = True
            self._loop.add_reader(self._sock, self._on_readable)

    def _listen_no_more(self) -> None:
        if self._listening:
            self._listening = False
            self._loop.remove_reader(self._sock)

    def _on_readable(self) -> None:
        try:
            count = self._sock.recv_into(self._room)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if not count:
            self._on_end()
        elif not self._closing:
            self._incoming.write(self._room[:count])
            self._decrypt()

    def _decrypt(self) -> None:
        if self._paused or self._closing:
            return
        tls, incoming = self._tls, self._incoming
        parts: list[bytes] = []
        ended, failure = False, None
        try:
            while incoming.pending or tls.pending():  # asked in vain it would make an exception, at some cost
                if not (data := tls.read(RECORD)):
                    ended = True
                    break
                parts.append(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            failure = error
        if self._outgoing.pending:
            self._reply()
        if parts:
            self._tell(self._protocol.data_received, b"".join(parts))
        if failure is not None:
            self._lose(failure)
        elif ended:
            self._on_end()

    def _reply(self) -> None:
        """Send what TLS itself has to say: an alert, or the answer to a change of keys."""
        if len(self._unsent) > REPLIES:
            self._lose(ConnectionError("the other side asks more of TLS than it takes"))
        else:
            self._flush()

    def _on_end(self) -> None:
        """The other side says no more."""
        if self._ended or self._lost:
            return
        self._ended = True
        self._listen_no_more()
        if self._closing:
            self._leave()
        else:
            self._tell(self._protocol.eof_received)
            self.close()

    # --- writing ---

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """See `asyncio.WriteTransport`; after `close` and the like nothing is written."""
        if self._closing or not data:
            return
        offset, encrypt, view = 0, self._tls.write, memoryview(data).cast("B")
        try:
            while offset < len(view) and not self._lost:
                offset += encrypt(view[offset : offset + CHUNK])  # all at once would be in memory twice
                if self._outgoing.pending > CHUNK:
                    self._flush()
        except ssl.SSLError as error:
            self._lose(error)
            return
        self._flush()
        if len(self._unsent) > HIGH and not self._told_to_pause:
            self._told_to_pause = True
            self._tell(self._protocol.pause_writing)

    def _flush(self) -> None:
        """Send what is encrypted, and keep what cannot be sent now."""
        data = self._outgoing.read()
        if self._lost or not data:
            return
        sent = 0
        if not self._unsent:
            try:
                sent = self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:  # a farewell to who has gone without waiting for it is not missed
                self._lose(None if self._closing and self._ended else error)
                return
            if sent == len(data):
                return
            self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += memoryview(data)[sent:]

    def _on_writable(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if not self._unsent:
            self._loop.remove_writer(self._sock)
        if self._told_to_pause and len(self._unsent) <= LOW:
            self._told_to_pause = False
            self._tell(self._protocol.resume_writing)
        if self._closing:
            self._leave()

    def get_write_buffer_size(self) -> int:
        """See `asyncio.WriteTransport`."""
        return len(self._unsent)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """See `asyncio.WriteTransport`."""
        return LOW, HIGH

    def can_write_eof(self) -> bool:
        """TLS of asyncio cannot either."""
        return False

    # --- the end ---

    def get_protocol(self) -> asyncio.BaseProtocol:
        """See `asyncio.BaseTransport`."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """See `asyncio.BaseTransport`."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """See `asyncio.BaseTransport`."""
        return self._closing

    def close(self) -> None:
        """See `asyncio.BaseTransport`; `connection_lost` comes when the other side has ended, too."""
        if self._closing:
            return
        self._closing = True
        with suppress(ssl.SSLError):  # the other side's end has not come: that is no error here
            self._tls.unwrap()
        self._flush()
        if not self._lost:
            self._goodbye = self._loop.call_later(GOODBYE, self._wait_no_longer)
            self._listen()
            self._leave()

    def _leave(self) -> None:
        """Go on with closing: all is sent, or the other side has ended."""
        if self._lost or self._unsent:
            return
        if self._ended:
            self._lose(None)
            return
        with suppress(OSError):  # it has hung up already
            self._sock.shutdown(socket.SHUT_WR)

    def _wait_no_longer(self) -> None:
        unsent = len(self._unsent)
        self._lose(TimeoutError(f"{unsent} bytes were not taken within {GOODBYE:g} s") if unsent else None)

    def abort(self) -> None:
        """See `asyncio.WriteTransport`; nothing more is said, not even a close_notify."""
        self._lose(None)

    def _lose(self, error: BaseException | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._listen_no_more()
        if self._unsent:
            self._loop.remove_writer(self._sock)
            self._unsent = bytearray()
        if self._goodbye is not None:
            self._goodbye.cancel()
        self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: BaseException | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()
