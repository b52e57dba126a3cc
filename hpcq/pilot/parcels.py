"""Large arguments and results, before and after their task runs: fetched from the manager, brought to it.

::

    Run --> FETCHING --> run (staging, core) ... ended --> BRINGING --> told to the manager
              | withdrawn: Returned                           | cancelled: told at once
              | cannot be had or kept: lost, files            | cannot be brought or kept: lost, files

While it is fetched or brought a task holds no core and no runner. At most `AT_ONCE` parcels travel at a time, each in a
thread with a connection of its own (`haul`), and at most `AHEAD` tasks have their arguments here: they take
descriptors and memory. May not live here: what is common to all such errands (`errands`), where parcels are kept
(`hpcq.parcels`), what runs.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from hpcq import connection as conn
from hpcq import messages as m
from hpcq.errors import HpcqError
from hpcq.files import haul
from hpcq.files.haul import Haul
from hpcq.files.wire import DataError, SourceError, describe
from hpcq.outcome import Outcome
from hpcq.parcels import Load, Parcel
from hpcq.pilot.errands import Errands, Job, Phase
from hpcq.pilot.hold import Hold
from hpcq.pilot.lanes import Report
from hpcq.pilot.link import ManagerLink

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


class Addressed(Job):
    """One task with large arguments or a large result."""

    __slots__ = ("has_room",)

    def __init__(self, number: int, phase: Phase) -> None:
        super().__init__(number, phase)
        self.has_room = False


class Parcels(Errands[Addressed]):
    """All of them. ``run`` gets tasks whose arguments are here, ``report`` tells the manager; `hold` has them."""

    brings = "its result"

    def __init__(
        self,
        hold: Hold,
        pilot: str,
        link: ManagerLink,
        run: Callable[[list[m.TaskSpec]], None],
        report: Callable[[Report], None],
    ) -> None:
        super().__init__(report)
        self.hold = hold
        self._run = run
        self._hauls = Hauls(pilot, link)
        self._workers = ThreadPoolExecutor(AT_ONCE, "hpcq-parcels")
        self._room = asyncio.Semaphore(AHEAD)

    def concerns(self, task: m.TaskSpec) -> bool:
        """Whether its arguments are large."""
        return task.parcel is not None

    def begin(self, task: m.TaskSpec) -> None:
        """Fetch its arguments."""
        job = self.enter(Addressed(task.id, Phase.BEFORE))
        self.start(job, self._fetch, task)

    def ended(self, report: Report) -> Report:
        """Most tasks have nothing large."""
        return super().ended(report) if self._jobs or self.hold.results else report

    def holds_back(self, result: m.TaskResult) -> bool:
        """A large result is brought first."""
        load = self.hold.results.pop(result.id, None)
        if result.parcel is None:
            self.leave(result.id)
            return False
        job = self._jobs.get(result.id) or self.enter(Addressed(result.id, Phase.AFTER))
        self._let_go(job)
        job.phase, job.result = Phase.AFTER, result
        if load is None:
            self.end(result.id, Outcome.LOST, "its runner did not leave its result")
        else:
            self.start(job, self._bring, load)
        return True

    def left(self, job: Addressed) -> None:
        """Its arguments go."""
        self._let_go(job)

    def _let_go(self, job: Addressed) -> None:
        self.hold.given.pop(job.number, None)
        if job.has_room:
            job.has_room = False
            self._room.release()

    def interrupt(self) -> None:
        """Threads in the middle of a transfer hear of it by its end."""
        self._hauls.hang_up()

    async def close(self) -> None:
        """End everything, for good."""
        await self.abandon()
        await asyncio.to_thread(self._workers.shutdown)

    # --- transfers ---

    async def _fetch(self, job: Addressed, task: m.TaskSpec) -> None:
        try:
            await self._room.acquire()
            job.has_room = True
            parcel = await self._thread(self._fetched, task.id)
        except DataError as error:
            self.end(task.id, Outcome.LOST, f"its arguments could not be fetched: {error}")
        except (HpcqError, OSError) as error:
            self.end(task.id, Outcome.FILES, f"its arguments cannot be had on {socket.gethostname()}: {_words(error)}")
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

    async def _bring(self, job: Addressed, load: Load) -> None:
        number = job.number
        try:
            error = await self._thread(self._brought, number, load.parcel)
        except (HpcqError, OSError) as failure:
            self.end(number, Outcome.LOST, f"its result could not be sent: {_words(failure)}")
            return
        if error:
            self.end(number, Outcome.FILES, f"its result cannot be kept where the program runs: {error}")
            return
        result = job.result
        assert result is not None
        self.tell(result)

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
        is_over = self._link.lost.is_set
        on = haul.connect(addresses, info.port, conn.pilot_tls(info), conn.MANAGER_NAME, self._pilot, is_over)
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
