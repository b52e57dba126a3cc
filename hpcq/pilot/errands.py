"""What is done for tasks before and after they run, while they hold no core: things fetched for them, things brought.

::

    Run --> BEFORE --> CORE (runs, or waits to) --> AFTER --> told to the manager
              | withdrawn: Returned                   | cancelled: told at once
              | fails: told                           | fails, or the pilot ends: told

`Errands` is the part that is the same whatever is fetched and brought: which task is where, what is handed back, when
all is done. A task may pass through several, one after the other. May not live here: files (`staging`), large
arguments and results (`parcels`).
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import msgspec

from hpcq import messages as m
from hpcq.outcome import Outcome
from hpcq.pilot.lanes import Report

log = logging.getLogger("hpcq.pilot")


class Phase(enum.Enum):
    """Where a task is."""

    BEFORE = enum.auto()
    CORE = enum.auto()
    AFTER = enum.auto()


class Job:
    """One task that is here; ``result`` is its own, of a task that has run."""

    __slots__ = ("activity", "number", "phase", "result")

    def __init__(self, number: int, phase: Phase) -> None:
        self.number = number
        self.phase = phase
        self.activity: asyncio.Task[None] | None = None
        self.result: m.TaskResult | None = None


J = TypeVar("J", bound=Job)


class Errands(Generic[J]):
    """All of one kind. ``report`` tells the manager; ``brings`` is what is brought, in words."""

    brings = "what it left"

    def __init__(self, report: Callable[[Report], None]) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, J] = {}
        self._activities: set[asyncio.Task[None]] = set()
        self._draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    # --- what each kind says ---

    def concerns(self, task: m.TaskSpec) -> bool:
        """Whether something must be fetched before the task runs."""
        raise NotImplementedError

    def begin(self, task: m.TaskSpec) -> None:
        """Begin to fetch it: `enter` a job and `start` its work."""
        raise NotImplementedError

    def holds_back(self, result: m.TaskResult) -> bool:
        """A task has run: whether something is brought before it is told (begun here), or it is done with (`leave`)."""
        raise NotImplementedError

    def left(self, job: J) -> None:
        """A task is not ours any more."""

    # --- from the manager ---

    def take(self, message: m.Run) -> m.Run:
        """Begin with the tasks that are ours; returns the message with the others."""
        ours = [task for task in message.tasks if self.concerns(task)]
        if not ours:
            return message
        if self._draining:
            self._report(Report([], [], [task.id for task in ours]))
        else:
            for task in ours:
                self.begin(task)
        return m.Run(message.functions, [task for task in message.tasks if not self.concerns(task)], message.forget)

    def withdraw(self, tasks: list[int], cancel: bool = False) -> list[int]:
        """Give back those that wait for something, and (``cancel``) end those that have run; returns the others."""
        back = [number for number in tasks if self._phase(number) is Phase.BEFORE]
        for number in back:
            self.leave(number)
        if back:
            self._report(Report([], [], back))
        stopped = [number for number in tasks if cancel and self._phase(number) is Phase.AFTER]
        for number in stopped:
            self.end(number, Outcome.CANCELLED, "cancelled")
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
            if job.phase is Phase.AFTER:
                self.end(number, Outcome.LOST, f"{self.brings} could not be sent before its pilot ended")
            else:
                self.leave(number)
        self.interrupt()
        while self._activities:
            await asyncio.wait(self._activities)
        self.hang_up()
        self._draining = False

    def interrupt(self) -> None:
        """End what is under way and cannot be cancelled."""

    def hang_up(self) -> None:
        """Nothing is under way any more."""

    # --- from the core ---

    def ended(self, report: Report) -> Report:
        """What can be told now; tasks of which something is brought follow."""
        for number in report.returned:
            self.leave(number)
        certain = [result for result in report.results if not self.holds_back(result)]
        return msgspec.structs.replace(report, results=certain)

    # --- one task ---

    def enter(self, job: J) -> J:
        """It is ours."""
        self._jobs[job.number] = job
        self.idle.clear()
        return job

    def start(self, job: J, work: Callable[..., Coroutine[Any, Any, None]], *details: Any) -> None:
        """Do ``work(job, *details)`` for it."""
        job.activity = self._loop.create_task(self._guarded(job, work, details))
        self.keep(job.activity)

    def keep(self, activity: asyncio.Task[None]) -> None:
        """`abandon` waits for this too."""
        self._activities.add(activity)
        activity.add_done_callback(self._activities.discard)

    async def _guarded(self, job: J, work: Callable[..., Coroutine[Any, Any, None]], details: tuple[Any, ...]) -> None:
        """A fault of ours ends the task too: nobody waits for ever."""
        try:
            await work(job, *details)
        except Exception as error:
            log.exception("task %d", job.number)
            if self._jobs.get(job.number) is job:
                self.end(job.number, Outcome.LOST, f"its pilot failed with it: {type(error).__name__}: {error}")

    def leave(self, number: int) -> None:
        """It is not ours any more, if it was."""
        job = self._jobs.pop(number, None)
        if job is None:
            return
        if job.activity is not None and job.activity is not _current_task():
            job.activity.cancel()
        self.left(job)
        if not self._jobs:
            self.idle.set()

    def end(self, number: int, outcome: Outcome, message: str, lost_input: bytes = b"") -> None:
        """Tell how it ended otherwise than by its own result."""
        result = msgspec.structs.replace(
            self._jobs[number].result or m.TaskResult(number, ""), outcome=outcome.value, message=message,
            payload=b"", kept=None, parcel=None, lost_input=lost_input,
        )  # fmt: skip
        self.tell(result)

    def tell(self, result: m.TaskResult) -> None:
        """It has ended so."""
        self.leave(result.id)
        self._report(Report([], [result], []))


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
