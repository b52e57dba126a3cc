"""One task's and one pilot's state, the queue of tasks with equal needs, and the table of legal transitions."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto

from hpcq.errors import HpcqError
from hpcq.scheduler.events import NewTask


class TaskState(Enum):
    """Where a task is; the package's docstring has the picture."""

    READY = auto()
    ASSIGNED = auto()
    RUNNING = auto()
    ENDING = auto()
    DONE = auto()


_S = TaskState
TRANSITIONS: dict[str, dict[TaskState, frozenset[TaskState]]] = {
    "place": {_S.READY: frozenset({_S.ASSIGNED})},
    "start": {_S.ASSIGNED: frozenset({_S.RUNNING}), _S.ENDING: frozenset({_S.ENDING})},
    "end": {
        _S.ASSIGNED: frozenset({_S.DONE, _S.READY}),
        _S.RUNNING: frozenset({_S.DONE, _S.READY}),
        _S.ENDING: frozenset({_S.DONE}),
    },
    "give back": {
        _S.ASSIGNED: frozenset({_S.READY}),
        _S.RUNNING: frozenset({_S.READY}),  # announced, and then not begun after all
        _S.ENDING: frozenset({_S.DONE}),
    },
    "pilot gone": {
        _S.ASSIGNED: frozenset({_S.READY}),
        _S.RUNNING: frozenset({_S.READY, _S.DONE}),
        _S.ENDING: frozenset({_S.DONE}),
    },
    "cancel": {
        _S.READY: frozenset({_S.DONE}),
        _S.ASSIGNED: frozenset({_S.ENDING}),
        _S.RUNNING: frozenset({_S.ENDING}),
    },
}
"""Trigger, then state before, then the states allowed after."""


class IllegalTransitionError(HpcqError):
    """A bug: a task was to go where the table does not allow. Names the task, trigger and states."""


class Estimate:
    """Expected seconds of tasks of one kind: a moving average, None before the first has ended."""

    __slots__ = ("seconds",)
    WEIGHT = 0.2

    def __init__(self) -> None:
        self.seconds: float | None = None

    def learn(self, seconds: float) -> None:
        """Take one measured run into account."""
        known = self.seconds
        self.seconds = seconds if known is None else known + self.WEIGHT * (seconds - known)


class Record:
    """One task that is not done."""

    __slots__ = ("attempts", "demand", "estimate", "expected", "id", "pilot", "priority", "retries", "state")

    def __init__(self, task: NewTask, demand: Demand, estimate: Estimate) -> None:
        self.id = task.id
        self.priority = task.priority
        self.retries = task.retries
        self.demand = demand
        self.estimate = estimate
        self.state = TaskState.READY
        self.attempts = 0
        self.pilot: Pilot | None = None
        self.expected = 0.0

    def move(self, trigger: str, after: TaskState) -> None:
        """Change state, as the table allows.

        Raises:
            IllegalTransitionError: it does not.
        """
        if after not in TRANSITIONS[trigger].get(self.state, ()):
            raise IllegalTransitionError(
                f"task {self.id}: {trigger!r} cannot lead from {self.state.name} to {after.name}"
            )
        self.state = after


class Ready:
    """Tasks waiting to be placed: larger priority first, then first come first served. All O(log priorities)."""

    def __init__(self) -> None:
        self._lines: dict[float, deque[Record]] = {}
        self._order: list[float] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _line(self, priority: float) -> deque[Record]:
        line = self._lines.get(priority)
        if line is None:
            line = self._lines[priority] = deque()
            heapq.heappush(self._order, -priority)
        return line

    def add(self, record: Record) -> None:
        """Behind its equals."""
        self._line(record.priority).append(record)
        self._count += 1

    def add_first(self, record: Record) -> None:
        """Before its equals: it has waited already."""
        self._line(record.priority).appendleft(record)
        self._count += 1

    def discard(self, record: Record) -> None:
        """Note that a queued record left READY some other way; it is dropped when it comes up."""
        del record
        self._count -= 1

    def head(self) -> Record:
        """The next to be placed.

        Raises:
            IndexError: nothing waits.
        """
        while self._order:
            priority = -self._order[0]
            line = self._lines[priority]
            while line and line[0].state is not TaskState.READY:
                line.popleft()
            if line:
                return line[0]
            heapq.heappop(self._order)
            del self._lines[priority]
        raise IndexError("nothing waits")

    def pop(self) -> Record:
        """Take the next to be placed."""
        record = self.head()
        self._lines[record.priority].popleft()
        self._count -= 1
        return record

    def __iter__(self) -> Iterator[Record]:
        for line in self._lines.values():
            yield from (record for record in line if record.state is TaskState.READY)


class Demand:
    """All tasks with the same needs, and the pilots that could take one."""

    __slots__ = ("alive", "cores", "idle", "memory", "network", "ready", "roomy")

    def __init__(self, cores: int, memory: int, network: str) -> None:
        self.cores = cores
        self.memory = memory
        self.network = network
        self.ready = Ready()
        self.alive = 0
        self.idle: dict[Pilot, None] = {}
        self.roomy: dict[Pilot, None] = {}


class Pilot:
    """One pilot that is ready or draining. ``claimed`` tasks hold resources; ``backlog`` waits there, in order."""

    __slots__ = (
        "asked_back",
        "backlog",
        "backlog_seconds",
        "claimed",
        "cores",
        "draining",
        "free_cores",
        "free_memory",
        "memory",
        "name",
        "progress",
        "wan",
    )

    def __init__(self, name: str, cores: int, memory: int, wan: bool, now: float) -> None:
        self.name = name
        self.cores = self.free_cores = cores
        self.memory = self.free_memory = memory
        self.wan = wan
        self.draining = False
        self.claimed: dict[int, Record] = {}
        self.backlog: dict[int, Record] = {}
        self.backlog_seconds = 0.0
        self.asked_back = False
        self.progress = now

    def could_ever(self, demand: Demand) -> bool:
        """Whether the whole pilot, empty, would do."""
        return self.cores >= demand.cores and self.memory >= demand.memory and (self.wan or demand.network != "wan")

    def can_now(self, demand: Demand) -> bool:
        """Whether what is free would do."""
        return self.free_cores >= demand.cores and self.free_memory >= demand.memory

    def claim(self, record: Record) -> None:
        """Give it its resources."""
        self.claimed[record.id] = record
        self.free_cores -= record.demand.cores
        self.free_memory -= record.demand.memory

    def hold(self, record: Record) -> None:
        """Keep it for later."""
        self.backlog[record.id] = record
        self.backlog_seconds += record.expected

    def promote(self) -> None:
        """Give resources to what waits, in order, as far as they go: just what the pilot itself does."""
        while self.backlog:
            record = next(iter(self.backlog.values()))
            if not self.can_now(record.demand):
                return
            self._unhold(record)
            self.claim(record)

    def _unhold(self, record: Record) -> None:
        del self.backlog[record.id]
        self.backlog_seconds = self.backlog_seconds - record.expected if self.backlog else 0.0

    def release(self, record: Record) -> None:
        """It is no longer here."""
        if record.id in self.claimed:
            del self.claimed[record.id]
            self.free_cores += record.demand.cores
            self.free_memory += record.demand.memory
        else:
            self._unhold(record)

    def held(self) -> list[Record]:
        """Everything it has, in the order it would be done."""
        return [*self.claimed.values(), *self.backlog.values()]
