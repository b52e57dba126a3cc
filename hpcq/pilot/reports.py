"""What the pilot tells of its tasks: gathered into few messages, and held back while it is not known what to tell.

That a task has begun is told with its result if that comes within `SOON`: to tell a thing apart wakes the manager for
it, which takes more than a short task itself. The manager knows how to treat a pilot's end in between.

Two kinds of failure wait a moment, because the task may not be to blame:

- a command that a signal ended (`CODES_FROM_OUTSIDE`): the batch system signals all processes of a job it ends, and
  tasks may die of that before our own signal has arrived;
- a task with ``network="wan"`` that failed by itself: the tunnel is asked whether it leads anywhere (`Tunnel.judge`).

May not live here: what a task did (`core`), its files (`staging`) and large results (`parcels`), which come before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hpcq import messages as m
from hpcq.outcome import Outcome
from hpcq.pilot.core import Core
from hpcq.pilot.deaths import CODES_FROM_OUTSIDE, NEWS_TIMEOUT
from hpcq.pilot.lanes import Report
from hpcq.pilot.link import ManagerLink

log = logging.getLogger("hpcq.pilot")

UPDATE_BYTES = 32 * 1024 * 1024
"""Results are sent in messages of about this size at most, so that none blocks the link for long."""


SOON = 0.002
"""Seconds in which a task's result may come, and say by itself that it was begun."""


class Reports:
    """The last thing a result passes through. ``judge`` says why the tunnel leads nowhere, or nothing if it does."""

    def __init__(self, link: ManagerLink, core: Core, judge: Callable[[], Awaitable[str]]) -> None:
        self._link = link
        self._core = core
        self._judge = judge
        self._loop = asyncio.get_running_loop()
        self._update = m.Update([], [])
        self._doubtful: list[m.TaskResult] = []
        self._suspects: list[m.TaskResult] = []
        self._judging: asyncio.Task[None] | None = None
        self._sending: asyncio.Handle | None = None
        self._sending_later: asyncio.TimerHandle | None = None

    def add(self, report: Report) -> None:
        """Tell this, with all else of this turn of the loop; mere beginnings with what comes next."""
        self._update.started.extend(report.started)
        self._update.results.extend(self._certain(report.results))
        if report.returned or report.answers:
            self._send()  # a task that was announced and comes back: in this order
            self._link.send(m.Returned(report.returned))
        elif self._update.results or report.announce:
            if self._sending is None:
                self._sending = self._loop.call_soon(self._send)
        elif self._update.started and self._sending_later is None:
            self._sending_later = self._loop.call_later(SOON, self._send)

    def _certain(self, results: list[m.TaskResult]) -> list[m.TaskResult]:
        """All but those that wait."""
        return self._without_doubtful(self._without_suspects(results) if self._core.suspects else results)

    def _without_doubtful(self, results: list[m.TaskResult]) -> list[m.TaskResult]:
        doubtful = [one for one in results if one.exit_code in CODES_FROM_OUTSIDE]
        if not doubtful or self._core.job_ends:
            return results
        self._doubtful += doubtful
        self._loop.call_later(NEWS_TIMEOUT, self._tell_doubtful)
        return [one for one in results if one.exit_code not in CODES_FROM_OUTSIDE]

    def _tell_doubtful(self) -> None:
        doubtful, self._doubtful = self._doubtful, []
        self._update.results.extend(self._core.excused(one) for one in doubtful)
        self._send()

    def _without_suspects(self, results: list[m.TaskResult]) -> list[m.TaskResult]:
        suspects = self._core.suspects
        found = [one for one in results if one.id in suspects]
        if not found:
            return results
        self._suspects += found
        if self._judging is None:
            self._judging = self._loop.create_task(self._judge_suspects())
        certain = [one for one in results if one.id not in suspects]
        suspects.difference_update(one.id for one in found)
        return certain

    async def _judge_suspects(self) -> None:
        while self._suspects:
            count = len(self._suspects)
            try:
                why = await self._judge()
            except Exception:
                log.exception("the tunnel could not be judged")
                why = ""
            suspects, self._suspects = self._suspects[:count], self._suspects[count:]
            for one in suspects:
                if why:
                    one.outcome, one.message = Outcome.NETWORK.value, f"the tunnel was down: {why}"
            self._update.results.extend(suspects if why else self._without_doubtful(suspects))
            self._send()
        self._judging = None

    async def settle(self) -> None:
        """Wait until nothing is held back for the tunnel's sake; it takes seconds at most."""
        if self._judging is not None:
            await asyncio.wait([self._judging])

    def finish(self) -> None:
        """Tell everything now, as it is: these are our last words."""
        if self._judging is not None:
            self._judging.cancel()
        self._doubtful += self._suspects
        self._suspects = []
        self._tell_doubtful()

    def drop(self) -> None:
        """There is nobody to tell it to, and who comes next does not know of these tasks."""
        self._update, self._doubtful, self._suspects = m.Update([], []), [], []
        self._core.suspects.clear()
        if self._judging is not None:
            self._judging.cancel()
            self._judging = None

    def _send(self) -> None:
        for handle in (self._sending, self._sending_later):
            if handle is not None:
                handle.cancel()
        self._sending = self._sending_later = None
        update, self._update = self._update, m.Update([], [])
        started = update.started
        if started and update.results:
            ended = {result.id for result in update.results}
            started = [number for number in started if number not in ended]
        part: list[m.TaskResult] = []
        size = 0
        for result in update.results:
            part.append(result)
            size += len(result.payload) + len(result.std_output) + len(result.std_error)
            if size > UPDATE_BYTES:
                self._link.send(m.Update([], part), now=True)
                part, size = [], 0
        if part or started:
            self._link.send(m.Update(started, part), now=True)
