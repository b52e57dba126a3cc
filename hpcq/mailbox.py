"""Finished tasks on their way from the manager's thread to whoever waits for them."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from hpcq.dispatch import Finished
from hpcq.errors import QueueClosedError
from hpcq.task import Task


class Receiver(Protocol):
    """Where finished tasks go. All but `expect` may be called in the manager's thread: must neither block nor raise."""

    def expect(self, number: int, task: Task) -> None:
        """A task that will be `put` some time."""

    def expected(self) -> dict[int, Task]:
        """The tasks that are still to come."""

    def put(self, finished: list[Finished]) -> None:
        """Tasks that are done."""

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""


class Mailbox:
    """Tasks on their way to the user; any number of threads may wait, each for what it wants.

    A task is expected from `expect` on and here from `put` on, never neither: whoever asks sees it in one of the two.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._expected: dict[int, Task] = {}
        self._expected_tags: Counter[str] = Counter()
        self._tasks: OrderedDict[int, Task] = OrderedDict()  # a dict would look for its first behind all that were
        self._by_tag: dict[str, OrderedDict[int, None]] = {}
        self._failure: BaseException | None = None

    def expect(self, number: int, task: Task) -> None:
        """A task that will be `put` some time."""
        with self._changed:
            self._expected[number] = task
            if task.options.tag is not None:
                self._expected_tags[task.options.tag] += 1

    def expected(self) -> dict[int, Task]:
        """The tasks that are still to come."""
        with self._changed:
            return self._expected.copy()

    def expects(self, number: int) -> bool:
        """Whether that task is still to come."""
        return number in self._expected

    def expected_task(self, number: int) -> Task | None:
        """That task, if it is still to come."""
        return self._expected.get(number)

    def expects_any(self) -> bool:
        """Whether any task is still to come."""
        return bool(self._expected)

    def expects_tagged(self, tag: str) -> bool:
        """Whether a task with ``tag`` is still to come."""
        return tag in self._expected_tags

    def put(self, finished: Iterable[Finished]) -> None:
        """Tasks that are done."""
        with self._changed:
            for number, attempt in finished:
                task = self._expected.pop(number)
                task._finish(attempt)
                self._tasks[number] = task
                tag = task.options.tag
                if tag is not None:
                    self._by_tag.setdefault(tag, OrderedDict())[number] = None
                    self._expected_tags[tag] -= 1
                    if not self._expected_tags[tag]:
                        del self._expected_tags[tag]
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Wake everybody: nothing more will come."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def take(self, find: Callable[[], int | None], left: Callable[[], bool], timeout: float | None) -> Task | None:
        """The first task that ``find`` names, or None after ``timeout`` seconds (None: no limit).

        None as well as soon as none is ``left`` to come, be it that another thread takes the last.

        Raises:
            QueueClosedError: what is to come will not come any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while (number := find()) is None:
                if not left():
                    return None
                if self._failure is not None:
                    raise QueueClosedError(f"the queue has ended: {self._failure}") from self._failure
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    return None
                self._changed.wait(remaining)
            return self._remove(number)

    def _remove(self, number: int) -> Task:
        task = self._tasks.pop(number)
        if task.options.tag is not None:
            tagged = self._by_tag[task.options.tag]
            del tagged[number]
            if not tagged:
                del self._by_tag[task.options.tag]
        return task

    def first(self) -> int | None:
        """The id of the task that finished first."""
        return next(iter(self._tasks), None)

    def first_tagged(self, tag: str) -> int | None:
        """The same among those with ``tag``."""
        return next(iter(self._by_tag.get(tag, ())), None)

    def has(self, number: int) -> int | None:
        """``number`` if that task is here."""
        return number if number in self._tasks else None

    @property
    def empty(self) -> bool:
        """Whether nothing is here and nothing will come."""
        with self._changed:
            return not self._tasks and not self._expected
