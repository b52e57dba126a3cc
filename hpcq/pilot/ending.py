"""Why a pilot ends, and how long its tasks may go on: the first reason counts, a second signal hurries.

May not live here: what is done about it (see `main`).
"""

from __future__ import annotations

import asyncio
import math
from typing import NamedTuple

WALLTIME_MARGIN = 15.0
"""Seconds before the end of the walltime by which everything must be over."""

SAME_SIGNAL = 1.0
"""Seconds within which two signals are one: a batch system signals the job's script, which passes it on, and us."""


class End(NamedTuple):
    """Why a pilot ends: what to tell, with which status, how long running tasks may go on."""

    reason: str
    status: int = 0
    drain: float = 0.0
    layer: str = ""


class Ending:
    """Of one pilot, whose walltime ends at ``ends_at`` by the loop's time (infinity: never). ``drain`` is the time in
    seconds that tasks have to end when it is not known how much there is."""

    def __init__(self, ends_at: float, drain: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._drain = drain
        self._signalled_at = -math.inf
        self._warning_due = False
        self.ends_at = ends_at
        self.decided: asyncio.Future[End] = self._loop.create_future()
        self.hurry = asyncio.Event()

    def finish(self, end: End) -> None:
        """End the pilot, if that is not decided yet."""
        if not self.decided.done():
            self.decided.set_result(end)

    def signalled(self, name: str) -> None:
        """The signal came that asks us to end."""
        now = self._loop.time()
        if self._warning_due:  # that the walltime ends, which we know: Slurm's may come a minute early, or late
            self._warning_due = False
        elif self.decided.done() and now - self._signalled_at > SAME_SIGNAL:
            self.hurry.set()
        self._signalled_at = now
        self.finish(End(f"it got {name}", drain=self._time_to_drain()))

    def watch_walltime(self) -> None:
        """Begin to end in time for tasks to be over at the walltime's end."""
        if self.ends_at < math.inf:
            begin = self.ends_at - self._drain - WALLTIME_MARGIN
            self._loop.call_at(begin, self._walltime_ends)

    def _walltime_ends(self) -> None:
        self._warning_due = not self.decided.done()
        self.finish(End("its walltime ends", drain=self._drain))

    def time_left(self) -> float:
        """Seconds until we begin to end."""
        return max(self.ends_at - self._drain - WALLTIME_MARGIN - self._loop.time(), 1e-3)

    def _time_to_drain(self) -> float:
        """Before the walltime's end, the time to it; at any other SIGTERM we do not know how much there is."""
        left = self.ends_at - self._loop.time() - WALLTIME_MARGIN
        return left if 0 < left < 10 * self._drain else self._drain
