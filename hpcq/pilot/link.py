"""Finding and keeping the manager.

The connection file is read anew at each attempt, so a program started later, or again, is found; where its content came
with the job instead, a program that listens at the same place. There is no event for "a file on a shared file system
has changed" or "a port now listens": attempts are made every `RETRY` seconds until the pilot's manager timeout is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hpcq import connection as conn
from hpcq import messages as m
from hpcq import transport
from hpcq.errors import AuthenticationError, HpcqError, QueueNotFoundError

log = logging.getLogger("hpcq.pilot")

RETRY = 2.0
"""Seconds between two attempts to reach a manager."""


class ManagerLink:
    """The way to the manager, by a connection file or what was in one. ``on_message`` gets what it says after the
    welcome; `lost` is set while there is none.
    """

    def __init__(
        self, source: Path | conn.ConnectionInfo, hello: Callable[[], m.PilotHello], on_message: Callable[[Any], None]
    ) -> None:
        self._source = source
        self._hello = hello
        self._on_message = on_message
        self._link: transport.Link | None = None
        self._heart: asyncio.TimerHandle | None = None
        self.lost = asyncio.Event()
        self.lost.set()
        self.lost_because = ""
        self.info: conn.ConnectionInfo | None = None
        self.address = ""

    async def connect(self, timeout: float) -> m.Welcome:
        """Reach the manager and be welcomed, trying again for ``timeout`` seconds.

        Raises:
            AuthenticationError: its key is not the queue's.
            QueueNotFoundError: it did not answer in all that time, or refused us; says what happened last.
        """
        loop = asyncio.get_running_loop()
        began, said = loop.time(), ""
        deadline = began + timeout
        while True:
            try:
                return await self._attempt()
            except AuthenticationError:
                raise
            except HpcqError as error:
                if isinstance(error, RefusedError) or loop.time() + RETRY > deadline:
                    tried = f"(tried for {loop.time() - began:.0f} s{self._hint()})"
                    raise QueueNotFoundError(f"{error} {tried}") from error
                if str(error) != said:
                    said = str(error)
                    log.info("%s; trying again for %.0f s", error, deadline - loop.time())
            await asyncio.sleep(RETRY)

    def _hint(self) -> str:
        if isinstance(self._source, Path):
            return ""
        return "; the connection data came with the job: a program started since then listens elsewhere"

    async def _attempt(self) -> m.Welcome:
        info = conn.read(self._source) if isinstance(self._source, Path) else self._source
        if not info.port:
            raise QueueNotFoundError(f"no program has been started for queue {info.queue!r} yet")
        first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        link = await transport.connect(
            info, lambda: transport.pilot_side(partial(self._received, first), partial(self._closed, first))
        )
        link.send(self._hello())
        try:
            async with asyncio.timeout(transport.FIRST_WORD_TIMEOUT):
                welcome = await first
        except TimeoutError as error:
            link.abort("no welcome")
            raise QueueNotFoundError(f"the manager on {info.hostname} does not say welcome") from error
        if isinstance(welcome, m.Refused):
            raise RefusedError(f"the manager on {info.hostname} refused this pilot: {welcome.reason}")
        assert isinstance(welcome, m.Welcome)
        self._link = link
        self.info, self.address = info, link.peer.rsplit(":", 1)[0]
        self.lost.clear()
        if self._heart is not None:  # of a connection that was lost a moment ago
            self._heart.cancel()
        self._beat(welcome.silence_limit)
        return welcome

    def _received(self, first: asyncio.Future[Any], _link: transport.Link, messages: list[Any]) -> None:
        """``first``: for the first word of this very connection; one that was given up has it cancelled."""
        for message in messages:
            if not first.done():
                first.set_result(message)
            elif not first.cancelled() and not isinstance(message, m.Heartbeat):
                self._on_message(message)

    def _closed(self, first: asyncio.Future[Any], link: transport.Link, reason: str) -> None:
        if not first.done():
            first.set_exception(
                QueueNotFoundError(f"the manager hung up before a welcome, as if it did not know our key: {reason}")
            )
        if link is self._link:
            self._link = None
            self.lost_because = reason
            self.lost.set()

    def _beat(self, silence_limit: float) -> None:
        """Keep the link alive, and notice when the other side does not."""
        link = self._link
        if link is None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() - link.heard_at > silence_limit:
            link.abort(f"nothing heard from the manager for {silence_limit:.0f} s")
            return
        if loop.time() - link.spoke_at > silence_limit / 4:
            link.send(m.Heartbeat())
        self._heart = loop.call_later(silence_limit / 12, self._beat, silence_limit)

    def send(self, message: Any, *, now: bool = False) -> None:
        """Send, or begin to before this returns; lost with the link if there is none."""
        if self._link is not None:
            self._link.send(message, now=now)

    async def close(self, reason: str, timeout: float = 5.0) -> None:
        """Let what was sent arrive, then hang up."""
        if self._heart is not None:
            self._heart.cancel()
        link = self._link
        if link is None:
            return
        link.close(reason)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.lost.wait()
        link.abort(reason)


class RefusedError(HpcqError):
    """The manager refused this pilot; trying again is useless."""
