"""What the manager sees of files: one object that joins `desk`, `counter` and the pilots' addresses.

Tasks without files pass it by.
"""

from __future__ import annotations

from collections import Counter as Counting
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hpcq import messages as m
from hpcq.files import wire
from hpcq.files.counter import Counter
from hpcq.files.desk import Desk
from hpcq.files.pack import CHUNK
from hpcq.outcome import Outcome

if TYPE_CHECKING:
    from hpcq.roster import Entry
    from hpcq.transport import Link


class FileService:
    """Made with the manager, set up when the first task with files (or a pilot) comes; used in its thread only."""

    def __init__(
        self,
        release: Callable[[Any], None],
        finish: Callable[[int, Outcome, str], None],
        spawn: Callable[..., None],
        ended: Callable[[Entry, list[m.TaskResult]], None],
    ) -> None:
        self._spawn = spawn
        self._ended = ended
        self._desk = Desk(release, finish, spawn)
        self._counter = Counter(self._desk, self._peer)
        self._peers: dict[str, wire.Peer] = {}
        self._settling: Counting[str] = Counting()
        self._goodbyes: dict[str, Callable[[], None]] = {}

    @property
    def held_count(self) -> int:
        """Tasks waiting for their files."""
        return self._desk.held_count

    def held(self) -> Iterator[tuple[int, float]]:
        """See `Desk.held`."""
        return self._desk.held()

    def why_held(self, number: int) -> str | None:
        """See `Desk.why_held`."""
        return self._desk.why_held(number)

    def has_inputs(self, number: int) -> bool:
        """See `Desk.has_inputs`."""
        return self._desk.has_inputs(number)

    def admit(self, submission: Any) -> None:
        """A task with files."""
        self._desk.admit(submission)

    def cancel(self, tasks: Iterable[int]) -> None:
        """End those of these that wait for their files."""
        self._desk.cancel(tasks)

    def absorbs(self, number: int, outcome: Outcome, report: m.TaskResult | None) -> bool:
        """A task with files has ended; whether that is no concern of the user's (it, or its producer, runs again)."""
        lost = report.lost_input if report is not None and outcome is Outcome.FILES else b""
        if lost and self._desk.revives(number, lost):
            return True
        again = self._desk.is_again(number)
        self._desk.done(number)
        return again

    def settle(self, entry: Entry, results: list[m.TaskResult]) -> list[m.TaskResult]:
        """The results that need nothing done to files; the others follow through ``ended``."""
        if not any(self._desk.concerns(result) for result in results):
            return results
        self._settling[entry.name] += 1
        self._spawn(self._settle, entry, [result for result in results if self._desk.concerns(result)])
        return [result for result in results if not self._desk.concerns(result)]

    async def _settle(self, entry: Entry, results: list[m.TaskResult]) -> None:
        try:
            for result in results:
                self._ended(entry, [await self._desk.settle(entry.name, result)])
        finally:
            self._settling[entry.name] -= 1
            if not self.is_settling(entry.name) and entry.name in self._goodbyes:
                self._forget(entry.name, self._goodbyes.pop(entry.name))

    def is_settling(self, pilot: str) -> bool:
        """Whether results of this pilot wait for their outputs to be put in place."""
        return self._settling[pilot] > 0

    # --- pilots ---

    def pilot_ready(self, pilot: str, ready: m.Ready) -> None:
        """Where it gives contents to others, if it does."""
        if ready.data_port:
            self._peers[pilot] = wire.Peer(pilot, ready.data_addresses, ready.data_port)
            self._desk.holders.pilot_serves(pilot)

    def holding(self, pilot: str, message: m.Holding) -> None:
        """What it has now, and what it will not have. Of what was there before we remember what concerns us: caches
        of a thousand nodes may have a hundred thousand files each."""
        holders = self._desk.holders
        for digest in message.digests:
            holders.gained(pilot, digest)
        for digest in message.cached:
            if self._desk.knows(digest):
                holders.gained(pilot, digest)
        for digest in message.missed:
            holders.ended(pilot, digest)
        self._counter.changed()

    def pilot_gone(self, pilot: str, then: Callable[[], None]) -> None:
        """It has nothing any more; ``then`` is called when the last results it sent have been told."""
        self._peers.pop(pilot, None)
        self._counter.hang_up(pilot)
        self._desk.holders.pilot_gone(pilot)
        self._counter.changed()
        if self.is_settling(pilot):
            self._goodbyes[pilot] = then
        else:
            self._forget(pilot, then)

    def _forget(self, pilot: str, then: Callable[[], None]) -> None:
        del self._settling[pilot]
        self._desk.pilot_gone(pilot)
        then()

    def _peer(self, pilot: str) -> wire.Peer:
        return self._peers[pilot]

    def accept(self, link: Link, pilot: str) -> None:
        """A data connection of this pilot."""
        reader, writer = link.detach(CHUNK)
        self._counter.accept(wire.Channel(reader, writer, self._desk.workers, link.peer), pilot)

    async def close(self) -> None:
        """Hang up, leave nothing unfinished behind."""
        await self._counter.close()
        self._desk.close()
