"""The manager's end of data connections: gives contents out, takes outputs in. See `wire` for what is said.

At most `STREAMS` contents flow at once each way; a `Fetch` that has to wait is answered `Later` after `PARK` seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable

from hpcq.errors import HpcqError
from hpcq.files import threads, wire
from hpcq.files.desk import Desk, Origin
from hpcq.files.holders import Give, Nobody, TakeFrom
from hpcq.files.landing import Landing

log = logging.getLogger("hpcq.files")

STREAMS = 8
PARK = 15.0

IDLE = 60.0
"""Seconds a connection is kept that nothing comes on: each takes an open file, of which a thousand pilots need many."""

FAREWELL = 30.0
"""Seconds in which what is being written to a disk has to be there, at the end."""


class Counter:
    """Serves all data connections of a queue."""

    def __init__(self, desk: Desk, peer: Callable[[str], wire.Peer]) -> None:
        self._desk = desk
        self._peer = peer
        self._giving = asyncio.Semaphore(STREAMS)
        self._taking = asyncio.Semaphore(STREAMS)
        self._changed = asyncio.Event()
        self._lives: dict[asyncio.Task[None], str] = {}

    def changed(self) -> None:
        """Somebody has, or gets, something now or no more: look again for those who wait."""
        self._changed.set()
        self._changed = asyncio.Event()

    def accept(self, channel: wire.Channel, pilot: str) -> None:
        """Serve this connection until it ends."""
        life = asyncio.get_running_loop().create_task(self._serve(channel, pilot))
        self._lives[life] = pilot
        life.add_done_callback(self._lives.pop)

    async def _serve(self, channel: wire.Channel, pilot: str) -> None:
        try:
            with contextlib.suppress(wire.DataError):  # it hung up: what it wanted it will ask for again
                while True:
                    request = await channel.receive(wire.Request, IDLE)
                    if isinstance(request, wire.Fetch):
                        await self._fetch(channel, pilot, request)
                    else:
                        await self._store(channel, pilot, request)
        except HpcqError as error:
            log.warning("a data connection of pilot %s ends: %s", pilot, error)
        finally:
            channel.close()

    # --- out ---

    async def _fetch(self, channel: wire.Channel, pilot: str, request: wire.Fetch) -> None:
        holders, digest = self._desk.holders, request.digest
        deadline = asyncio.get_running_loop().time() + PARK
        while True:
            origins = self._desk.origins(digest)
            answer = holders.ask(pilot, digest, set(request.avoid), bool(origins))
            if isinstance(answer, Give):
                await self._give(channel, pilot, digest, origins)
            elif isinstance(answer, TakeFrom):
                await channel.send(wire.Elsewhere(self._peer(answer.pilot)))
            elif isinstance(answer, Nobody):
                await channel.send(wire.Nowhere("no pilot has it any more", lost=True))
            elif await self._wait(deadline):
                continue
            else:
                await channel.send(wire.Later())
            return

    async def _wait(self, deadline: float) -> bool:
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _give(self, channel: wire.Channel, pilot: str, digest: bytes, origins: list[Origin]) -> None:
        try:
            async with self._giving:
                await channel.send(wire.Coming())
                with contextlib.suppress(wire.SourceError):  # the pilot was told why
                    await channel.send_stream(origins[-1].chunks())
        except BaseException:
            self._desk.holders.ended(pilot, digest)
            self.changed()
            raise

    # --- in ---

    async def _store(self, channel: wire.Channel, pilot: str, request: wire.Store) -> None:
        async with self._taking:
            try:
                landing = await self._desk.land(request.task, pilot, request.name, request.kind, request.executable)
                await channel.send(wire.Go())
                await self._receive(channel, landing)
            except wire.SourceError:
                return  # the pilot knows
            except OSError as error:
                await channel.send(wire.Stored(wire.describe(error)))
                await self._hear_out(channel)
                return
        await channel.send(wire.Stored())

    async def _receive(self, channel: wire.Channel, landing: Landing) -> None:
        try:
            writer = landing.writer()
            try:
                await channel.receive_stream(writer)
            finally:
                os.close(writer)
            await threads.call(self._desk.workers, landing.complete)
        except BaseException as error:
            landing.drop()
            if isinstance(error, OSError) and error.filename is None:
                raise OSError(error.errno, error.strerror, str(landing.destination)) from error
            raise

    async def _hear_out(self, channel: wire.Channel) -> None:
        """Let the pilot read our refusal before the connection goes: it hangs up when it has."""
        with contextlib.suppress(HpcqError):
            await channel.drain_input()
        raise wire.DataError("an output could not be taken")

    # --- end ---

    async def close(self) -> None:
        """Hang up on all."""
        for life in list(self._lives):
            life.cancel()
        if self._lives:
            ended, _ = await asyncio.wait(list(self._lives), timeout=FAREWELL)
            for life in ended:
                life.cancelled() or life.exception()

    def hang_up(self, pilot: str) -> None:
        """This pilot is gone."""
        for life, name in list(self._lives.items()):
            if name == pilot:
                life.cancel()
