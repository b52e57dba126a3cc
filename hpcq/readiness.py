"""Who waits until pilots are ready, and when they have waited long enough. Pure; in the manager's thread."""

from __future__ import annotations

import concurrent.futures

from hpcq.errors import PilotFailedError, QueueClosedError
from hpcq.roster import Entry, PilotState, Roster


class Readiness:
    """The waiters of `Queue.wait_for_pilots`: each wants a number of ready pilots, or to hear of a failed one."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._waiters: list[tuple[int, concurrent.futures.Future[None]]] = []

    def expect(self, count: int, waiter: concurrent.futures.Future[None]) -> None:
        """Resolve ``waiter`` when ``count`` pilots are ready, which may be now."""
        self._waiters.append((count, waiter))
        self.tell()

    def tell(self, failed: Entry | None = None) -> None:
        """A pilot became ready, or ``failed`` to: a `PilotFailedError` for those who still wait."""
        if not self._waiters:
            return
        ready = sum(entry.state is PilotState.READY for entry in self._roster.entries.values())
        for count, waiter in self._waiters:
            if waiter.done():  # whoever waited has given up
                continue
            if ready >= count:
                waiter.set_result(None)
            elif failed is not None:
                where = f"pilot {failed.name} on {failed.hostname}"
                waiter.set_exception(
                    PilotFailedError(f"{where} cannot serve ({failed.failed_layer}): {failed.message}")
                )
        self._waiters = [one for one in self._waiters if not one[1].done()]

    def close(self, queue: str) -> None:
        """Nobody will become ready any more."""
        for _, waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(QueueClosedError(f"queue {queue!r} is closed"))
        self._waiters = []
