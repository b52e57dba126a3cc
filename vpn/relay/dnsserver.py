"""Answers DNS queries on sockets, UDP and TCP (RFC 1035, 4.2), by asking somebody: the shell of a forwarder.

What comes faster than it can be asked is not answered (``LIMIT`` queries at once): programs ask again.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

from vpn.relay import dns, socks5

IDLE = 60.0  # seconds a program's TCP connection may be silent
LIMIT = 4096  # queries and TCP connections at once
ACCEPT_PAUSE = 0.1  # seconds without accepting when there is no descriptor or memory left


class DnsServer:
    """Serves sockets with the answers of ``ask``, which takes a query and gives its answer; b"" is none."""

    def __init__(self, ask: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._ask = ask
        self._tasks: set[asyncio.Task[None]] = set()

    def serve_udp(self, sock: socket.socket) -> None:
        """Answer what arrives at a UDP socket."""
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._on_readable, sock)

    def _on_readable(self, sock: socket.socket) -> None:
        with suppress(OSError):
            for _ in range(32):
                query, where = sock.recvfrom(65535)
                if len(self._tasks) < LIMIT:
                    self._task(self._answer(sock, query, where))

    async def _answer(self, sock: socket.socket, query: bytes, where: tuple[str, int]) -> None:
        if answer := await self._ask(query):
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
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            if len(self._tasks) < LIMIT:
                self._task(self._converse(connection))
            else:
                connection.close()

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
                answer = await self._ask(found[0])
                if not answer:
                    return
                async with asyncio.timeout(IDLE):
                    await loop.sock_sendall(connection, socks5.give_message(answer))

    def _task(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
