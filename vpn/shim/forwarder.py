"""The forwarder of mode ``socks``: a process that makes the connections programs ask for through ``preload/socks.c``.

Runs as ``python -c … vpn.shim.forwarder``, its settings (JSON) on standard input. It writes one line to standard
output: ``{"session": NAME, …}`` when it serves, or ``{"error": TEXT}``, also when its session at the gateway is lost.
It serves whoever is the same user and knows the name, which is in the environment of the session's programs only.
Each question is one connection to its abstract UNIX socket. A connection's life: announced → reaching the destination
→ through, or refused; a later announcement from the same local port means that the earlier program has gone.
"""

from __future__ import annotations

import array
import asyncio
import errno
import ipaddress
import os
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from vpn.config import PROBE_INTERVAL, Credential
from vpn.errors import TunnelError
from vpn.process import first_of
from vpn.relay.loop import run_loop
from vpn.relay.pump import reset_on_close
from vpn.shim import requests as q
from vpn.shim.gate import Gate
from vpn.shim.table import THROUGH, Address, Network, Table, TooManyNetworksError
from vpn.shim.upstream import NoNameError, PlainSocks, Relay, Upstream, UpstreamError
from vpn.spawn import raise_file_limit

QUESTION_DEADLINE = 10.0
BACKLOG = 4096


class Settings(msgspec.Struct, frozen=True):
    """What the session tells: a SOCKS5 server, or the credential for a gateway's relay."""

    socks: tuple[str, int] | None = None
    credential: bytes = b""
    reconnect_timeout: float = 60.0
    direct: tuple[str, ...] = ()
    tls: bool = True
    probe_interval: float = PROBE_INTERVAL


class Serving(msgspec.Struct, frozen=True):
    """The first line when all is well."""

    session: str
    server: str
    gates: tuple[int, ...]
    cipher: str = ""


class Trouble(msgspec.Struct, frozen=True):
    """The first line when not."""

    error: str
    layer: str = "gateway"


class Forwarder:
    """Answers questions and carries connections."""

    def __init__(self, upstream: Upstream, direct: Sequence[Network]) -> None:
        self.upstream = upstream
        self.direct = direct
        self.gate = Gate()
        self.session = f"vpn-{secrets.token_hex(16)}"
        self._begun: dict[tuple[bool, int], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

    async def start(self) -> None:
        """Show that the gate and the server work, and listen; raises TunnelError or UpstreamError."""
        await self.gate.prove()
        await self.upstream.open()
        ports = self.gate.ports
        try:
            self.table = Table(ports[socket.AF_INET], ports.get(socket.AF_INET6, 0), self.direct)
        except TooManyNetworksError as error:
            raise TunnelError("shim", str(error)) from None
        self._listener.bind(f"\0{self.session}")
        self._listener.listen(BACKLOG)

    async def serve(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    raise
                await asyncio.sleep(0.05)  # until a connection ends: there is no event for that
                continue
            self._hold(asyncio.create_task(self._answer(connection)))

    def _hold(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with connection, suppress(OSError, TimeoutError, ValueError):
            connection.setblocking(False)
            _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid != os.geteuid():
                return
            async with asyncio.timeout(QUESTION_DEADLINE):
                question = q.parse(await loop.sock_recv(connection, q.PACKET_LIMIT))
            match question:
                case q.GetTable():
                    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.table.fd]))
                    connection.sendmsg([b"\0"], [rights])
                case q.Connect():
                    connection.send(q.errno_answer(self._begin(question)))
                case q.LookUp(name):
                    connection.send(await self._look_up(name))
                case q.Reverse(address):
                    connection.send(q.reverse_answer(self.upstream.name_of(address)))

    async def _look_up(self, name: str) -> bytes:
        try:
            return q.name_answer(0, await self.upstream.addresses_of(name))
        except NoNameError as error:
            return q.name_answer(error.status)

    def _begin(self, wanted: q.Connect) -> int:
        """Begin a connection; an errno."""
        family = socket.AF_INET6 if wanted.six else socket.AF_INET
        if family not in self.gate.ports or (wanted.local.version == 6) != wanted.six:
            return errno.EINVAL
        key = (wanted.six, wanted.local_port)
        before = self._begun.get(key)
        if before is not None:
            before.cancel()
        self.table.begin(
            six=wanted.six, port=wanted.local_port, inode=wanted.inode, address=wanted.address, remote_port=wanted.port
        )
        task = asyncio.create_task(self._connect(key, wanted))
        self._begun[key] = task
        self._hold(task)
        return 0

    async def _connect(self, key: tuple[bool, int], wanted: q.Connect) -> None:
        family = socket.AF_INET6 if wanted.six else socket.AF_INET

        async def meet(outcome: int = THROUGH) -> socket.socket:
            self.table.end(six=wanted.six, port=wanted.local_port, outcome=outcome)
            try:
                return await self.gate.meet(family, wanted.local, wanted.local_port, wanted.inode)
            finally:
                self._settle(key)

        try:
            await self.upstream.carry(wanted.address, wanted.port, meet)
        except UpstreamError as refusal:
            with suppress(OSError, TimeoutError):
                reset_and_close(await meet(refusal.code))
        except (OSError, TimeoutError):
            return  # the program has gone, or is told by its own socket
        finally:
            self._settle(key)

    def _settle(self, key: tuple[bool, int]) -> None:
        """The port is its socket's affair from now on: what comes next from it is another connection."""
        if self._begun.get(key) is asyncio.current_task():
            del self._begun[key]


def reset_and_close(sock: socket.socket) -> None:
    """The program sees a reset, and ``preload/socks.c`` says what for."""
    reset_on_close(sock)
    sock.close()


def direct_networks(given: Sequence[str]) -> list[Network]:
    """What is reached from the node itself: loopback, its own addresses, link-local ones, and those given."""
    import psutil  # noqa: PLC0415  (only the process needs it)

    own: list[Address] = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                own.append(ipaddress.ip_address(entry.address.partition("%")[0]))
    always = ["127.0.0.0/8", "::1/128", "fe80::/10"]
    networks = [ipaddress.ip_network(text, strict=False) for text in (*always, *given, *map(str, own))]
    return list(dict.fromkeys(networks))


async def run(settings: Settings) -> None:
    """Start, say so, serve until SIGTERM or the session's loss."""
    upstream: Upstream
    patience, interval = settings.reconnect_timeout, settings.probe_interval
    if settings.socks is not None:
        upstream = PlainSocks(*settings.socks, patience, interval)
    else:
        upstream = Relay(Credential.from_bytes(settings.credential), patience, interval, tls=settings.tls)
    try:
        forwarder = Forwarder(upstream, direct_networks(settings.direct))
        await forwarder.start()
    except UpstreamError as error:
        announce(Trouble(error.text))
        sys.exit(1)
    except TunnelError as error:
        announce(Trouble(error.message, error.layer))
        sys.exit(1)
    gates = tuple(forwarder.gate.ports.values())
    announce(Serving(forwarder.session, upstream.server, gates, upstream.cipher))
    serving = asyncio.create_task(forwarder.serve())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    await first_of(serving, upstream.lost)
    if upstream.lost.done():
        loss = upstream.lost.result()
        announce(Trouble(loss.message, loss.layer))
    await upstream.close()


def announce(line: Serving | Trouble) -> None:
    """Write a line."""
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def main(_argv: list[str]) -> None:
    """Settings on standard input."""
    raise_file_limit()
    run_loop(run(msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)))
