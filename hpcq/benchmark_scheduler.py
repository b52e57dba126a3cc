"""Measuring the scheduler alone: simulated pilots and tasks, no sockets, no clock but a made-up one.

Each event is handled in a step of its own, which is the dearest way; only CPU time inside `Scheduler.handle` counts.
Tasks differ in cores, memory, disk, GPUs, network and length, pilots in size, all drawn from a fixed seed.
"""

from __future__ import annotations

import random
import time
from collections import deque
from heapq import heappop, heappush
from typing import Any

import psutil

from hpcq.errors import HpcqError
from hpcq.queue import Queue
from hpcq.scheduler import Assign, Ended, EndedTask, Event, Finish, NewTask, PilotReady, Scheduler, Started, Submitted
from hpcq.task import PythonTask

SIZES = ((100, 10_000), (10_000, 1_000_000))
"""Pilots and tasks of the two runs that are compared."""

BATCH = 1000
"""Tasks submitted in one event: a program that submits in a loop is faster than the manager's turns."""

NEEDS: tuple[dict[str, Any], ...] = (
    {"cores": 1},
    {"cores": 1, "memory": 1000},
    {"cores": 1, "memory": 2000, "network": "wan"},
    {"cores": 2, "memory": 3000, "disk": 1000},
    {"cores": 4, "memory": 8000},
    {"cores": 8, "memory": 8000, "network": "wan"},
    {"cores": 1, "memory": 4000, "gpus": 1},
    {"cores": 1, "features": frozenset({"tunnel=openconnect"})},
)
"""What tasks ask for; each has a category of its own."""


class SimulatedPilot:
    """Works off what it holds in order, as far as cores, memory, disk and GPUs go."""

    def __init__(self, ready: PilotReady) -> None:
        self.name = ready.pilot
        self.free = [ready.cores, ready.memory, ready.disk, ready.gpus]
        self.waiting: deque[int] = deque()

    def begin(self, tasks: dict[int, tuple[int, ...]]) -> list[int]:
        """The tasks that begin now."""
        begun = []
        while self.waiting and all(have >= need for have, need in zip(self.free, tasks[self.waiting[0]], strict=True)):
            number = self.waiting.popleft()
            self._take(tasks[number], -1)
            begun.append(number)
        return begun

    def end(self, needs: tuple[int, ...]) -> None:
        """A task that took this has ended."""
        self._take(needs, 1)

    def _take(self, needs: tuple[int, ...], sign: int) -> None:
        self.free = [have + sign * need for have, need in zip(self.free, needs, strict=True)]


class Simulation:
    """One run from the first pilot to the last task."""

    def __init__(self, pilots: int, tasks: int, needs: tuple[dict[str, Any], ...] = NEEDS) -> None:
        self._random = random.Random(1)  # noqa: S311 - the same run every time
        self._scheduler = Scheduler()
        self._pilots = [self._pilot(number) for number in range(pilots)]
        self._by_name: dict[str, SimulatedPilot] = {}
        self._count = tasks
        self._needs = needs
        self._sizes = {
            number: tuple(needs[number % len(needs)].get(name, 0) for name in ("cores", "memory", "disk", "gpus"))
            for number in range(len(needs))
        }
        self._tasks: dict[int, tuple[int, ...]] = {}
        self._due: list[tuple[float, int, SimulatedPilot]] = []
        self._now = 0.0
        self.events = 0
        self.finished = 0
        self.seconds = 0.0

    def _pilot(self, number: int) -> PilotReady:
        cores = self._random.choice((4, 8, 16))
        features = frozenset({"wan", f"tunnel={'openconnect' if number % 2 else 'relay'}"})
        gpus = 2 if number % 5 == 0 else 0
        return PilotReady(
            f"p{number}", cores, 2000 * cores, number % 10 != 0, 20_000, gpus, features, f"h{number // 2}"
        )

    def run(self) -> None:
        """Everything.

        Raises:
            HpcqError: tasks were left over.
        """
        for ready in self._pilots:
            self._by_name[ready.pilot] = SimulatedPilot(ready)
            self._handle(ready, 1)
        for first in range(0, self._count, BATCH):
            self._submit(range(first, min(first + BATCH, self._count)))
        while self._due:
            self._now, number, pilot = heappop(self._due)
            pilot.end(self._tasks[number])
            self._handle(Ended(pilot.name, [EndedTask(number, "success", 20.0)]), 1)
            self._begin(pilot)
        if self.finished != self._count:
            raise HpcqError(f"the simulated run ended with {self._count - self.finished} tasks left over")

    def _submit(self, numbers: range) -> None:
        kinds = len(self._needs)
        self._tasks.update((number, self._sizes[number % kinds]) for number in numbers)
        tasks = [NewTask(number, kind=str(number % kinds), **self._needs[number % kinds]) for number in numbers]
        self._handle(Submitted(tasks), len(tasks))

    def _handle(self, event: Event, count: int) -> None:
        began = time.thread_time()
        commands = self._scheduler.handle([event], self._now)
        self.seconds += time.thread_time() - began
        self.events += count
        for command in commands:
            if isinstance(command, Finish):
                self.finished += 1
            elif isinstance(command, Assign):
                pilot = self._by_name[command.pilot]
                pilot.waiting.extend(command.tasks)
                self._begin(pilot)

    def _begin(self, pilot: SimulatedPilot) -> None:
        begun = pilot.begin(self._tasks)
        for number in begun:
            heappush(self._due, (self._now + self._random.uniform(1.0, 60.0), number, pilot))
        if begun:
            self._handle(Started(pilot.name, begun), len(begun))


def measure(
    sizes: tuple[tuple[int, int], ...] = SIZES,
) -> dict[str, Any]:
    """Microseconds per event for each size, and how many times the first one's the last one takes."""
    runs = []
    for pilots, tasks in sizes:
        simulation = Simulation(pilots, tasks)
        simulation.run()
        microseconds = 1e6 * simulation.seconds / simulation.events
        runs.append({"pilots": pilots, "tasks": tasks, "events": simulation.events, "microseconds": microseconds})
    return {"runs": runs, "ratio": runs[-1]["microseconds"] / runs[0]["microseconds"]}


def _nothing(number: int) -> int:
    return number


def measure_memory(count: int = 200_000) -> float:
    """Bytes of this process for each Python task that is queued, all in all: the task, its pickled form, the records.

    Raises:
        HpcqError: the queue cannot listen.
    """
    with Queue(address="127.0.0.1") as queue:
        for number in range(count // 10):  # what is allocated once and used again
            queue.submit(PythonTask(_nothing, number))
        queue.stats  # noqa: B018 - the manager has taken what was submitted before it answers
        before = psutil.Process().memory_info().rss
        for number in range(count):
            queue.submit(PythonTask(_nothing, number))
        queue.stats  # noqa: B018
        return float(psutil.Process().memory_info().rss - before) / count
