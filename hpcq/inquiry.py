"""What users, and clients of the command line, ask about unfinished tasks: which, where, why not yet.

Answered in the manager's thread, where the state may be read. May not live here: questions about pilots, which the
manager answers by itself (see `questions`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec

from hpcq.errors import UsageError
from hpcq.jobs import JobWatch
from hpcq.manager import Manager
from hpcq.scaling import Scaling
from hpcq.scheduler import TaskRow
from hpcq.task import Task


class Inquiry:
    """Answers for one queue. ``find`` gives an unfinished task by its number, ``last`` the last number given out."""

    def __init__(  # noqa: PLR0917 - all differ in type
        self,
        queue: str,
        manager: Manager,
        scaling: Scaling,
        jobs: JobWatch,
        find: Callable[[int], Task | None],
        last: Callable[[], int],
    ) -> None:
        self._queue = queue
        self._manager = manager
        self._scaling = scaling
        self._jobs = jobs
        self._find = find
        self._last = last
        manager.answer_to("tasks", self._list)
        manager.answer_to("explain", self._explain)

    def explain(self, number: int) -> str:
        """See `Queue.explain`."""
        return self._manager.call(lambda: self._explain(number))

    def running(self, ids: Collection[int]) -> set[int]:
        """See `Queue.running`."""
        return self._manager.call(lambda: self._manager.running(ids))

    def why_deserted(self) -> str:
        """See `Queue.why_deserted`."""
        return self._manager.call(self._why_deserted)

    def _explain(self, number: Any) -> str:
        if not isinstance(number, int) or not 0 < number <= self._last():
            raise UsageError(f"no task {number!r} was submitted to queue {self._queue!r}")
        if self._find(number) is None:
            return f"task {number} has ended"
        why = self._scaling.why_none()
        return f"{self._manager.explain(number)}; {why}" if why else self._manager.explain(number)

    def _list(self, limit: Any) -> dict[str, Any]:
        listed, total = self._manager.tasks(max(0, int(limit)))
        found = [(row, self._find(row.id)) for row in listed]
        return {"tasks": [_told(row, task) for row, task in found if task is not None], "total": total}

    def _why_deserted(self) -> str:
        if self._manager.cores:
            return ""
        why = self._scaling.why_none()
        return self._jobs.why_none_left() if why is None else why


def _told(row: TaskRow, task: Task) -> dict[str, Any]:
    """One unfinished task as ``hpcq tasks`` gets it."""
    options = task.options
    own = {"tag": options.tag, "category": options.category, "summary": task.summary}
    return {**msgspec.structs.asdict(row), **own}
