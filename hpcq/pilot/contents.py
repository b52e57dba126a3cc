"""Where a pilot gets contents from and gives them to: its node's cache, other pilots, the manager.

A content is fetched once for a node: whoever holds its lock fetches, the others wait and find it in the cache. The
manager says where to take it; a pilot that does not give it is avoided the next time we ask, so that in the end the
manager gives it itself. Connections to the manager are used again, those to pilots are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hpcq import connection as conn
from hpcq import messages as m
from hpcq.door import Door, listener
from hpcq.errors import HpcqError, ProtocolError
from hpcq.files import digests, threads, wire
from hpcq.files.cache import Cache
from hpcq.files.pack import CHUNK
from hpcq.pilot.link import ManagerLink

log = logging.getLogger("hpcq.pilot")
T = TypeVar("T")

ATTEMPTS = 3
"""How often a transfer with the manager is tried."""

ANSWER_TIMEOUT = 600.0
"""Seconds another pilot may take to answer while it is busy with others, or the manager to have an output on disk."""

IDLE_CHANNELS = 4
KEPT = 30.0
"""Seconds after which an unused connection to the manager is not used again: whatever is on the way may have dropped
it without a word. The manager hangs up somewhat later (`hpcq.files.counter.IDLE`)."""

GIVING = 8


class LostError(HpcqError):
    """Nobody has a content any more."""

    def __init__(self, digest: bytes, reason: str) -> None:
        super().__init__(reason)
        self.digest = digest


class Contents:
    """One pilot's. ``announce`` is called with what it can give to others from then on."""

    def __init__(self, cache: Cache, pilot: str, link: ManagerLink, announce: Callable[[list[bytes]], None]) -> None:
        self.cache = cache
        self._pilot = pilot
        self._link = link
        self.announce = announce
        self.workers = ThreadPoolExecutor(8, "hpcq-files")
        self._idle: list[tuple[wire.Channel, float]] = []
        self._fetching: dict[bytes, asyncio.Lock] = {}
        self._door: Door | None = None
        self._giving = asyncio.Semaphore(GIVING)

    async def thread(self, function: Callable[..., T], *args: object, undo: Callable[[T], object] | None = None) -> T:
        """A blocking call; see `threads.call`."""
        return await threads.call(self.workers, function, *args, undo=undo)

    # --- getting ---

    async def obtain(self, digest: bytes, size: int, task: int) -> int:
        """A descriptor of a verified content, from the cache if it is there, else fetched into it.

        Raises:
            LostError: nobody has it.
            SourceError: it could not be read where it is, or has changed.
            DataError: it could not be transferred.
            OSError: it cannot be written here.
        """
        try:
            return await self.once(digest, size, lambda part: self._fetch(digest, size, task, part))
        except BaseException:
            self._missed(digest)
            raise

    async def fetch(self, digest: bytes, size: int, task: int, descriptor: int) -> None:
        """Write a content to an empty file, verified, past the cache; raises as `obtain`."""
        try:
            await self._fetch(digest, size, task, descriptor)
        finally:
            self._missed(digest)

    def _missed(self, digest: bytes) -> None:
        """Others are not to wait for us: we do not have it, or not to give it."""
        self._link.send(m.Holding([], [digest]))

    async def once(self, key: bytes, size: int, fetch: Callable[[int], Awaitable[None]], grows: bool = False) -> int:
        """The cached content ``key``, which ``fetch`` writes to a descriptor if it is not here yet.

        ``grows``: its size is not known beforehand.
        """
        wanted = None if grows else size
        found = await self.thread(self.cache.open, key, wanted, undo=_close)
        if found is not None:
            return found
        async with self._alone(key):
            found = await self.thread(self.cache.open, key, wanted, undo=_close)
            if found is None:
                found = await self._new(key, size, fetch, grows)
        self.announce([key])
        return found

    @contextlib.asynccontextmanager
    async def _alone(self, key: bytes) -> AsyncIterator[None]:
        """Nobody else here or on this node fetches it meanwhile."""
        own = self._fetching.setdefault(key, asyncio.Lock())
        async with own:
            lock = await _locked(self.cache, key)
            try:
                yield
            finally:
                self.cache.unlock(key, lock)
                self._fetching.pop(key, None)

    async def _new(self, key: bytes, size: int, fetch: Callable[[int], Awaitable[None]], grows: bool) -> int:
        fits = await self.thread(self.cache.make_room, max(size, 0))
        descriptor, part = self.cache.new_part()
        try:
            await fetch(descriptor)
            if grows:
                fits = await self.thread(self._fits, os.fstat(descriptor).st_size)
            if fits:
                self.cache.adopt(key, descriptor, part)
            return os.dup(descriptor)  # stays readable, also if it is not kept
        finally:
            self.cache.drop_part(descriptor, part)

    async def _fetch(self, digest: bytes, size: int, task: int, descriptor: int) -> None:
        avoid: set[str] = set()
        failures = 0
        while True:
            try:
                answer = await self._ask_manager(digest, size, task, descriptor, avoid)
                if answer is None:
                    return
                if isinstance(answer, wire.Elsewhere) and await self._from_peer(answer.peer, digest, size, descriptor):
                    return
                if isinstance(answer, wire.Elsewhere):
                    avoid.add(answer.peer.pilot)
            except wire.DataError as error:
                failures += 1
                log.warning("a file could not be fetched (attempt %d): %s", failures, error)
                if failures >= ATTEMPTS:
                    raise
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)

    async def _ask_manager(
        self, digest: bytes, size: int, task: int, descriptor: int, avoid: set[str]
    ) -> wire.Elsewhere | wire.Later | None:
        """None when the manager gave it."""
        async with self._to_manager() as channel:
            await channel.send(wire.Fetch(digest, task, sorted(avoid)))
            answer = await channel.receive(wire.FetchAnswer, wire.TURN_TIMEOUT)
            if isinstance(answer, wire.Nowhere):
                raise LostError(digest, answer.reason)
            if not isinstance(answer, wire.Coming):
                assert isinstance(answer, wire.Elsewhere | wire.Later)
                return answer
            total = digests.new_hash()
            await channel.receive_stream(descriptor, size, total)
        if total.digest() != digest:
            raise wire.SourceError("it was changed after the task was submitted")
        return None

    async def _from_peer(self, peer: wire.Peer, digest: bytes, size: int, descriptor: int) -> bool:
        info = self._link.info
        assert info is not None
        channel: wire.Channel | None = None
        try:
            tls = conn.pilot_tls(info)
            channel = await wire.connect(peer.addresses, peer.port, tls, conn.PILOT_NAME, self._pilot, self.workers)
            await channel.send(wire.Fetch(digest, 0, []))
            answer = await channel.receive(wire.FetchAnswer, ANSWER_TIMEOUT)
            if isinstance(answer, wire.Coming):
                total = digests.new_hash()
                await channel.receive_stream(descriptor, size, total)
                return total.digest() == digest
            log.info("pilot %s does not have a file any more", peer.pilot)
        except (wire.DataError, wire.SourceError, ProtocolError) as error:
            log.info("pilot %s did not give a file: %s", peer.pilot, error)
        finally:
            if channel is not None:
                channel.close()
        return False

    @contextlib.asynccontextmanager
    async def _to_manager(self) -> AsyncIterator[wire.Channel]:
        channel = self._kept() or await self._connect()
        try:
            yield channel
        except BaseException:
            channel.close()
            raise
        if len(self._idle) < IDLE_CHANNELS:
            self._idle.append((channel, time.monotonic()))
        else:
            channel.close()

    def _kept(self) -> wire.Channel | None:
        """The connection last used, if that is not long ago; then all others are older still."""
        if self._idle and time.monotonic() - self._idle[-1][1] < KEPT:
            return self._idle.pop()[0]
        self.hang_up()
        return None

    async def _connect(self) -> wire.Channel:
        info = self._link.info
        if info is None or self._link.lost.is_set():
            raise wire.DataError("the manager is gone")
        addresses = [self._link.address, *(a for a in info.addresses if a != self._link.address)]
        return await wire.connect(
            addresses, info.port, conn.pilot_tls(info), conn.MANAGER_NAME, self._pilot, self.workers
        )

    # --- giving ---

    async def store(self, request: wire.Store, chunks: Callable[[], Iterator[bytes]]) -> None:
        """Send an output to the manager.

        Raises:
            SourceError: it cannot be read here, or cannot be written there; names it.
            DataError: it could not be transferred.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._store(request, chunks())
                return
            except wire.DataError as error:
                log.warning("an output could not be sent (attempt %d): %s", attempt, error)
                if attempt == ATTEMPTS:
                    raise

    async def _store(self, request: wire.Store, chunks: Iterator[bytes]) -> None:
        async with self._to_manager() as channel:
            await channel.send(request)
            answer = await channel.receive(wire.Go | wire.Stored, wire.TURN_TIMEOUT)
            if isinstance(answer, wire.Go):
                answer = await self._stream_out(channel, chunks)
            if answer.error:
                raise wire.SourceError(answer.error)

    async def _stream_out(self, channel: wire.Channel, chunks: Iterator[bytes]) -> wire.Stored:
        """Send, and listen at the same time: a full disk there is no reason to send the rest."""
        loop = asyncio.get_running_loop()
        answer = loop.create_task(channel.receive(wire.Stored, None))
        sending = loop.create_task(channel.send_stream(chunks))
        try:
            await asyncio.wait({answer, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                await sending
                await asyncio.wait({answer}, timeout=ANSWER_TIMEOUT)
            if not answer.done():
                raise wire.DataError("the manager does not say that it has the output")
            stored = answer.result()
            assert isinstance(stored, wire.Stored)
            return stored
        finally:
            for task in (answer, sending):
                task.cancel()
            await asyncio.gather(answer, sending, return_exceptions=True)

    def keep(self, chunks: Iterator[bytes], kind: str, executable: bool) -> digests.Content:
        """Put an output into the cache until we end; blocks.

        Raises:
            OSError: it cannot be read or kept.
        """
        descriptor, part = self.cache.new_part()
        try:
            content = _write(descriptor, chunks, kind, executable)
            if not self._fits(content.size):
                raise OSError(f"it does not fit into the node's cache of {self.cache.limit >> 20} MB (--cache-size)")
            self.cache.adopt(content.digest, descriptor, part)
        finally:
            self.cache.drop_part(descriptor, part)
        if not self.cache.pin(content.digest):
            raise OSError("it was removed from the node's cache at once; make it larger (--cache-size)")
        return content

    def _fits(self, written: int) -> bool:
        return self.cache.make_room(written, written=True)

    # --- for other pilots ---

    async def serve(self) -> int:
        """Listen for other pilots; returns the port."""
        info = self._link.info
        assert info is not None
        self._door = Door(listener(None, 0), conn.peer_tls(info), self._stream)
        return self._door.port

    def _stream(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(CHUNK), self._on_peer)

    async def _on_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        channel = wire.Channel(reader, writer, self.workers, "another pilot")
        try:
            hello = await channel.receive(m.DataHello)
            if hello.protocol != m.PROTOCOL_VERSION:
                await channel.send(m.Refused("another version of hpcq"))
                return
            await channel.send(m.Welcome(m.PROTOCOL_VERSION, "", wire.STALL))
            async with self._giving:
                await self._give(channel, await channel.receive(wire.Fetch))
        except HpcqError as error:
            log.info("a file was not given to another pilot: %s", error)
        except asyncio.CancelledError:
            pass  # we are ending
        finally:
            channel.close()

    async def _give(self, channel: wire.Channel, request: wire.Fetch) -> None:
        descriptor = await self.thread(self.cache.open, request.digest, undo=_close)
        if descriptor is None:
            await channel.send(wire.Nowhere("not here any more"))
        else:
            try:
                await channel.send(wire.Coming())
                await channel.send_stream(digests.file_chunks(descriptor))
            finally:
                os.close(descriptor)
        with contextlib.suppress(HpcqError):
            await channel.drain_input()  # it hangs up when it has all

    # --- end ---

    def hang_up(self) -> None:
        """The manager is gone."""
        while self._idle:
            self._idle.pop()[0].close()

    async def close(self) -> None:
        """Stop listening, let go of what was kept."""
        self.hang_up()
        if self._door is not None:
            await self._door.close()
        self.cache.close()
        self.workers.shutdown(wait=False, cancel_futures=True)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _write(descriptor: int, chunks: Iterator[bytes], kind: str, executable: bool) -> digests.Content:
    def written() -> Iterator[bytes]:
        for piece in chunks:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
            yield piece

    return digests.of_chunks(written(), kind, executable)


async def _locked(cache: Cache, key: bytes) -> int:
    """The lock of a content; waits in a daemon thread, since another pilot may hold it for long and we may end."""
    loop = asyncio.get_running_loop()
    taken: asyncio.Future[int] = loop.create_future()

    def hand_over(descriptor: int) -> None:
        if taken.done():
            cache.unlock(key, descriptor)
        else:
            taken.set_result(descriptor)

    def wait() -> None:
        try:
            descriptor = cache.lock(key)
        except OSError as error:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_fail, taken, error)
            return
        try:
            loop.call_soon_threadsafe(hand_over, descriptor)
        except RuntimeError:  # the loop has ended
            cache.unlock(key, descriptor)

    threading.Thread(target=wait, name="hpcq-lock", daemon=True).start()
    return await taken


def _fail(future: asyncio.Future[int], error: OSError) -> None:
    if not future.done():
        future.set_exception(error)
