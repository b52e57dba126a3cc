"""The connections of one manager: who they are from, whether they may come in, whether they are still there.

A first word decides what a connection is: a pilot's, a client's of the command line, or one for contents, which goes to
`files`, or for parcels, which goes to the `depot`. A pilot that connects again takes the place of its old connection,
whose end is told first. In the manager's thread; what pilots say after their first word is the manager's (`Owner`).

Failure cases: a stranger fails in TLS; another version is refused with both versions named; a link silent for
`SILENCE_LIMIT` is dropped; at the end pilots are told, given time to hang up, then hung up on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from hpcq import connection as conn
from hpcq import messages as m
from hpcq import transport
from hpcq.addresses import raise_descriptor_limit
from hpcq.door import Door, listener
from hpcq.files.depot import Depot
from hpcq.files.service import FileService
from hpcq.questions import Questions
from hpcq.roster import Entry, Roster
from hpcq.versions import mismatch, versions

log = logging.getLogger("hpcq.manager")

SILENCE_LIMIT = 60.0
"""Seconds without a byte after which the other side counts as gone."""


LOOK_EVERY = 1.0
"""Seconds between two looks for silent links."""

CROWDED = 0.7
"""Pilots per open file allowed at which the user is told: each takes one, and moves files by another."""


class Owner(Protocol):
    """What the manager does about its pilots."""

    def arrived(self, entry: Entry) -> None:
        """A pilot has presented itself and was let in."""

    def said(self, link: transport.Link, entry: Entry, message: Any) -> None:
        """A pilot sent this."""

    def gone(self, entry: Entry, reason: str) -> None:
        """A pilot's connection has ended; told once a connection."""


class Links:
    """All connections of one queue."""

    def __init__(  # noqa: PLR0917 - all six differ in type
        self, queue: str, owner: Owner, roster: Roster, questions: Questions, files: FileService, depot: Depot
    ) -> None:
        self._queue = queue
        self._owner = owner
        self._roster = roster
        self._questions = questions
        self._files = files
        self._depot = depot
        self._by_pilot: dict[str, transport.Link] = {}
        self._entries: dict[transport.Link, Entry | None] = {}  # None: a client
        self._door: Door | None = None
        self._closing = False
        self._limit = raise_descriptor_limit()
        self._warned = False
        self._emptied: asyncio.Future[None] | None = None
        self._looked_at = 0.0

    async def listen(self, address: str | None, ports: Sequence[int], identity: conn.Identity) -> int:
        """Serve whoever knows the queue's key, on the first port that is free; returns it. Raises OSError."""
        make = partial(transport.manager_side, self._on_messages, self._on_closed)
        tls = conn.manager_tls(identity)
        for port in ports:
            try:
                self._door = Door(listener(address, port), tls, make)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or port == ports[-1]:
                    raise
        assert self._door is not None
        return self._door.port

    def get(self, pilot: str) -> transport.Link | None:
        """The link of a pilot; None when it has gone."""
        return self._by_pilot.get(pilot)

    def keep(self, now: float) -> None:
        """Drop who is silent, say a word where we were; ``now`` is the loop's time. All links are looked at, but not
        more often than `LOOK_EVERY`."""
        if now < self._looked_at + LOOK_EVERY:
            return
        self._looked_at = now
        for link in list(self._entries):
            if now - link.heard_at > SILENCE_LIMIT:
                link.abort(f"nothing heard for {SILENCE_LIMIT:.0f} s")
            elif now - link.spoke_at > SILENCE_LIMIT / 4 and self._entries[link] is not None:
                link.send(m.Heartbeat())

    def shut(self) -> None:
        """Let nobody in any more."""
        self._closing = True
        if self._door is not None:
            self._door.shut()

    async def dismiss(self, timeout: float, reason: str) -> None:
        """Send everybody away; whoever has not hung up after ``timeout`` seconds (0: nobody is told) is hung up on."""
        loop = asyncio.get_running_loop()
        if timeout:
            for link in list(self._entries):
                link.send(m.Leave(reason, drain=False))
        deadline = loop.time() + timeout
        while self._entries and loop.time() < deadline:
            self._emptied = loop.create_future()
            loop.call_at(deadline, _resolve, self._emptied)
            await self._emptied
        for link in list(self._entries):
            link.abort(reason)

    async def close(self) -> None:
        """End the listening, and those whose handshake was under way."""
        if self._door is not None:
            await self._door.close()

    def _on_messages(self, link: transport.Link, received: list[Any]) -> None:
        if link not in self._entries:
            self._greet(link, received[0])
            return
        entry = self._entries[link]
        for message in received:
            if entry is None:
                self._questions.answer(link, message)
            else:
                self._owner.said(link, entry, message)

    def _greet(self, link: transport.Link, hello: m.PilotHello | m.ClientHello | m.DataHello) -> None:
        reason = self._objection(hello)
        if reason:
            log.warning("refused %s: %s", link.peer, reason)
            link.send(m.Refused(reason))
            link.close(reason)
            return
        link.send(m.Welcome(m.PROTOCOL_VERSION, self._queue, SILENCE_LIMIT))
        if isinstance(hello, m.DataHello) and hello.parcels:
            self._depot.accept(link.hand_over(), hello.pilot, link.peer)
        elif isinstance(hello, m.DataHello):
            self._files.accept(link, hello.pilot)
        elif isinstance(hello, m.ClientHello):
            link.connection.expect(m.FromClient)
            self._entries[link] = None
        elif self._files.is_settling(hello.pilot):
            link.abort("its last results are still being stored")  # it comes again
        else:
            self._admit(link, hello)

    def _admit(self, link: transport.Link, hello: m.PilotHello) -> None:
        previous = self._by_pilot.get(hello.pilot)
        if previous is not None:
            previous.abort("the pilot has connected again")
            self._gone(previous, "the pilot has connected again")
        entry = self._roster.arrived(hello, time.time())
        self._entries[link] = entry
        self._by_pilot[hello.pilot] = link
        if not self._warned and len(self._by_pilot) > self._limit * CROWDED:
            self._warned = True
            log.warning(
                "%d pilots are connected, and this process may open %d files at most: raise the limit before the "
                "program starts (`ulimit -n`, or ask the site for a higher hard limit)",
                len(self._by_pilot),
                self._limit,
            )
        self._owner.arrived(entry)

    def _objection(self, hello: m.PilotHello | m.ClientHello | m.DataHello) -> str:
        if self._closing:
            return f"queue {self._queue} is closing"
        if hello.protocol != m.PROTOCOL_VERSION:
            return f"protocol {hello.protocol} is not {m.PROTOCOL_VERSION}; use the same version of hpcq on both sides"
        if isinstance(hello, m.DataHello) and hello.pilot not in self._by_pilot:
            return f"no pilot {hello.pilot} is connected"
        return mismatch(versions(), hello.versions) if isinstance(hello, m.PilotHello) else ""

    def _on_closed(self, link: transport.Link, reason: str) -> None:
        self._gone(link, reason)
        if self._emptied is not None and not self._entries:
            _resolve(self._emptied)

    def _gone(self, link: transport.Link, reason: str) -> None:
        entry = self._entries.pop(link, None)
        if entry is None:
            return
        self._roster.closed(entry, reason)
        del self._by_pilot[entry.name]
        self._owner.gone(entry, reason)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
