"""How the forwarder gets outside: the gateway's relay, or a SOCKS5 server on plain TCP (``ssh -D``, microsocks).

An upstream's ``carry`` does one connection: reach the destination, tell the outcome, pump. What could not be reached
becomes the errno a program would have got from its own connect(). Names are resolved by the gateway; a SOCKS5 server
resolves only what it connects to, so there an address stands for the name (``vpn.shim.names``).
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

from vpn.asking import until_silent
from vpn.config import Credential
from vpn.errors import TunnelError
from vpn.pulse import Pulse
from vpn.relay import dns, socks5
from vpn.relay.dnsclient import DnsClient
from vpn.relay.link import ERRNOS, Link
from vpn.relay.pump import Carried, pump, ready
from vpn.shim.names import BadNameError, NamePool, PoolEmptyError, Seen, plain_name
from vpn.shim.table import Address

T = TypeVar("T")

SERVER_DEADLINE = 20.0  # seconds for the SOCKS server itself to accept a connection and greet
OPENING = 128  # connections to the gateway that are being opened at once
REACH_DEADLINE = 130.0  # seconds for a destination: the kernel's own patience with one that does not answer

Meet = Callable[[], Awaitable[socket.socket]]
"""Completes the program's connect() and gives our end of it; called once, when the destination is reached."""


class UpstreamError(Exception):
    """A destination that was not reached: ``code`` is the errno for the program, ``text`` one line for people."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class NoNameError(Exception):
    """A name without an address; ``status`` is the EAI_… for the program."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Upstream(Protocol):
    """A way outside."""

    lost: asyncio.Future[TunnelError]
    server: str
    cipher: str

    async def open(self) -> None:
        """Show that the server is there and takes us; raises TunnelError or UpstreamError."""

    async def carry(self, address: Address, port: int, meet: Meet) -> None:
        """Reach a destination, ``meet`` the program, and carry bytes until both have ended; raises UpstreamError before
        ``meet`` was called.
        """

    async def close(self) -> None:
        """End it in order."""

    async def addresses_of(self, name: str) -> Sequence[Address]:
        """A name's addresses; raises NoNameError."""

    def name_of(self, address: Address) -> str | None:
        """The name an address was the answer to."""


