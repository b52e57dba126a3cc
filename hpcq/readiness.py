"""Ready pilots: what their words mean to the scheduler, and who waits for them. Pure; in the manager's thread."""

from __future__ import annotations

import concurrent.futures
import math

from hpcq import messages as m
from hpcq.errors import PilotFailedError, QueueClosedError
from hpcq.roster import Entry, Roster
from hpcq.scheduler import PilotReady, PilotTunnel


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
        ready = self._roster.ready_count
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


def _features(entry: Entry, message: m.Ready | m.TunnelUp) -> frozenset[str]:
    return frozenset({*message.features, f"tunnel={message.tunnel_mode}", f"host={entry.hostname}"})


def tunnel_event(entry: Entry, message: m.TunnelDown | m.TunnelUp) -> PilotTunnel:
    """What a change of a pilot's tunnel is to the scheduler."""
    if isinstance(message, m.TunnelDown):
        return PilotTunnel(entry.name, wan=False, usable=message.inside, features=frozenset({f"host={entry.hostname}"}))
    return PilotTunnel(entry.name, wan=True, features=_features(entry, message))


def ready_event(entry: Entry, message: m.Ready) -> PilotReady:
    """What a pilot's readiness is to the scheduler."""
    features = _features(entry, message)
    return PilotReady(
        entry.name,
        entry.cores,
        entry.memory,
        "wan" in features,
        entry.disk,
        entry.gpus,
        features,
        entry.hostname,
        message.time_left or math.inf,
    )
