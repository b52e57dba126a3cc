"""A pilot's side of the relay: its session at the gateway, and connections that ride on it.

``Link.open`` logs in with the one-time password and opens the session; ``Link.lost`` resolves when the session is
over for good. A session's connection that breaks is opened again with the token, for ``reconnect_timeout`` seconds;
connections already carried are not touched by that. ``connect``, ``associate`` and ``resolve`` give streams; what the
gateway answered to the first is an ``OSError`` with the errno a program would have got.

Everything a connection needs to say before it can be used goes out in one piece: it costs one round trip beside TLS.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from vpn.config import PROBE_INTERVAL, Credential
from vpn.errors import TunnelError
from vpn.relay import socks5
from vpn.relay.pump import End, ready, reset_on_close, resume_soon
from vpn.relay.socks5 import Answer, Command, Reply, Target
from vpn.relay.tls import TlsStream, check_key, client_context

CONNECT_DEADLINE = 30.0  # seconds for the gateway to accept a connection and prove its key, also when many come at once
ANSWER_DEADLINE = 60.0  # seconds for the gateway to reach a destination; its own deadline is shorter
BEAT_DEADLINE = 15.0  # seconds for the answer to a sign of life; fewer where they are asked for more often,
BEAT_LEAST = 5.0  # but a gateway may be busy for so long
REDIAL = 4.0  # seconds after which an address that does not answer is dialled again: the kernel has asked three times
RETRY = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before each attempt to come back; the last again and again

ERRNOS: dict[int, int] = {
    Answer.DENIED: errno.EACCES,
    Answer.NETWORK_UNREACHABLE: errno.ENETUNREACH,
    Answer.HOST_UNREACHABLE: errno.EHOSTUNREACH,
    Answer.REFUSED: errno.ECONNREFUSED,
    Answer.TIMEOUT: errno.ETIMEDOUT,
}


_ENDED = "the gateway ended the session: it was stopped, or the credential was revoked"


class _EndedError(Exception):
    """The gateway ended the session in order."""


class Link:
    """One session; ``beat``: seconds between two signs of life."""

    def __init__(
        self,
        credential: Credential,
        reconnect_timeout: float = 60.0,
        *,
        tls: bool = True,
        beat: float = PROBE_INTERVAL,
    ) -> None:
        self.credential = credential
        self._beat_interval = beat
        self.tls = tls
        """Whether what programs send is encrypted; logins always are."""
        self.server = ""
        self.cipher = ""
        self.has_ipv6 = False
        self.round_trip = 0.0
        """Seconds the last sign of life took."""
        self.lost: asyncio.Future[TunnelError] = asyncio.get_running_loop().create_future()
        self._reconnect_timeout = reconnect_timeout
        self._dialling = CONNECT_DEADLINE  # seconds the gateway has to accept a connection
        self._secret = credential.password.reveal()
        self._session: TlsStream | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the session; raises TunnelError."""
        try:
            self._session = await self._open_session()
        except (OSError, ValueError, TimeoutError) as error:
            raise self._unreachable(error) from None
        self._keeping = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """End the session in order."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._session is not None:
            await self._session.end()
            self._session.close()

    async def connect(self, host: str, port: int) -> End:
        """A stream to a destination, ready for a pump; raises OSError, its errno as from connect(2)."""
        stream, reply = await self._ask(Command.CONNECT if self.tls else Command.CONNECT_PLAIN, Target(host, port))
        if reply.answer != Answer.OK:
            stream.close()
            code = ERRNOS.get(reply.answer, errno.ENETDOWN)
            raise OSError(code, os.strerror(code), f"{host} port {port}")
        if self.tls:
            return stream
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                return await stream.leave()
        except BaseException:
            stream.close()
            raise

    async def associate(self) -> TlsStream:
        """A stream of ``socks5.Datagram``."""
        return await self._special(Command.ASSOCIATE)

    async def resolve(self) -> TlsStream:
        """A stream of DNS messages."""
        return await self._special(Command.RESOLVE)

    async def _special(self, command: Command) -> TlsStream:
        stream, reply = await self._ask(command, socks5.NOWHERE)
        if reply.answer != Answer.OK:
            stream.close()
            raise OSError(errno.EOPNOTSUPP, f"the gateway refused {command.name}: answer {reply.answer}")
        return stream

    async def _open_session(self) -> TlsStream:
        stream, reply = await self._ask(Command.SESSION, socks5.NOWHERE)
        if reply.answer != Answer.OK:
            stream.close()
            raise TunnelError("gateway", f"{self.server}: the gateway refused the session: answer {reply.answer}")
        self._secret = reply.bound.host
        self.has_ipv6 = bool(reply.bound.port & socks5.HAS_IPV6)
        if not self.tls and not reply.bound.port & socks5.HAS_PLAIN:
            stream.close()
            raise TunnelError("gateway", f"{self.server}: this gateway is older and carries nothing without TLS")
        self.cipher = " ".join(map(str, (stream.tls.cipher() or ("",))[:1]))
        return stream

    async def _ask(self, command: Command, target: Target) -> tuple[TlsStream, Reply]:
        """A new connection, logged in, and the gateway's answer to a request."""
        async with asyncio.timeout(CONNECT_DEADLINE):
            stream = await self._encrypted()
        try:
            login = socks5.give_login(self.credential.username, self._secret)
            greeting = socks5.give_greeting(socks5.PASSWORD)
            async with asyncio.timeout(ANSWER_DEADLINE):
                asked = stream.seal(memoryview(greeting + login + socks5.give_request(command, target)))
                if command == Command.CONNECT_PLAIN:
                    stream.stepwise = True
                    asked += stream.seal_end()
                await stream.loop.sock_sendall(stream.sock, asked)
                await self._logged_in(stream)
                return stream, await stream.receive(socks5.take_reply)
        except BaseException:
            reset_on_close(stream)
            stream.close()
            raise

    async def _logged_in(self, stream: TlsStream) -> None:
        if await stream.receive(socks5.take_method) != socks5.PASSWORD or not await stream.receive(
            socks5.take_login_answer
        ):
            raise TunnelError(
                "gateway",
                f"{self.server}: the gateway refused the credential: it is good for one login, until it is revoked; "
                "get a fresh one",
            )

    async def _encrypted(self) -> TlsStream:
        addresses = [self.server] if self.server else list(self.credential.addresses)
        async with asyncio.timeout(self._dialling):
            sock, self.server = await first_connected(addresses, self.credential.relay_port)
        stream = TlsStream(resume_soon(ready(sock)), client_context(), server_side=False)
        try:
            await stream.handshake()
            check_key(stream, self.credential.pin)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _keep(self) -> None:
        """Signs of life, for as long as the session can be kept or brought back."""
        while True:
            assert self._session is not None
            try:
                await self._beat(self._session)
            except _EndedError:
                self.lost.set_result(TunnelError("gateway", f"{self.server}: {_ENDED}"))
                return
            except (OSError, TimeoutError, ValueError):
                reset_on_close(self._session)
                self._session.close()
                problem = await self._come_back()
                if problem is not None:
                    self.lost.set_result(problem)
                    return

    async def _beat(self, stream: TlsStream) -> None:
        """Send a byte now and then and have it back; raises when the connection is no good."""
        deadline = min(BEAT_DEADLINE, max(BEAT_LEAST, self._beat_interval))
        receiving = asyncio.create_task(stream.receive_some())
        try:
            while True:
                sent = time.monotonic()
                await stream.send(b"\0")
                async with asyncio.timeout(deadline):
                    data = await asyncio.shield(receiving)
                if not data:
                    raise _EndedError
                self.round_trip = time.monotonic() - sent
                receiving = asyncio.create_task(stream.receive_some())
                done, _ = await asyncio.wait([receiving], timeout=self._beat_interval)
                if done and not receiving.result():
                    raise _EndedError
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)

    async def _come_back(self) -> TunnelError | None:
        until, attempt = time.monotonic() + self._reconnect_timeout, 0
        while True:
            await asyncio.sleep(RETRY[min(attempt, len(RETRY) - 1)])
            attempt += 1
            self._dialling = max(REDIAL, until - time.monotonic())  # it may be gone without a word: others may not be
            try:
                self._session = await self._open_again()
            except TunnelError as error:
                return TunnelError(error.layer, f"{_ENDED} ({error})")
            except (OSError, ValueError, TimeoutError) as error:
                if time.monotonic() >= until:
                    return self._unreachable(error)
            else:
                return None
            finally:
                self._dialling = CONNECT_DEADLINE

    async def _open_again(self) -> TlsStream:
        """By the token; a gateway that was started again knows none, but takes the password once more."""
        try:
            return await self._open_session()
        except TunnelError:
            self._secret = self.credential.password.reveal()
            return await self._open_session()

    def _unreachable(self, error: Exception) -> TunnelError:
        where = ", ".join(self.credential.addresses)
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        return TunnelError(
            "gateway",
            f"no relay answers at {where} port {self.credential.relay_port} ({text or 'no answer in time'}); "
            "is the gateway running? see `hpcq vpn gateway status`",
        )


async def first_connected(addresses: Sequence[str], port: int) -> tuple[socket.socket, str]:
    """The first address to accept a connection, all tried at once; raises the OSError of the last that failed."""
    attempts = {asyncio.create_task(_connected(address, port)): address for address in addresses}
    problem: OSError = ConnectionError("no address")
    try:
        while attempts:
            done, _ = await asyncio.wait(attempts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                address = attempts.pop(task)
                error = task.exception()
                if error is None:
                    return task.result(), address
                if not isinstance(error, OSError):
                    raise error
                problem = error
    finally:
        for task in attempts:
            task.cancel()
        for result in await asyncio.gather(*attempts, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()
    raise problem


async def _connected(address: str, port: int) -> socket.socket:
    """Dial until the address answers: the kernel would wait twice as long before each attempt as before the last."""
    loop = asyncio.get_running_loop()
    (family, kind, protocol, _, where), *_ = await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(REDIAL):
                return await _dialled(family, kind, protocol, where)


async def _dialled(family: int, kind: int, protocol: int, where: Any) -> socket.socket:
    loop = asyncio.get_running_loop()
    sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    try:
        await loop.sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock
