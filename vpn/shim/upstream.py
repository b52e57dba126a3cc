"""How the forwarder gets outside: a SOCKS5 server on plain TCP (``ssh -D``, ocproxy, microsocks), RFC 1928 and 1929.

An upstream's ``carry`` does one connection: reach the destination, tell the outcome, pump. What could not be reached
becomes the errno a program would have got from its own connect().
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

from vpn.relay.pump import pump, ready
from vpn.shim.table import Address

SERVER_DEADLINE = 20.0  # seconds for the SOCKS server itself to accept a connection and greet
REACH_DEADLINE = 130.0  # seconds for a destination: the kernel's own patience with one that does not answer

Meet = Callable[[], Awaitable[socket.socket]]
"""Completes the program's connect() and gives our end of it; called once, when the destination is reached."""


class UpstreamError(Exception):
    """A destination that was not reached: ``code`` is the errno for the program, ``text`` one line for people."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Upstream(Protocol):
    """A way outside."""

    async def carry(self, host: str | Address, port: int, meet: Meet) -> None:
        """Reach a destination, ``meet`` the program, and carry bytes until both have ended; raises UpstreamError before
        ``meet`` was called.
        """

    async def prove(self) -> None:
        """Show that the server is there and takes us; raises UpstreamError."""


_REPLIES = {
    1: errno.EHOSTUNREACH,
    2: errno.EACCES,
    3: errno.ENETUNREACH,
    4: errno.EHOSTUNREACH,
    5: errno.ECONNREFUSED,
    6: errno.ETIMEDOUT,
    7: errno.EOPNOTSUPP,
    8: errno.EAFNOSUPPORT,
}


class PlainSocks:
    """A SOCKS5 server without authentication; bytes go by splice(2)."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    async def carry(self, host: str | Address, port: int, meet: Meet) -> None:
        """One connection."""
        async with asyncio.timeout(SERVER_DEADLINE):
            outer = await self._greet()
        with outer:
            try:
                async with asyncio.timeout(REACH_DEADLINE):
                    await request(outer, host, port)
            except TimeoutError:
                raise UpstreamError(errno.ETIMEDOUT, "the SOCKS server did not answer") from None
            except OSError as error:
                raise UpstreamError(errno.ENETDOWN, f"the SOCKS server ended the connection: {error}") from None
            with await meet() as inner:
                await pump(ready(inner), ready(outer))

    async def prove(self) -> None:
        """Greet it."""
        async with asyncio.timeout(SERVER_DEADLINE):
            (await self._greet()).close()

    async def _greet(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        where = f"{self._host} port {self._port}"
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            family, _, _, _, address = found[0]
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise UpstreamError(errno.ENETDOWN, f"the SOCKS server {where}: {error.strerror}") from None
        try:
            await loop.sock_connect(sock, address)
            await loop.sock_sendall(sock, b"\5\1\0")
            answer = await receive(sock, 2)
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                text = f"the SOCKS server {where}: {error.strerror or error}; is it running?"
                raise UpstreamError(errno.ENETDOWN, text) from None
            raise
        if answer != b"\5\0":
            sock.close()
            what = "wants a password" if answer[0] == 5 else "is no SOCKS5 server"
            raise UpstreamError(errno.ENETDOWN, f"{where} {what}; give one that takes connections of this user without")
        return sock


async def request(sock: socket.socket, host: str | Address, port: int) -> None:
    """CONNECT, as RFC 1928 section 4; raises UpstreamError with the server's reply."""
    if isinstance(host, ipaddress.IPv4Address):
        where = b"\1" + host.packed
    elif isinstance(host, ipaddress.IPv6Address):
        where = b"\4" + host.packed
    else:
        name = host.encode("ascii")
        where = b"\3" + bytes([len(name)]) + name
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"\5\1\0" + where + port.to_bytes(2, "big"))
    version, reply, _, kind = await receive(sock, 4)
    if version != 5 or kind not in (1, 3, 4):
        raise UpstreamError(errno.EPROTO, "the SOCKS server's answer is none")
    size = {1: 4, 4: 16}.get(kind) or (await receive(sock, 1))[0]
    await receive(sock, size + 2)
    if reply:
        raise UpstreamError(_REPLIES.get(reply, errno.ENETDOWN), f"{host} port {port}: SOCKS reply {reply}")


async def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly this many bytes; raises ConnectionError at an earlier end."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        data += part
    return data
