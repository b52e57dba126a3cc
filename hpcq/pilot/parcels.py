"""Large arguments and results, before and after their task runs: fetched from the manager, brought to it.

::

    Run --> FETCHING --> run (staging, core) ... ended --> BRINGING --> told to the manager
              | withdrawn: Returned                           | cancelled: told at once
              | cannot be had or kept: lost, files            | cannot be brought or kept: lost, files

While it is fetched or brought a task holds no core and no runner. At most `AT_ONCE` parcels travel at a time, each in a
thread with a connection of its own (`haul`), and at most `AHEAD` tasks have their arguments here: they take
descriptors and memory. May not live here: where parcels are kept (`hpcq.parcels`), what runs.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from hpcq import connection as conn
from hpcq import messages as m
from hpcq.errors import HpcqError
from hpcq.files import haul
from hpcq.files.haul import Haul
from hpcq.files.wire import DataError, SourceError, describe
from hpcq.parcels import Load, Parcel
from hpcq.pilot.hold import Hold
from hpcq.pilot.lanes import Report
from hpcq.pilot.link import ManagerLink
from hpcq.task import Outcome

log = logging.getLogger("hpcq.pilot")
T = TypeVar("T")

AT_ONCE = 4
"""Parcels that travel at the same time."""

AHEAD = 64
"""Tasks that have their arguments here, running or not."""

ATTEMPTS = 3
"""How often a transfer is tried."""

ANSWER_TIMEOUT = 600.0
"""Seconds the manager may take to answer while it is busy with others."""

KEPT = 2.0
"""Seconds after which an unused connection is not used again; the manager hangs up somewhat later."""


class Phase(enum.Enum):
    """Where a task with large arguments or a large result is."""

    FETCHING = enum.auto()
    CORE = enum.auto()
    BRINGING = enum.auto()


class Job:
    """One such task."""

    __slots__ = ("activity", "has_room", "number", "phase", "result")

    def __init__(self, number: int) -> None:
        self.number = number
        self.phase = Phase.CORE
        self.activity: asyncio.Task[None] | None = None
        self.result: m.TaskResult | None = None
        self.has_room = False


class Parcels:
    """All of them. ``run`` gets tasks whose arguments are here, ``report`` tells the manager; `hold` has them."""

    def __init__(
        self,
        hold: Hold,
        pilot: str,
        link: ManagerLink,
        run: Callable[[list[m.TaskSpec]], None],
        report: Callable[[Report], None],
    ) -> None:
        self.hold = hold
        self._run = run
        self._report = report
        self._hauls = Hauls(pilot, link)
        self._loop = asyncio.get_running_loop()
        self._workers = ThreadPoolExecutor(AT_ONCE, "hpcq-parcels")
        self._room = asyncio.Semaphore(AHEAD)
        self._jobs: dict[int, Job] = {}
        self._activities: set[asyncio.Task[None]] = set()
        self._draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    # --- from the manager ---

    def take(self, message: m.Run) -> m.Run:
        """Begin with the tasks that have large arguments; returns the message with the others."""
        ours = [task for task in message.tasks if task.parcel is not None]
        if not ours:
            return message
        if self._draining:
            self._report(Report([], [], [task.id for task in ours]))
        else:
            for task in ours:
                job = self._job(task.id)
                job.phase = Phase.FETCHING
                self._start(job, self._fetch(job, task))
        return m.Run(message.functions, [task for task in message.tasks if task.parcel is None], message.forget)

    def _job(self, number: int) -> Job:
        self.idle.clear()
        return self._jobs.setdefault(number, Job(number))

    def _start(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        job.activity = self._loop.create_task(self._guarded(job, work))
        self._activities.add(job.activity)
        job.activity.add_done_callback(self._activities.discard)

    async def _guarded(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """A fault of ours ends the task too: nobody waits for ever."""
        try:
            await work
        except Exception as error:
            log.exception("a parcel of task %d", job.number)
            if self._jobs.get(job.number) is job:
                self._end(job.number, Outcome.LOST, f"its arguments or result failed: {type(error).__name__}: {error}")

    def withdraw(self, tasks: list[int], cancel: bool = False) -> list[int]:
        """Give back those being fetched, and (``cancel``) end those being brought; returns the others."""
        back = [number for number in tasks if self._phase(number) is Phase.FETCHING]
        for number in back:
            self._leave(number)
        if back:
            self._report(Report([], [], back))
        stopped = [number for number in tasks if cancel and self._phase(number) is Phase.BRINGING]
        for number in stopped:
            self._end(number, Outcome.CANCELLED, "cancelled")
        gone = {*back, *stopped}
        return [number for number in tasks if number not in gone]

    def _phase(self, number: int) -> Phase | None:
        job = self._jobs.get(number)
        return None if job is None else job.phase

    def drain(self) -> None:
        """Take nothing new, hand back what has not begun."""
        self._draining = True
        self.withdraw(list(self._jobs))

    async def abandon(self) -> None:
        """End everything; what was being brought is lost. Afterwards we can begin anew."""
        self.withdraw(list(self._jobs))
        for number, job in list(self._jobs.items()):
            if job.phase is Phase.BRINGING:
                self._end(number, Outcome.LOST, "its result could not be sent before its pilot ended")
            else:
                self._leave(number)
        self._hauls.hang_up()
        while self._activities:
            await asyncio.wait(self._activities)
        self._draining = False

    async def close(self) -> None:
        """End everything, for good."""
        await self.abandon()
        await asyncio.to_thread(self._workers.shutdown)

    # --- from the core ---

    def ended(self, report: Report) -> Report:
        """What can be told now; tasks with a large result follow."""
        if not self._jobs and not self.hold.results:
            return report
        for number in report.returned:
            self._leave(number)
        return Report(report.started, [r for r in report.results if not self._holds_back(r)], report.returned)

    def _holds_back(self, result: m.TaskResult) -> bool:
        load = self.hold.results.pop(result.id, None)
        if result.parcel is None:
            self._leave(result.id)
            return False
        job = self._job(result.id)
        self._let_go(result.id, job)
        job.phase, job.result = Phase.BRINGING, result
        if load is None:
            self._end(result.id, Outcome.LOST, "its runner did not leave its result")
        else:
            self._start(job, self._bring(result.id, load))
        return True

    # --- the end of a task here ---

    def _leave(self, number: int) -> None:
        job = self._jobs.pop(number, None)
        if job is None:
            return
        self._let_go(number, job)
        if job.activity is not None and job.activity is not asyncio.current_task():
            job.activity.cancel()
        if not self._jobs:
            self.idle.set()

    def _let_go(self, number: int, job: Job) -> None:
        """Its arguments are not needed any more."""
        self.hold.given.pop(number, None)
        if job.has_room:
            job.has_room = False
            self._room.release()

    def _end(self, number: int, outcome: Outcome, message: str) -> None:
        result = self._jobs[number].result or m.TaskResult(number, "")
        result = msgspec.structs.replace(result, outcome=outcome.value, message=message, payload=b"", parcel=None)
        self._leave(number)
        self._report(Report([], [result], []))

    # --- transfers ---

    async def _fetch(self, job: Job, task: m.TaskSpec) -> None:
        try:
            await self._room.acquire()
            job.has_room = True
            parcel = await self._thread(self._fetched, task.id)
        except DataError as error:
            self._end(task.id, Outcome.LOST, f"its arguments could not be fetched: {error}")
        except (HpcqError, OSError) as error:
            self._end(task.id, Outcome.FILES, f"its arguments cannot be had on {socket.gethostname()}: {_words(error)}")
        else:
            job.phase = Phase.CORE
            self.hold.given[task.id] = parcel
            self._run([task])

    def _fetched(self, number: int) -> Parcel:
        def fetch(on: Haul) -> Parcel:
            on.send(haul.Take(number))
            answer = on.receive(haul.Following | haul.Refusal, ANSWER_TIMEOUT)
            if isinstance(answer, haul.Refusal):
                raise SourceError(answer.reason)
            try:
                parcel = self.hold.shelf.new(answer.size)
            except OSError:
                on.hang_up()
                raise
            failure = on.receive_parcel(parcel, answer.size)
            if failure:
                raise SourceError(f"{answer.size} bytes: {failure}")
            return parcel

        return self._hauls.use(fetch)

    async def _bring(self, number: int, load: Load) -> None:
        try:
            error = await self._thread(self._brought, number, load.parcel)
        except (HpcqError, OSError) as failure:
            self._end(number, Outcome.LOST, f"its result could not be sent: {_words(failure)}")
            return
        if error:
            self._end(number, Outcome.FILES, f"its result cannot be kept where the program runs: {error}")
            return
        result = self._jobs[number].result
        assert result is not None
        self._leave(number)
        self._report(Report([], [result], []))

    def _brought(self, number: int, parcel: Parcel) -> str:
        def bring(on: Haul) -> str:
            on.send(haul.Bring(number, parcel.size))
            on.send_parcel(parcel)
            kept = on.receive(haul.Kept, ANSWER_TIMEOUT)
            assert isinstance(kept, haul.Kept)
            return kept.error

        return self._hauls.use(bring)

    async def _thread(self, function: Callable[..., T], *args: object) -> T:
        return await self._loop.run_in_executor(self._workers, function, *args)


def _words(error: Exception) -> str:
    return describe(error) if isinstance(error, OSError) else str(error)


class Hauls:
    """Our connections for parcels; used by the threads."""

    def __init__(self, pilot: str, link: ManagerLink) -> None:
        self._pilot = pilot
        self._link = link
        self._lock = threading.Lock()
        self._idle: list[tuple[Haul, float]] = []
        self._used: set[Haul] = set()

    def use(self, work: Callable[[Haul], T]) -> T:
        """What ``work`` does with a connection, on another one if that breaks.

        Raises:
            DataError: it broke each time, or there is none to be had.
        """
        failures = 0
        while True:
            found = self._old()
            fresh = found is None
            try:
                on = found or self._new()
                try:
                    value = work(on)
                except BaseException:
                    self._drop(on)
                    raise
            except DataError as error:
                if self._link.lost.is_set():
                    raise
                failures += fresh  # one that was not used for a while may have been hung up on
                if failures >= ATTEMPTS:
                    raise
                log.info("a parcel has to be sent or fetched again: %s", error)
                continue
            with self._lock:
                self._used.discard(on)
                self._idle.append((on, time.monotonic()))
            return value

    def _old(self) -> Haul | None:
        with self._lock:
            while self._idle:
                on, since = self._idle.pop()
                if time.monotonic() - since < KEPT:
                    self._used.add(on)
                    return on
                on.close()
        return None

    def _new(self) -> Haul:
        info = self._link.info
        if info is None or self._link.lost.is_set():
            raise DataError("the manager is gone")
        addresses = [self._link.address, *(a for a in info.addresses if a != self._link.address)]
        on = haul.connect(addresses, info.port, conn.pilot_tls(info), conn.MANAGER_NAME, self._pilot)
        with self._lock:
            self._used.add(on)
        return on

    def _drop(self, on: Haul) -> None:
        with self._lock:
            self._used.discard(on)
        on.close()

    def hang_up(self) -> None:
        """End all, also what is under way."""
        with self._lock:
            for on, _ in self._idle:
                on.close()
            self._idle.clear()
            for on in self._used:
                on.hang_up()
