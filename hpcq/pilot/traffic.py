"""Counting the bytes that tasks send and receive through the tunnel, and telling whose they were.

Who does what::

    vpn's holder --two sockets of sock_diag(7), made in the namespace (SCM_RIGHTS)--> `Watch`, one for each session
    (mode ``socks``: the host's own, and the ports that its programs' connections go to)
    kernel --a connection has ended, with its counters--> `Watch.ended`           (when it happens, in our loop)
    `Counting` --who is there?--> kernel, then /proc/PID/fd for what is new       (a look, in a thread)
    `account` --whose?--> what each task is told (`TaskResult`), and the pilot's totals (`messages.Traffic`)

Looks are taken while tasks run in the tunnel: soon after a task or a connection has begun, then ever more seldom, down
to one in `INTERVAL` seconds; one a while after short tasks and connections that ended meanwhile, for the totals; and
when a task has ended: its result waits for that (`ended`), a fiftieth of its time and 20 ms at most. So what was in the
kernel when it ended is counted. A connection that came and went between two looks is known by its end, but not whose it
was: it counts for the task that was the only one at work then. With several at work it is missed, and counts for none;
then looks are taken as often as they take no more than one part in `CALM` of a core, until nothing was missed for
`ALERT` seconds. Tasks of less than `BRIEF` seconds are not looked at, and are told nothing, unless their runner had a
connection from before; nor are those during which much was missed.

What is not counted: UDP, and what stays on the node. What is the pilot's and no task's: inputs fetched for tasks,
CVMFS, the tunnel's own probes (a few bytes, which may count for a task that is alone). A connection that an interpreter
keeps from task to task counts for each from look to look, so a little of one may be the next one's.

When the tunnel is made anew its session has a watch of its own, and the old one's ends with the old session: sums go
on. Our sockets keep a namespace alive, so they are closed before its session is. Failures: a kernel that has no
sock_diag, or refuses it, is logged once, and nothing is told (None, not 0); nor in mode ``none``. One that only refuses
to tell of ends: connections between two looks are missed. More ends than the socket holds (on a node with mode
``socks``: also other users') are lost, and what they had carried since the look before (logged once). Counters are of
64 bits and each connection's own, so none wraps or is set back; a figure below an earlier one counts as that. Whatever
goes wrong here costs figures only.

Without a tunnel there is no watch: no look, no thread, nothing for each task.
May not live here: whose a connection is (`account`), what the kernel's answers look like (`sockdiag`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq.pilot.account import Account, Span
from hpcq.pilot.lanes import Report
from hpcq.pilot.watch import Place, Watch
from vpn import Session, TunnelError

log = logging.getLogger("hpcq.pilot")

INTERVAL = 1.0
"""Seconds between two looks, at most, while tasks run."""

TICK = 0.5
"""Seconds after which it is seen that tasks have begun, at most, while others are at work."""

BRIEF = 0.1
"""Seconds a task must take to be looked at for its own sake."""

CALM, BUSY = 50, 20
"""Looks take at most one part in so many of a core's time; those that results wait for, one in fewer."""

SOONEST = 0.005
"""Seconds between two looks at least."""

ALERT = 10.0
"""Seconds for which looks are frequent after a connection was missed."""

GRACE_SHARE, GRACE = 50, 0.02
"""A task's last connections get one part in so many of its time, and so many seconds at most, to end."""

PATIENCE = 1.0
"""Seconds a result waits for the kernel's word on a connection that is gone; there is none when it was lost."""

REPORT, IDLE = 2.0, 0.25
"""Seconds between two reports of the pilot's totals; the latter, and between looks for them, when no task runs:
somebody may be waiting for what the last one has carried.
"""


class Held(msgspec.Struct):
    """The result of a task, waiting for a look that is taken at ``due`` or later."""

    lane: int
    since: float
    due: float
    result: m.TaskResult | None = None


