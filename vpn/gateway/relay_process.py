"""The relay's process at a gateway, and the daemon's hold on it.

The daemon opens the listeners and starts the process (``start_relay``), tells it of credentials, and hears of
sessions; one SOCK_SEQPACKET pair carries both, one message a packet, passwords included: nobody else has an end of
it. When either side dies the other sees the pair end: the process exits, the daemon starts another. Sessions are told
that they are over only by a daemon that ends in order (``Leave``); of one that was killed there may be a successor, and
they try to come back. The process is apart because it may be busy with bytes, which the daemon, and the people who ask
it, must not feel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec

from vpn import kernel
from vpn.errors import GatewayError
from vpn.gateway.accesslog import AccessLog
from vpn.gateway.host_sockets import ANY, PORTS, has_ipv6
from vpn.gateway.ledger import RELAY, Ledger
from vpn.gateway.lesser import access_log, become
from vpn.gateway.outside import Outside, OutsideLimits, own_addresses
from vpn.gateway.policy import Policy
from vpn.gateway.remote import open_remote
from vpn.gateway.resolver import Resolver
from vpn.gateway.socks import BACKLOG, SocksService
from vpn.process import python_argv
from vpn.relay.loop import run_loop
from vpn.relay.tls import server_context
from vpn.spawn import raise_file_limit

log = logging.getLogger("vpn.gateway")

START_DEADLINE = 30.0
ANSWER_DEADLINE = 10.0
END_DEADLINE = 5.0
PACKET_LIMIT = 256 * 1024
_NEAR = 16  # ports after ocserv's that are tried first, so that one range is enough for a site's firewall


class Settings(msgspec.Struct, frozen=True):
    """What the process is to do: rates are bytes a second, each way; 0 is no limit. ``ledger`` is a descriptor
    (-1: none): ``rate`` is then the data plane's as well. ``user`` is whom to become, "" nobody else."""

    directory: str
    ledger: int = -1
    allow: tuple[str, ...] = ()
    dns: tuple[str, ...] = ()
    rate: float = 0.0
    rate_per_pilot: float = 0.0
    user: str = ""
    restored: tuple[tuple[str, bytes], ...] = ()
    """User and digest of the password of those that an earlier one knew: nobody may come before they are known."""


class Add(msgspec.Struct, tag=True, frozen=True):
    """A fresh credential."""

    username: str
    password: str


class Spend(msgspec.Struct, tag=True, frozen=True):
    """Its password was used elsewhere."""

    username: str


class Revoke(msgspec.Struct, tag=True, frozen=True):
    """End it and its connections."""

    username: str


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Send ``Used``."""


class Leave(msgspec.Struct, tag=True, frozen=True):
    """End all sessions, and exit."""


class Serving(msgspec.Struct, tag=True, frozen=True):
    """It listens."""


class Session(msgspec.Struct, tag=True, frozen=True):
    """A session's connection began, broke, or the session ended: connect, disconnect, end."""

    what: str
    username: str
    address: str


class Use(msgspec.Struct, frozen=True):
    """One pilot's figures: connections open now, and bytes so far."""

    username: str
    connections: int
    up: int
    down: int


class Used(msgspec.Struct, tag=True, frozen=True):
    """What pilots used; those with most bytes, if they do not all fit."""

    pilots: list[Use]


Order = Add | Spend | Revoke | Ask | Leave
News = Serving | Session | Used
_decode_order: Callable[[bytes], Order] = msgspec.msgpack.Decoder(Order).decode
_decode_news: Callable[[bytes], News] = msgspec.msgpack.Decoder(News).decode
_USES = 1500  # that fit a packet


