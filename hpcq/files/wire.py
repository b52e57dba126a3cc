"""Connections that carry contents: small messages, and streams in chunks between them.

A pilot opens one to the manager (the same port and TLS as its link; first word `DataHello`) or to another pilot, asks,
and gets an answer; then again. A *stream* is a row of chunks, each with its length before it, then a length of zero
and an `End` with the size or the reason why it broke off::

    pilot: Fetch(digest) -->  Coming + stream | Elsewhere(peers) | Later | Nowhere(reason)
    pilot: Store(task, name) --> Go --> stream --> Stored(error)

Reading, writing and hashing files is done in threads, one chunk beside the one that travels; the sender waits while the
receiver's buffers are full, so a transfer costs a few chunks of memory however large the content. A side that makes no
progress for `STALL` seconds loses the connection. May not live here: who has what, where things are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from hpcq import messages as m
from hpcq.errors import HpcqError, ProtocolError
from hpcq.files import threads
from hpcq.files.digests import Hash
from hpcq.files.pack import CHUNK
from hpcq.protocol import frame

STALL = 60.0
"""Seconds without any progress after which a transfer is given up."""

TURN_TIMEOUT = 4 * 3600.0
"""Seconds in which it is a pilot's turn at the manager, which serves a few at a time: a thousand may have outputs."""

CONNECT_TIMEOUT = 5.0
"""Seconds to reach one address."""

MESSAGE_LIMIT = 1 << 20
_LENGTH = struct.Struct(">I")
T = TypeVar("T")


class Fetch(m.Message):
    """Give me this content. ``task`` needs it; ``avoid`` names pilots that did not give it."""

    digest: bytes
    task: int
    avoid: list[str]


class Store(m.Message):
    """Take this output of a task."""

    task: int
    name: str
    kind: str
    executable: bool


class Peer(msgspec.Struct, array_like=True, gc=False):
    """Where a pilot gives contents to others."""

    pilot: str
    addresses: list[str]
    port: int


class Coming(m.Message):
    """The stream follows."""


class Elsewhere(m.Message):
    """Take it from this pilot."""

    peer: Peer


class Later(m.Message):
    """Those who could give it are busy; ask again at once, the answer waits a while."""


class Nowhere(m.Message):
    """Nobody can give it, and why. ``lost``: it was an output kept on pilots that are gone."""

    reason: str
    lost: bool = False


class Go(m.Message):
    """Send the stream."""


class Stored(m.Message):
    """The output is complete here, or could not be taken and why."""

    error: str = ""


class End(msgspec.Struct, array_like=True, gc=False):
    """After the last chunk: the size of all, or why the sender had to stop."""

    size: int
    error: str = ""


Request = Fetch | Store
FetchAnswer = Coming | Elsewhere | Later | Nowhere


class DataError(HpcqError):
    """A transfer broke off: the connection, not the content, is to blame; trying again may help."""


class SourceError(HpcqError):
    """The sender could not read, or what it sent is not what was asked; trying again is useless."""