class Relay:
    """The gateway's relay: TLS, one session, names resolved there."""

    def __init__(
        self, credential: Credential, reconnect_timeout: float, probe_interval: float, *, tls: bool = True
    ) -> None:
        self._link = Link(credential, reconnect_timeout, tls=tls, beat=probe_interval)
        self._resolver = DnsClient(self._link)
        self._opening = asyncio.Semaphore(OPENING)
        self._seen = Seen()
        self.lost = self._link.lost
        self.server = self.cipher = ""

    async def open(self) -> None:
        """Open the session."""
        await self._link.open()
        self.server = f"{self._link.server}:{self._link.credential.relay_port}"
        self.cipher = self._link.cipher

    async def close(self) -> None:
        """End the session."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._link.close()

    async def carry(self, address: Address, port: int, meet: Meet) -> None:
        """One connection."""
        try:
            async with self._opening:
                stream = await self._link.connect(str(address), port)
        except TimeoutError:
            raise UpstreamError(errno.ETIMEDOUT, "the gateway did not answer") from None
        except OSError as error:
            raise UpstreamError(error.errno or errno.ENETDOWN, str(error)) from None
        except (ValueError, TunnelError) as error:
            raise UpstreamError(errno.ENETDOWN, str(error)) from None
        try:
            with await meet() as inner:
                await pump(ready(inner), stream)
        finally:
            stream.close()

    async def addresses_of(self, name: str) -> Sequence[Address]:
        """As DNS says at the gateway, IPv4 first."""
        plain = named(name)
        kinds = [dns.A, dns.AAAA] if self._link.has_ipv6 else [dns.A]
        answers = await asyncio.gather(*(self._resolver.ask(dns.question(plain, kind)) for kind in kinds))
        found = [address for answer in answers if (result := dns.resolved(answer)) for address in result.addresses]
        if not found:
            failed = any(dns.has_failed(answer) for answer in answers)
            raise NoNameError(socket.EAI_AGAIN if failed else socket.EAI_NONAME)
        self._seen.learn(plain, found)
        return found

    def name_of(self, address: Address) -> str | None:
        """From an earlier look-up."""
        return self._seen.name_of(address)


def named(name: str) -> str:
    """A name as it is compared; raises NoNameError."""
    try:
        return plain_name(name)
    except BadNameError:
        raise NoNameError(socket.EAI_NONAME) from None


class PlainSocks:
    """A SOCKS5 server without authentication; bytes go by splice(2). While none come from it, it is greeted every
    ``probe_interval`` seconds; silent for ``patience`` seconds it counts as lost.
    """

    def __init__(self, host: str, port: int, patience: float, probe_interval: float) -> None:
        self._host = host
        self._port = port
        self._patience = patience
        self._interval = probe_interval
        self._carrying: set[Carried] = set()
        self._received = 0  # by connections that have ended
        self._watching: asyncio.Task[None] | None = None
        self._pool = NamePool()
        self.lost: asyncio.Future[TunnelError] = asyncio.get_running_loop().create_future()
        self.server = f"{host}:{port}"
        self.cipher = ""

    async def close(self) -> None:
        """Greet it no more."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def addresses_of(self, name: str) -> Sequence[Address]:
        """One that stands for it."""
        try:
            return [self._pool.address_of(named(name))]
        except PoolEmptyError:
            raise NoNameError(socket.EAI_MEMORY) from None

    def name_of(self, address: Address) -> str | None:
        """What an address stands for."""
        return self._pool.name_of(address)

    async def carry(self, address: Address, port: int, meet: Meet) -> None:
        """One connection."""
        host = self._pool.name_of(address) or address
        async with asyncio.timeout(SERVER_DEADLINE):
            outer = await self._greet()
        with outer:
            try:
                async with asyncio.timeout(REACH_DEADLINE):
                    await request(outer, str(host), port)
            except TimeoutError:
                raise UpstreamError(errno.ETIMEDOUT, "the SOCKS server did not answer") from None
            except OSError as error:
                raise UpstreamError(errno.ENETDOWN, f"the SOCKS server ended the connection: {error}") from None
            carried = Carried()
            self._carrying.add(carried)
            try:
                with await meet() as inner:
                    await pump(ready(inner), ready(outer), carried=carried)
            finally:
                self._carrying.discard(carried)
                self._received += carried.down

    async def open(self) -> None:
        """Greet it, and now and then from now on."""
        async with asyncio.timeout(SERVER_DEADLINE):
            (await self._greet()).close()
        self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        pulse = Pulse(self._interval, self._patience, now=asyncio.get_running_loop().time())
        self.lost.set_result(await until_silent(pulse, self._ask, self._came))

    async def _ask(self) -> None:
        """Raises TunnelError when it does not greet us."""
        try:
            async with asyncio.timeout(SERVER_DEADLINE):
                (await self._greet()).close()
        except UpstreamError as error:
            if not is_shortage(error.__context__):
                raise TunnelError("gateway", error.text) from None
        except TimeoutError:
            text = f"the SOCKS server {self.server} did not answer a greeting in {SERVER_DEADLINE:g} s"
            raise TunnelError("gateway", text) from None

    def _came(self) -> int:
        return self._received + sum(carried.down for carried in self._carrying)

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
            await loop.sock_sendall(sock, socks5.give_greeting(socks5.NO_LOGIN))
            method = await receive(sock, socks5.take_method)
        except BaseException as error:
            sock.close()
            if isinstance(error, ValueError):
                raise UpstreamError(errno.ENETDOWN, f"{where} is no SOCKS5 server") from None
            if isinstance(error, OSError):
                text = f"the SOCKS server {where}: {error.strerror or error}; is it running?"
                raise UpstreamError(errno.ENETDOWN, text) from None
            raise
        if method != socks5.NO_LOGIN:
            sock.close()
            raise UpstreamError(errno.ENETDOWN, f"{where} wants a password; give a SOCKS5 server that wants none")
        return sock


def is_shortage(error: BaseException | None) -> bool:
    """Whether it is this process that lacks something, which says nothing of a server."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


async def request(sock: socket.socket, host: str, port: int) -> None:
    """CONNECT, as RFC 1928 section 4; raises UpstreamError with the server's reply."""
    await asyncio.get_running_loop().sock_sendall(
        sock, socks5.give_request(socks5.Command.CONNECT, socks5.Target(host, port))
    )
    try:
        reply = await receive(sock, socks5.take_reply)
    except ValueError:
        raise UpstreamError(errno.EPROTO, "the SOCKS server's answer is none") from None
    if reply.answer != socks5.Answer.OK:
        code = ERRNOS.get(reply.answer, errno.EHOSTUNREACH)
        raise UpstreamError(code, f"{host} port {port}: SOCKS reply {reply.answer}")


async def receive(sock: socket.socket, take: Callable[[bytes], tuple[T, int] | None]) -> T:
    """The next message as ``take`` finds it, and not a byte of what follows; raises OSError, ValueError."""
    loop = asyncio.get_running_loop()
    data = b""
    while (found := take(data)) is None:
        part = await loop.sock_recv(sock, 1)
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "it closed the connection")
        data += part
    return found[0]