class Relay:
    """The process, seen from the daemon; ``ended`` resolves with the reason when it ends by itself."""

    def __init__(self, port: int, sock: socket.socket, on_session: Callable[[Session], None]) -> None:
        self.port = port
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_session = on_session
        self._serving: asyncio.Future[None] = self._loop.create_future()
        self._asked: asyncio.Future[list[Use]] | None = None
        self._unsent: list[Order] = []
        self._loop.add_reader(sock, self._on_readable)

    def add(self, username: str, password: str) -> None:
        """Take a fresh credential."""
        self._post(Add(username, password))

    def spend(self, username: str) -> None:
        """Its password was used at ocserv."""
        self._post(Spend(username))

    def revoke(self, username: str) -> None:
        """End a credential and its connections."""
        self._post(Revoke(username))

    async def used(self) -> dict[str, Use]:
        """What pilots used, by user name; empty when the process does not answer in time."""
        if self._asked is None or self._asked.done():
            self._asked = self._loop.create_future()
            self._post(Ask())
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_DEADLINE):
                return {use.username: use for use in await asyncio.shield(self._asked)}
        return {}

    def _post(self, order: Order) -> None:
        if self._sock.fileno() >= 0:  # else it has ended: who starts another tells that one
            self._unsent.append(order)
            self._send()

    def _send(self) -> None:
        while self._unsent:
            try:
                self._sock.send(msgspec.msgpack.encode(self._unsent[0]))
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send)
                return
            except OSError:
                self._end()
                return
            self._unsent.pop(0)
        self._loop.remove_writer(self._sock)

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(PACKET_LIMIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        match _decode_news(data):
            case Serving():
                self._serving.set_result(None)
            case Session() as session:
                self._on_session(session)
            case Used(pilots):
                if self._asked is not None and not self._asked.done():
                    self._asked.set_result(pilots)

    def _end(self) -> None:
        self.close()
        if not self._serving.done():
            self._serving.set_exception(GatewayError("the relay ended before it listened; see the gateway's log"))
        if not self.ended.done():
            self.ended.set_result("the relay ended")

    async def started(self) -> None:
        """Wait until it serves; raises GatewayError."""
        try:
            await asyncio.wait_for(self._serving, START_DEADLINE)
        except TimeoutError:
            raise GatewayError(f"the relay was not ready within {START_DEADLINE:g} s") from None

    def close(self) -> None:
        """Let go of it: it exits."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        with suppress(OSError):  # it has died, or takes nothing any more
            self._sock.send(msgspec.msgpack.encode(Leave()))
        self._sock.close()


async def start_relay(
    stack: AsyncExitStack, settings: Settings, where: tuple[str, int, int], on_session: Callable[[Session], None]
) -> Relay:
    """Start the process; what ends it is pushed on ``stack``. ``where`` is as for ``open_listeners``."""
    Policy(settings.allow)  # a bad rule is said here, not in a log
    listeners, chosen = open_listeners(*where)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_LIMIT)
    ours.setblocking(False)
    numbers = [sock.fileno() for sock in (theirs, *listeners)]
    with ExitStack() as closing:
        for sock in (theirs, *listeners):
            closing.enter_context(sock)
        process = await asyncio.create_subprocess_exec(
            *python_argv("vpn.gateway.relay_process", str(os.getpid()), *map(str, numbers)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            pass_fds=[*numbers, *([settings.ledger] if settings.ledger >= 0 else [])],
            cwd="/",
        )
    relay = Relay(chosen, ours, on_session)
    stack.push_async_callback(_end_process, process)
    stack.callback(relay.close)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings))
    process.stdin.close()
    await relay.started()
    return relay


async def _end_process(process: asyncio.subprocess.Process) -> None:
    """Its socket is closed by now, on which it exits."""
    try:
        await asyncio.wait_for(process.wait(), END_DEADLINE)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def open_listeners(listen: str, port: int, near: int) -> tuple[list[socket.socket], int]:
    """TCP listeners on an address ("": all, of both families) and one port (0: one after ``near``, or any); and the
    port. Raises GatewayError.
    """
    if listen:
        where = [(socket.AF_INET6 if ":" in listen else socket.AF_INET, listen)]
    else:
        where = [(family, text) for family, text in ANY.items() if family == socket.AF_INET or has_ipv6()]
    close = [number for number in range(near + 1, near + _NEAR) if near and number < 65536]
    problem = ""
    for candidate in [port] if port else [*close, *random.sample(range(*PORTS), 50)]:
        with ExitStack() as stack:
            try:
                found = [stack.enter_context(_listener(family, text, candidate)) for family, text in where]
            except OSError as error:
                problem = error.strerror or str(error)
                continue
            stack.pop_all()
            return found, candidate
    raise GatewayError(
        f"the relay cannot listen on {listen or 'all addresses'}, port {port or 'any'}: {problem}; "
        "choose another with --relay-port or --listen"
    )


def _listener(family: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


class Process:
    """The process itself."""

    def __init__(self, settings: Settings, sock: socket.socket) -> None:
        directory = Path(settings.directory)
        policy = Policy(settings.allow, own_addresses())
        context = server_context(directory / "server-cert.pem", directory / "server-key.pem")
        self.access = AccessLog(become(settings.user, access_log(directory, settings.user)))
        limits = OutsideLimits(rate=settings.rate, rate_per_client=settings.rate_per_pilot)
        ledger = Ledger(settings.ledger, RELAY) if settings.ledger >= 0 else None
        self.outside = Outside(policy, self.access, limits, ledger)
        resolver = Resolver(policy, self.outside.names, settings.dns)
        owner = None if settings.user else open_remote(directory)  # nobody else may ask the daemon
        self.service = SocksService(context, self.outside, resolver, self._tell, owner)
        for username, digest in settings.restored:
            self.service.tickets.restore(username, digest)
        self.service.catch_up = self._take_orders
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._in_order = False

    async def run(self, listeners: list[socket.socket]) -> None:
        """Serve until the daemon is gone."""
        self._sock.setblocking(True)  # a daemon that is slow is waited for: its messages are few and short
        self._loop.add_reader(self._sock, self._take_orders)
        self._loop.add_signal_handler(signal.SIGTERM, self._ended.set)
        for listener in listeners:
            listener.setblocking(False)
        accepting = [self._loop.create_task(self.service.accept(listener)) for listener in listeners]
        self._post(Serving())
        try:
            await self._ended.wait()
        finally:
            for task in accepting:
                task.cancel()
            await self.service.close(farewell=self._in_order)
            self.access.close()

    def _tell(self, what: str, username: str, address: str) -> None:
        self._post(Session(what, username, address))
        if what == "end":
            self.outside.forget(username)

    def _post(self, news: News) -> None:
        try:
            self._sock.send(msgspec.msgpack.encode(news))
        except OSError:
            self._ended.set()

    def _take_orders(self) -> None:
        """All there are: many pilots that log in at once must not be before the word that they will."""
        while True:
            try:
                data = self._sock.recv(PACKET_LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._sock)
                self._ended.set()
                return
            self._obey(_decode_order(data))

    def _obey(self, order: Order) -> None:
        match order:
            case Add(username, password):
                self.service.tickets.add(username, password)
            case Spend(username):
                self.service.tickets.spend(username)
            case Revoke(username):
                self.service.revoke(username)
                self.outside.forget(username)
            case Ask():
                self._post(Used(self._uses()))
            case Leave():
                self._in_order = True
                self._ended.set()

    def _uses(self) -> list[Use]:
        uses = [Use(name, len(usage.open), *usage.total()) for name, usage in self.outside.usage.items()]
        uses.sort(key=lambda use: use.up + use.down, reverse=True)
        return uses[:_USES]


def main(argv: list[str]) -> None:
    """PARENT SOCKET LISTENER…: settings (JSON) on standard input."""
    kernel.die_with_parent(signal.SIGTERM)
    if os.getppid() != int(argv[0]):
        sys.exit(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    raise_file_limit()
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    sock, *listeners = (socket.socket(fileno=int(number)) for number in argv[1:])
    for each in (sock, *listeners):
        each.set_inheritable(False)

    async def serve(*_: Any) -> None:
        await Process(settings, sock).run(listeners)

    run_loop(serve())
