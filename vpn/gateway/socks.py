"""The relay's end at the gateway: SOCKS5 over TLS for this gateway's pilots, and for nobody else.

A connection's states: TLS handshake → methods → login → request → carried, all before the last within
``LOGIN_DEADLINE``. A login is the one-time password, which is spent by it, the token of a session that is open
(``vpn.gateway.tickets``), or the key of the gateway's owner (``vpn.gateway.remote``). Wrong ones are logged and
answered late. Connections that have not logged in are limited; beyond ``STRANGERS`` the oldest of the address with
most of them is dropped, so that those who never speak cannot keep pilots out.

A session ends by its pilot's word, by ``revoke``, or when it was away for too long; with it every connection of
the pilot. What the daemon must know is told by ``on_event``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

from vpn.gateway import remote, strangers
from vpn.gateway.association import Association
from vpn.gateway.crowd import Crowd
from vpn.gateway.outside import Outside, OutsideError
from vpn.gateway.remote import Remote
from vpn.gateway.resolver import Resolver
from vpn.gateway.tickets import AWAY_LIFETIME, Tickets
from vpn.relay import socks5
from vpn.relay.pump import end_on_close, ready, reset_on_close, resume_soon
from vpn.relay.socks5 import Answer, Command, Target
from vpn.relay.tls import TlsStream

log = logging.getLogger("vpn.gateway")

LOGIN_DEADLINE = 30.0  # seconds for everything before the request
END_DEADLINE = 1.0  # seconds for the last word to a pilot
SILENCE = 120.0  # seconds without a sign of life after which a session's connection counts as broken
STRANGERS = 2048
BACKLOG = 1024
QUERIES = 256  # DNS queries of one connection at once

ANSWERS: dict[str, Answer] = {
    "denied": Answer.DENIED,
    "unresolved": Answer.HOST_UNREACHABLE,
    "refused": Answer.REFUSED,
    "unreachable": Answer.NETWORK_UNREACHABLE,
    "timeout": Answer.TIMEOUT,
}
Happening = Literal["connect", "disconnect", "end"]


class SocksService:
    """Serves the connections of one listener. ``on_event(what, username, address)`` hears of sessions."""

    def __init__(
        self,
        context: ssl.SSLContext,
        outside: Outside,
        resolver: Resolver,
        on_event: Callable[[Happening, str, str], None],
        remote: Remote | None = None,
    ) -> None:
        self.tickets = Tickets()
        self.catch_up: Callable[[], None] = lambda: None
        """Takes what there is of news about tickets: nobody is told that a password is wrong by who has not looked."""
        self._remote = remote
        self._context = context
        self._outside = outside
        self._resolver = resolver
        self._on_event = on_event
        self._strangers: Crowd[asyncio.Task[None]] = Crowd(STRANGERS)
        self._serving: dict[str, set[asyncio.Task[None]]] = {}
        self._users: dict[asyncio.Task[None], str] = {}
        self._sessions: dict[str, asyncio.Task[None]] = {}
        self._farewell = True
        self._loop = asyncio.get_running_loop()

    async def accept(self, listener: socket.socket) -> None:
        """Take connections until cancelled; at the limit of open files it waits for some to end."""
        while True:
            try:
                connection, address = await self._loop.sock_accept(listener)
            except ConnectionError:
                continue
            except OSError as error:
                strangers.log.error("relay: cannot take a connection: %s", error)
                await asyncio.sleep(0.2)
                continue
            self._begin(connection, str(address[0]))

    def _begin(self, connection: socket.socket, address: str) -> None:
        task = self._loop.create_task(self._serve(connection, address))
        task.add_done_callback(functools.partial(self._forget, connection))
        one_too_many = self._strangers.add(task, address)
        if one_too_many is not None:
            one_too_many.cancel()

    def _forget(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()  # a task that is cancelled before it runs closes nothing
        self._strangers.remove(task)
        self._serving.get(self._users.pop(task, ""), set()).discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("relay: an error of our own", exc_info=task.exception())

    async def _serve(self, connection: socket.socket, address: str) -> None:
        resume_soon(ready(connection))
        stream, username = TlsStream(connection, self._context, server_side=True), ""
        try:
            async with asyncio.timeout(LOGIN_DEADLINE):
                await stream.handshake()
                username = await self._login(stream, address)
                request = await stream.receive(socks5.take_request) if username else None
            if request is not None:
                await self._perform(stream, username, request, address)
        except (OSError, ValueError, TimeoutError, asyncio.CancelledError) as error:
            reset_on_close(stream)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            stream.close()
            if username and self.tickets.never_opened(username):  # it wanted no session: this connection was it
                self._leave(username, ended=True)

    async def _login(self, stream: TlsStream, address: str) -> str:
        """The user who logged in; "" when nobody did."""
        methods = await stream.receive(socks5.take_greeting)
        if socks5.PASSWORD not in methods:
            await stream.send(socks5.give_method(socks5.NOTHING))
            return ""
        await stream.send(socks5.give_method(socks5.PASSWORD))
        login = await stream.receive(socks5.take_login)
        username = login.username.decode(errors="replace")
        if self._remote is not None and self._remote.admits(username, login.password):
            self._admitted(username, address, first=False)
            await stream.send(socks5.give_login_answer(accepted=True))
            return username
        admission = self.tickets.admit(username, login.password)
        if admission == "wrong":
            self.catch_up()
            admission = self.tickets.admit(username, login.password)
        if admission in ("wrong", "spent"):
            penalty = self.tickets.penalty(address, time.monotonic())
            strangers.log.warning("relay: %s: a %s password for %r", address, admission, username[:64])
            await asyncio.sleep(penalty)
            await stream.send(socks5.give_login_answer(accepted=False))
            return ""
        self._admitted(username, address, first=admission == "password")
        await stream.send(socks5.give_login_answer(accepted=True))
        return username

    def _admitted(self, username: str, address: str, *, first: bool) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._strangers.remove(task)
        self._serving.setdefault(username, set()).add(task)
        self._users[task] = username
        if first:
            self._on_event("connect", username, address)

    async def _perform(self, stream: TlsStream, username: str, request: socks5.Request, address: str) -> None:
        if username == remote.USER:  # the gateway's owner, who is no pilot
            await self._control(stream, request)
            return
        match request.command:
            case Command.CONNECT:
                await self._connect(stream, username, request.target)
            case Command.CONNECT_PLAIN:
                await self._connect_plain(stream, username, request.target)
            case Command.SESSION:
                await self._session(stream, username, address)
            case Command.RESOLVE:
                await stream.send(socks5.give_reply(Answer.OK))
                await self._resolve(stream)
            case Command.ASSOCIATE:
                await stream.send(socks5.give_reply(Answer.OK))
                await Association(stream, username, self._outside).run()
            case _:
                await stream.send(socks5.give_reply(Answer.COMMAND_UNKNOWN))
                await stream.end()

    async def _control(self, stream: TlsStream, request: socks5.Request) -> None:
        if self._remote is None or request.command != Command.CONTROL:
            await stream.send(socks5.give_reply(Answer.COMMAND_UNKNOWN))
            await stream.end()
            return
        await stream.send(socks5.give_reply(Answer.OK))
        async with asyncio.timeout(remote.SERVE_DEADLINE):
            await self._remote.serve(stream)

    async def _connect(self, stream: TlsStream, username: str, target: Target) -> None:
        def connected() -> Awaitable[None]:
            return stream.send(socks5.give_reply(Answer.OK))

        try:
            await self._outside.carry(username, stream, target.host, target.port, connected)
        except OutsideError as error:
            await stream.send(socks5.give_reply(ANSWERS.get(error.kind, Answer.FAILED)))
            await stream.end()

    async def _connect_plain(self, stream: TlsStream, username: str, target: Target) -> None:
        """The same, and from the answer on without TLS."""
        async with asyncio.timeout(LOGIN_DEADLINE):
            plain = await stream.leave()

        async def connected() -> None:
            await stream.send(socks5.give_reply(Answer.OK))
            await stream.end()

        try:
            await self._outside.carry(username, plain, target.host, target.port, connected)
        except OutsideError as error:
            end_on_close(plain)  # else its close would overtake the answer
            await stream.send(socks5.give_reply(ANSWERS.get(error.kind, Answer.FAILED)))
            await stream.end()

    async def _session(self, stream: TlsStream, username: str, address: str) -> None:
        """Keep a session; a newer connection of it takes its place."""
        before = self._sessions.get(username)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[username] = task
        if before is not None:
            before.cancel()
        away = self.tickets.is_away(username)
        token = self.tickets.open(username)
        if not token:
            await stream.send(socks5.give_reply(Answer.DENIED))
            return
        if away:
            self._on_event("connect", username, address)
        ended = False
        try:
            abilities = socks5.HAS_PLAIN | (socks5.HAS_IPV6 if has_ipv6() else 0)
            await stream.send(socks5.give_reply(Answer.OK, Target(token, abilities)))
            ended = await _echo(stream)
        except asyncio.CancelledError:  # revoked, or the gateway ends: its pilot need not try to come back
            if self._farewell:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stream.end(), END_DEADLINE)
            stream.close()
            raise
        finally:
            if self._sessions.get(username) is task:
                del self._sessions[username]
                self._leave(username, ended=ended)

    def _leave(self, username: str, *, ended: bool) -> None:
        if ended:
            self.revoke(username)
            self._on_event("end", username, "")
        else:
            self.tickets.leave(username, time.monotonic())
            self._on_event("disconnect", username, "")
            self._loop.call_later(AWAY_LIFETIME + 1, self._expire)

    def _expire(self) -> None:
        for username in self.tickets.expire(time.monotonic()):
            log.info("relay: %s did not come back", username)
            self.revoke(username)
            self._on_event("end", username, "")

    def revoke(self, username: str) -> None:
        """End a credential and everything of it."""
        self.tickets.remove(username)
        self._sessions.pop(username, None)
        current = asyncio.current_task()
        for task in self._serving.pop(username, set()):
            if task is not current:
                task.cancel()

    async def close(self, *, farewell: bool = True) -> None:
        """End every connection; without ``farewell`` sessions are not told that they are over, and may come back to
        another gateway.
        """
        self._farewell = farewell
        tasks = [*self._strangers, *(task for tasks in self._serving.values() for task in tasks)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _resolve(self, stream: TlsStream) -> None:
        """Answer DNS queries as they come, each when it is answered."""
        out: asyncio.Queue[bytes] = asyncio.Queue(QUERIES)  # who does not read what was asked for is not asked for more
        slots = asyncio.Semaphore(QUERIES)
        tasks = {self._loop.create_task(_send_all(stream, out))}
        try:
            while True:
                query = await stream.receive(socks5.take_message, 65537)
                await slots.acquire()
                task = self._loop.create_task(self._answer(query, out, slots))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in list(tasks):
                task.cancel()

    async def _answer(self, query: bytes, out: asyncio.Queue[bytes], slots: asyncio.Semaphore) -> None:
        try:
            if answer := await self._resolver.ask(query):
                await out.put(socks5.give_message(answer))
        finally:
            slots.release()


async def _send_all(stream: TlsStream, out: asyncio.Queue[bytes]) -> None:
    with suppress(OSError):
        while True:
            await stream.send(await out.get())


async def _echo(stream: TlsStream) -> bool:
    """Send back what comes; True at an orderly end. Raises OSError or TimeoutError when it breaks."""
    while True:
        async with asyncio.timeout(SILENCE):
            data = await stream.receive_some()
        if not data:
            return True
        await stream.send(data)


def has_ipv6() -> bool:
    """Whether this host has a way to the IPv6 Internet: the route is looked up, nothing is sent."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect(("2000::1", 53))
    except OSError:
        return False
    return True
