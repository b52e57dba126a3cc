"""How long tasks take, by what earlier ones of the same function took. Pure, like `core`."""

from __future__ import annotations

from hpcq.messages import TaskSpec

KEPT = 10_000
"""Functions of which it is remembered; when they are made anew for each task, it is forgotten rather than grows."""


class Durations:
    """Moving averages in seconds; ``unknown`` is what a task of a new function is taken to last."""

    def __init__(self, unknown: float) -> None:
        self._unknown = unknown
        self._seconds: dict[bytes, float] = {}

    def known(self, task: TaskSpec) -> float | None:
        """Seconds to be expected of the task, None for a new function."""
        return self._seconds.get(task.function)

    def guess(self, task: TaskSpec) -> float:
        """The same with a number in any case."""
        return self._seconds.get(task.function, self._unknown)

    def learn(self, task: TaskSpec, seconds: float) -> None:
        """The task took so long."""
        known = self._seconds.get(task.function)
        if known is None and len(self._seconds) >= KEPT:
            self._seconds.clear()
        self._seconds[task.function] = seconds if known is None else known + 0.2 * (seconds - known)
