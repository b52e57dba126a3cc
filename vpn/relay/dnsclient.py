"""Name resolution inside a namespace: what programs ask on port 53, UDP and TCP, goes to the gateway.

All queries share one stream; their ids are replaced by ours, so that two programs with the same id do not meet. A
stream that breaks is opened again with the next query; what was asked on it fails, and programs ask again.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from contextlib import suppress

from vpn.relay import dns, socks5
from vpn.relay.link import Link
from vpn.relay.tls import TlsStream

ANSWER_DEADLINE = 12.0  # seconds; the gateway asks each of its servers for 3
IDLE = 60.0  # seconds a program's TCP connection may be silent


class DnsClient:
    """Asks the gateway."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stream: TlsStream | None = None
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._numbers = itertools.cycle(range(65536))
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, query: bytes) -> bytes:
        """The answer; SERVFAIL when there is none; b"" for what is no query."""
        if len(query) < dns.SHORTEST or len(self._waiting) >= 60000:
            return b""
        number = next(number for number in self._numbers if number not in self._waiting)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                stream = await self._open()
                async with self._sending:
                    await stream.send(socks5.give_message(dns.with_id(query, number)))
                return dns.with_id(await answer, dns.id_of(query))
        except (OSError, TimeoutError, ValueError, asyncio.InvalidStateError):
            return dns.failure(query)
        finally:
            del self._waiting[number]

    async def _open(self) -> TlsStream:
        async with self._opening:
            if self._stream is None:
                self._stream = await self._link.resolve()
                self._reading = asyncio.create_task(self._read(self._stream))
            return self._stream

    async def _read(self, stream: TlsStream) -> None:
        try:
            while True:
                message = await stream.receive(socks5.take_message, 65537)
                waiting = self._waiting.get(dns.id_of(message)) if len(message) >= dns.SHORTEST else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        except (OSError, ValueError):
            pass
        finally:
            self._stream = None
            stream.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError("the gateway's end is gone"))

    def serve_udp(self, sock: socket.socket) -> None:
        """Answer what arrives at a UDP socket."""
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._on_readable, sock)

    def _on_readable(self, sock: socket.socket) -> None:
        with suppress(OSError):
            for _ in range(32):
                query, where = sock.recvfrom(65535)
                self._task(self._answer(sock, query, where))

    async def _answer(self, sock: socket.socket, query: bytes, where: tuple[str, int]) -> None:
        if answer := await self.ask(query):
            with suppress(OSError):
                sock.sendto(dns.truncated(answer, dns.udp_limit(query)), where)

    async def serve_tcp(self, listener: socket.socket) -> None:
        """Answer on TCP connections, for ever."""
        listener.setblocking(False)
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(0.1)  # no descriptors left
                continue
            self._task(self._converse(connection))

    async def _converse(self, connection: socket.socket) -> None:
        loop, data = asyncio.get_running_loop(), b""
        with connection, suppress(OSError, TimeoutError):
            connection.setblocking(False)
            while True:
                while (found := socks5.take_message(data)) is None:
                    async with asyncio.timeout(IDLE):
                        more = await loop.sock_recv(connection, 65535)
                    if not more:
                        return
                    data += more
                data = data[found[1] :]
                answer = await self.ask(found[0])
                if not answer:
                    return
                await loop.sock_sendall(connection, socks5.give_message(answer))

    def _task(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