class Counting:
    """All of it, for one pilot. ``places`` gives the runners inside the tunnel, ``release`` takes results that waited,
    ``tell`` the totals.
    """

    def __init__(
        self,
        places: Callable[[], list[Place]],
        release: Callable[[Report], None],
        tell: Callable[[m.Traffic], None],
    ) -> None:
        self._places = places
        self._release = release
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._account = Account()
        self._watches: list[Watch] = []
        self._held: dict[int, Held] = {}
        self._lanes: set[int] = set()
        self._errands = 0
        self._others = self._counted = self._brief = False
        self._looked = self._alert = self._told_at = -math.inf
        self._told: m.Traffic | None = None
        self._cost = 0.0
        self._pace = INTERVAL
        self._asleep = False
        self._news = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._running = self._loop.create_task(self._run())
        self._running.add_done_callback(self._over)

    @property
    def active(self) -> bool:
        """Whether anything is counted."""
        return bool(self._watches)

    def received(self) -> int | None:
        """Bytes that have come through the tunnel so far; None where nothing is counted."""
        return self._account.total.received if self._watches else None

    async def watch(self, session: Session, stack: AsyncExitStack) -> None:
        """Count what goes through this session until ``stack``, which ends it, unwinds."""
        try:
            diagnosis = await session.diagnose()
        except (OSError, TunnelError) as error:
            log.warning("the bytes of tasks are not counted: nobody can be asked about its connections: %s", error)
            return
        if not diagnosis.sockets:
            return
        watch = Watch(diagnosis, self._account, self._news.set)
        stack.callback(self._forget, watch)
        try:
            await asyncio.to_thread(watch.look, [])
        except OSError as error:
            log.warning("the bytes of tasks are not counted: the kernel does not tell (sock_diag): %s", error)
            watch.close()
            return
        self._watches.append(watch)
        self._counted = True
        self._news.set()

    def _forget(self, watch: Watch) -> None:
        """Its session ends, or it fails: what it was told last counts still."""
        watch.listen()
        watch.close()
        if watch in self._watches:
            self._watches.remove(watch)
            places = self._places()
            watch.table.look([], watch.ended, {}, self._heads(places), self._spans(places))

    # --- tasks ---

    def stir(self) -> None:
        """There is work."""
        if self._asleep:
            self._asleep = False
            self._news.set()

    def ending(self, lane: int, task: int, seconds: float) -> None:
        """A task inside the tunnel has ended, after so long; its result comes to `ended` next."""
        if seconds < BRIEF and lane not in self._lanes and task not in self._account.tasks:
            self._others = self._brief = True
            return
        now = self._loop.time()
        self._held[task] = Held(lane, now - seconds, now + min(GRACE, seconds / GRACE_SHARE))
        self._settled.clear()
        self._news.set()

    def ended(self, report: Report) -> Report:
        """The report without the results that wait."""
        held = self._held
        if not held or not report.results:
            return report
        for result in report.results:
            if result.id in held:
                held[result.id].result = result
        return msgspec.structs.replace(report, results=[one for one in report.results if one.id not in held])

    async def run_errand(self, spawn: Callable[..., Any], *argv: Any, **options: Any) -> Any:
        """Start a program inside the tunnel that is no task's: what it carries is not taken for one's."""
        process = await spawn(*argv, **options)
        self._errands += 1
        self._others = True
        process.ended.add_done_callback(self._errand_over)
        return process

    def _errand_over(self, _: object) -> None:
        self._errands -= 1

    # --- looks ---

    async def _run(self) -> None:
        while True:
            places = self._places()
            due, now = self._due(places), self._loop.time()
            if due <= now:
                await self._look(places)
                self._looked = self._loop.time()
            else:
                self._news.clear()
                self._asleep = due == math.inf
                until = self._told_at + IDLE if self._asleep else min(due, self._next_long(places), now + TICK)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until if not self._asleep or self._totals() != self._told else None):
                        await self._news.wait()
            self._report(REPORT if any(place.task for place in places) else IDLE)

    def _next_long(self, places: Sequence[Place]) -> float:
        """When the next task will be long enough to be looked at."""
        begun = self._account.has_begun
        return min((one.since + BRIEF for one in places if one.task and not begun(one.task)), default=math.inf)

    def _due(self, places: Sequence[Place]) -> float:
        """When the next look is to be taken."""
        if self._held:
            return max(self._looked + max(SOONEST, BUSY * self._cost), min(one.due for one in self._held.values()))
        if not any(place.task for place in places):
            left = self._brief or any(watch.ended for watch in self._watches)
            return self._looked + max(IDLE, CALM * self._cost) if left else math.inf
        new = any(self._is_long(place) and not self._account.has_begun(place.task) for place in places)
        return self._looked + max(SOONEST if new else self._pace, CALM * self._cost)

    def _is_long(self, place: Place) -> bool:
        return place.task != 0 and self._loop.time() - place.since >= BRIEF

    async def _look(self, places: list[Place]) -> None:
        began, held = self._loop.time(), dict(self._held)
        heads, spans = self._heads(places), self._spans(places)
        self._others, self._brief = self._errands > 0, False
        new = not all(self._account.has_begun(place.task) for place in places if self._is_long(place))
        self._account.begin([*held, *(place.task for place in places if self._is_long(place))])
        cost, missed = 0.0, self._account.missed
        for watch in list(self._watches):
            try:
                seen = await asyncio.to_thread(watch.look, places)
            except OSError as error:
                log.warning("bytes are no longer counted: the kernel does not tell (sock_diag): %s", error)
                self._forget(watch)
                continue
            if not watch.closed:
                watch.listen()
                ended, watch.ended = watch.ended, []
                watch.table.look(seen.flows, ended, seen.owners, heads, spans)
            cost += seen.cost
        self._cost = cost
        if self._account.missed > missed:
            self._alert = began + ALERT
        new = new or began < self._alert or any(watch.table.news for watch in self._watches)
        self._pace = SOONEST if new else min(INTERVAL, 2 * self._pace)
        self._lanes = set().union(*(watch.table.lanes() for watch in self._watches))
        self._let_go([task for task, one in held.items() if self._is_complete(one, began)], looked=self.active)
        self._account.keep({place.task for place in places} | self._held.keys())

    def _heads(self, places: Sequence[Place]) -> Mapping[int, int]:
        """The task that each lane's bytes since the look before belong to: one that has ended comes before the next."""
        heads = {place.lane: place.task for place in places if place.task}
        heads.update((one.lane, task) for task, one in reversed(self._held.items()))
        return heads

    def _spans(self, places: Sequence[Place]) -> list[Span]:
        """The tasks at work since the look before; nothing where there were others, too."""
        if self._others:
            return []
        over = {one.lane: one.due for one in self._held.values()}
        spans = [Span(task, one.lane, one.since) for task, one in self._held.items()]
        now = [Span(one.task, one.lane, max(one.since, over.get(one.lane, one.since))) for one in places if one.task]
        return spans + now

    def _is_complete(self, one: Held, looked: float) -> bool:
        """Whether a look that began then was the last for this."""
        if looked < one.due:
            return False
        awaited = any(one.lane in watch.table.awaited() for watch in self._watches)
        return not awaited or looked >= one.due + PATIENCE

    def _let_go(self, tasks: Sequence[int], *, looked: bool) -> None:
        """Their results go on, and say what was counted if they were looked at."""
        results = []
        for task in tasks:
            one = self._held.pop(task, None)
            if one is not None and one.result is not None:
                traffic = self._account.take(task)
                if looked and traffic is not None:
                    one.result.sent, one.result.received = traffic
                results.append(one.result)
        if not self._held:
            self._settled.set()
        if results:
            self._release(Report([], results, []))

    # --- the pilot's totals ---

    def _report(self, interval: float) -> None:
        """Tell the totals if they have changed, now and then."""
        if self._loop.time() >= self._told_at + interval:
            self._tell_totals()

    def _totals(self) -> m.Traffic | None:
        """What there is to tell; nothing if nothing was ever counted."""
        if not self._counted:
            return None
        return m.Traffic(*self._account.total, self._account.unattributed)

    def _tell_totals(self) -> None:
        now = self._totals()
        if now is not None and now != self._told:
            self._told, self._told_at = now, self._loop.time()
            self._tell(now)

    def present(self) -> None:
        """There is a manager that knows nothing of us."""
        self._told = None
        self._tell_totals()

    # --- the end ---

    async def settle(self) -> None:
        """Wait until no result waits; it takes seconds at most."""
        await self._settled.wait()

    def finish(self) -> None:
        """Let all results go on without a look, and tell the totals."""
        self._let_go(list(self._held), looked=False)
        self._tell_totals()

    async def close(self) -> None:
        """Look no more."""
        self._running.cancel()
        await asyncio.wait([self._running])

    def _over(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()):
            log.error("the bytes of tasks are not counted any more; this is a fault of hpcq", exc_info=error)
            for watch in self._watches:
                watch.close()
            self._watches.clear()
            self._let_go(list(self._held), looked=False)