class Channel:
    """One such connection, as either side has it. Disk work goes to ``workers``."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, workers: ThreadPoolExecutor, where: str
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._workers = workers
        self.where = where

    @contextlib.asynccontextmanager
    async def _limit(self, seconds: float | None = STALL) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError as error:
            raise DataError(f"no progress with {self.where} for {seconds} s") from error
        except (OSError, EOFError) as error:
            raise DataError(f"the data connection with {self.where} broke: {error}") from error

    async def send(self, message: msgspec.Struct) -> None:
        """One message."""
        async with self._limit():
            self._writer.write(frame(message))
            await self._writer.drain()

    async def receive(self, kind: Any, seconds: float | None = STALL) -> Any:
        """The next message, of the union ``kind``.

        Raises:
            DataError: the connection is gone.
            ProtocolError: it is something else.
        """
        async with self._limit(seconds):
            body = await self._frame()
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"{self.where} sent what is not ours: {error}") from error

    async def _frame(self) -> bytes:
        (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        if length > MESSAGE_LIMIT:
            raise ProtocolError(f"{self.where} sent a message of {length} bytes")
        return await self._reader.readexactly(length)

    async def send_stream(self, chunks: Iterator[bytes]) -> None:
        """All of ``chunks``, the next being read while one is sent; the other side is told when reading fails.

        Raises:
            DataError: the connection is gone.
            SourceError: the chunks could not be read.
        """
        size, error = 0, ""
        following = self._begin(next, chunks, b"")
        try:
            while piece := await _result(following):
                following = self._begin(next, chunks, b"")
                size += len(piece)
                await self._send_piece(piece)
        except OSError as problem:
            error = describe(problem)
        finally:
            await threads.ended(following)  # nobody reads any more when we return
            following.cancelled() or following.exception()
        async with self._limit():
            self._writer.write(_LENGTH.pack(0) + frame(End(size, error)))
            await self._writer.drain()
        if error:
            raise SourceError(error)

    async def _send_piece(self, piece: bytes) -> None:
        view = memoryview(piece)
        async with self._limit():
            for start in range(0, len(piece), CHUNK):
                part = view[start : start + CHUNK]
                self._writer.write(_LENGTH.pack(len(part)))
                self._writer.write(part)
                await self._writer.drain()

    async def receive_stream(self, descriptor: int, limit: int | None = None, total: Hash | None = None) -> int:
        """Write the stream to a file, the next chunk being received while one is written; returns its size.

        Args:
            descriptor: the file.
            limit: the most bytes it may have.
            total: digests what is received.

        Raises:
            DataError: the connection is gone.
            SourceError: the sender could not read it, or sent more than ``limit`` bytes.
            OSError: it cannot be written here.
        """
        size = 0
        writing: asyncio.Future[None] | None = None
        try:
            while piece := await self._chunk():
                size += len(piece)
                if limit is not None and size > limit:
                    raise SourceError(f"it is larger than the {limit} bytes it had")
                if writing is not None:
                    await _result(writing)
                writing = self._begin(_write, descriptor, piece, total)
            if writing is not None:
                await _result(writing)
        finally:
            if writing is not None:
                await threads.ended(writing)  # nobody writes any more when we return
                writing.cancelled() or writing.exception()
        end = await self.receive(End)
        if end.error:
            raise SourceError(end.error)
        if end.size != size:
            raise DataError(f"{size} of {end.size} bytes arrived from {self.where}")
        return size

    def _begin(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    async def _chunk(self) -> bytes:
        async with self._limit():
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > CHUNK:
                raise ProtocolError(f"{self.where} sent a chunk of {length} bytes")
            return await self._reader.readexactly(length)

    async def drain_input(self) -> None:
        """Throw away what comes until the other side hangs up."""
        async with self._limit():
            while await self._reader.read(CHUNK):
                pass

    def close(self) -> None:
        """Hang up at once."""
        self._writer.transport.abort()


async def _result(future: asyncio.Future[T]) -> T:
    await threads.ended(future)
    return future.result()


def _write(descriptor: int, piece: bytes, total: Hash | None) -> None:
    if total is not None:
        total.update(piece)
    view = memoryview(piece)
    while view:
        view = view[os.write(descriptor, view) :]


def describe(error: OSError) -> str:
    """An operating system error in words: which file, what."""
    from hpcq.files.names import shown  # noqa: PLC0415 - keeps this module's imports at one level

    if error.strerror and error.filename:
        return f"{shown(error.filename)}: {error.strerror}"
    return shown(error.strerror or error)


async def connect(  # noqa: PLR0917 - all six differ in type
    addresses: list[str], port: int, tls: ssl.SSLContext, server_name: str, pilot: str, workers: ThreadPoolExecutor
) -> Channel:
    """Open one and present ourselves.

    Raises:
        DataError: nobody answers at any of the addresses, or we are refused; says what happened.
    """
    failures = []
    for address in addresses:
        where = f"{address}:{port}"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                reader, writer = await asyncio.open_connection(
                    address, port, ssl=tls, server_hostname=server_name, limit=CHUNK
                )
        except (OSError, TimeoutError) as error:
            failures.append(f"{where}: {error or 'no answer'}")
            continue
        _keep_alive(writer.get_extra_info("socket"))
        channel = Channel(reader, writer, workers, where)
        try:
            await channel.send(m.DataHello(m.PROTOCOL_VERSION, pilot))
            answer = await channel.receive(m.FirstAnswer)
        except BaseException:
            channel.close()
            raise
        if isinstance(answer, m.Refused):
            channel.close()
            raise DataError(f"{where} refused a data connection: {answer.reason}")
        return channel
    raise DataError(f"no data connection: {'; '.join(failures) or 'no address is known'}")


def _keep_alive(sock: socket.socket) -> None:
    """Whoever waits for its turn hears nothing for long: the system sees whether the other side is still there."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
