"""The data plane of mode ``relay``: a process outside the namespace that carries what programs inside send.

Runs as ``python -c … vpn.relay.plane SOCKET``; its settings, with the credential, come on standard input, the
namespace's sockets by the socket when they exist: until then it opens its session. It writes one line of JSON to
standard output when it serves, and another when the session is lost. It ends, and the session in order, by SIGTERM
or when its socket ends; killed by its keeper's death otherwise.

TCP: accepted on the listener that the namespace's nat redirects to, the destination asked of the kernel, reached
through the gateway (or, in ``direct``, from this host), and pumped. A program whose destination was not reached
sees its connection reset.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from vpn.config import PROBE_INTERVAL, Credential
from vpn.errors import TunnelError
from vpn.relay.datagrams import Datagrams, Network, is_within
from vpn.relay.dnsclient import DnsClient
from vpn.relay.dnsserver import DnsServer
from vpn.relay.link import Link
from vpn.relay.loop import run_loop
from vpn.relay.nolink import NoLink
from vpn.relay.pump import pump, ready, reset_on_close
from vpn.spawn import raise_file_limit

log = logging.getLogger("vpn.relay")

DIRECT_DEADLINE = 30.0
OPENING = 128  # connections to the gateway that are being opened at once
_ORIGINAL_DST = 80  # SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST (linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h)


class Settings(msgspec.Struct, frozen=True):
    """What the session tells; without a credential there is no gateway, and only ``direct`` is served."""

    credential: bytes
    reconnect_timeout: float = 60.0
    direct: tuple[str, ...] = ()
    tls: bool = True
    probe_interval: float = PROBE_INTERVAL


class Sockets(msgspec.Struct, frozen=True):
    """What the descriptors sent along are: numbers of them of each kind, in this order."""

    tcp: int = 0
    dns_udp: int = 0
    dns_tcp: int = 0
    tun: int = 0


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of standard output: it serves, or (``layer``) why not, or no more."""

    server: str = ""
    cipher: str = ""
    has_ipv6: bool = False
    layer: str = ""
    message: str = ""


class Plane:
    """Everything of one namespace."""

    def __init__(self, settings: Settings, control: socket.socket) -> None:
        self.link: Link = NoLink()
        if settings.credential:
            credential = Credential.from_bytes(settings.credential)
            self.link = Link(credential, settings.reconnect_timeout, tls=settings.tls, beat=settings.probe_interval)
        self.direct: Sequence[Network] = [ipaddress.ip_network(text, strict=False) for text in settings.direct]
        self.ended = asyncio.Event()
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._opening = asyncio.Semaphore(OPENING)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Open the session, take the sockets, serve."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.ended.set)
        try:
            await self.link.open()
            say(Report(self.link.server, self.link.cipher, self.link.has_ipv6))
            await self._serve()
        except TunnelError as error:
            say(Report(layer=error.layer, message=error.message))
        finally:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(1):
                    await self.link.close()

    async def _serve(self) -> None:
        await self._readable(self._control)
        data, descriptors, _, _ = socket.recv_fds(self._control, 4096, 16)
        if not data:
            return
        kinds = msgspec.json.decode(data, type=Sockets)
        fds = iter(descriptors)
        resolver = DnsServer(DnsClient(self.link).ask)
        for _ in range(kinds.tcp):
            self._task(self._accept(socket.socket(fileno=next(fds))))
        for _ in range(kinds.dns_udp):
            resolver.serve_udp(socket.socket(fileno=next(fds)))
        for _ in range(kinds.dns_tcp):
            self._task(resolver.serve_tcp(socket.socket(fileno=next(fds))))
        for _ in range(kinds.tun):
            Datagrams(next(fds), self.link, self.direct, self.ended.set).start()
        self._loop.add_reader(self._control, self.ended.set)
        self.link.lost.add_done_callback(lambda _: self.ended.set())
        await self.ended.wait()
        if self.link.lost.done():
            raise self.link.lost.result()

    async def _readable(self, sock: socket.socket) -> None:
        event = asyncio.Event()
        self._loop.add_reader(sock, event.set)
        try:
            await event.wait()
        finally:
            self._loop.remove_reader(sock)

    async def _accept(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await asyncio.sleep(0.05)  # until a connection ends: there is no event for that
                continue
            self._task(self._carry(connection))

    async def _carry(self, inner: socket.socket) -> None:
        with inner:
            try:
                host, port = original_destination(inner)
                await self._through(ready(inner), host, port)
            except (OSError, ValueError, TimeoutError, TunnelError) as error:
                reset_on_close(inner)
                log.info("%s", error)

    async def _through(self, inner: socket.socket, host: str, port: int) -> None:
        if is_within(ipaddress.ip_address(host), self.direct):
            with await self._connect_directly(host, port) as outer:
                await pump(inner, ready(outer))
            return
        async with self._opening:
            stream = await self.link.connect(host, port)
        try:
            await pump(inner, stream)
        finally:
            stream.close()

    async def _connect_directly(self, host: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(DIRECT_DEADLINE):
                await self._loop.sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _task(self, coroutine: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Where a redirected connection was meant to go; raises OSError for one that was not redirected."""
    if sock.family == socket.AF_INET6:
        raw = sock.getsockopt(socket.IPPROTO_IPV6, _ORIGINAL_DST, 28)
        host, port = socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack_from(">H", raw, 2)[0]
    else:
        raw = sock.getsockopt(socket.IPPROTO_IP, _ORIGINAL_DST, 16)
        host, port = socket.inet_ntoa(raw[4:8]), struct.unpack_from(">H", raw, 2)[0]
    if (host, port) == sock.getsockname()[:2]:
        raise OSError(errno.EINVAL, "a connection to the relay's own port")
    return host, port


def say(report: Report) -> None:
    """Write a line; nobody there to read it is no reason to fail."""
    with suppress(OSError):
        os.write(1, msgspec.json.encode(report) + b"\n")


def main(argv: list[str]) -> None:
    """SOCKET: settings on standard input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    raise_file_limit()
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    control = socket.socket(fileno=int(argv[0]))

    async def run() -> None:
        await Plane(settings, control).run()

    run_loop(run())
