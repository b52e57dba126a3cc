"""One task's state with the table of legal transitions, what tasks need, and the queue of tasks with equal needs."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import msgspec

from hpcq.errors import HpcqError
from hpcq.scheduler.categories import Category
from hpcq.scheduler.needs import Needs


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


class Record(msgspec.Struct, gc=False, eq=False):
    """One task that is not done. Not seen by the garbage collector, for there may be a million.

    ``second`` is the pilot that runs a copy of it; ``claimed`` what it takes where it was placed. It is ``doubted``
    once a pilot that had a place for it was gone before it could say whether the task has begun.
    """

    id: int
    priority: float
    retries: int
    demand: Demand
    category: Category
    since: float
    state: TaskState = TaskState.READY
    attempts: int = 0
    pilot: Any = None
    second: Any = None
    claimed: Any = None
    load: float = 0.0
    doubted: bool = False

    @property
    def begun(self) -> int:
        """How often it was begun, for all we know: a doubt counts as once."""
        return min(self.attempts + self.doubted, self.retries + 1)

    def move(self, trigger: str, after: TaskState, now: float) -> None:
        """Change state, as the table allows.

        Raises:
            IllegalTransitionError: it does not.
        """
        if after not in TRANSITIONS[trigger].get(self.state, ()):
            raise IllegalTransitionError(
                f"task {self.id}: {trigger!r} cannot lead from {self.state.name} to {after.name}"
            )
        self.state = after
        self.since = now


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
        if not self._count:
            self._lines.clear()
            self._order.clear()

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
        for priority in sorted(self._lines, reverse=True):
            yield from (record for record in self._lines[priority] if record.state is TaskState.READY)


class Demand:
    """All tasks with the same needs; placed under ``place`` in the line while any of them waits.

    ``seen`` and ``seen_ahead`` tell how far it has looked through the pilots with room (see `placement`). With a
    ``category``, what a task did not say of memory and disk follows what the category has learned. ``level`` counts
    the times its tasks were given more after they ended as ``resources``.
    """

    __slots__ = ("alive", "category", "key", "level", "needs", "place", "ready", "said", "seen", "seen_ahead")

    def __init__(self, needs: Needs, key: object = None, category: Category | None = None, level: int = 0) -> None:
        self.said = self.needs = needs
        self.key = key
        self.category = category
        self.level = level
        self.ready = Ready()
        self.alive = 0
        self.place: Place | None = None
        self.seen = self.seen_ahead = 0

    @property
    def allots(self) -> bool:
        """Whether its tasks get other limits than they said."""
        return self.level > 0 or self.category is not None

    def refit(self) -> None:
        """Take over what the category allots now."""
        said, category = self.said, self.category
        assert category is not None
        memory, disk = said.memory or category.memory, said.disk or category.disk
        if (memory, disk) != (self.needs.memory, self.needs.disk):
            self.needs = msgspec.structs.replace(said, memory=memory, disk=disk)
            self.seen = self.seen_ahead = 0


Place = tuple[float, int, Demand]
"""Where a demand stands in the line: by its first task's priority (negative), then id."""
