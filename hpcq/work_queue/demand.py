"""How many workers a factory should have. Pure: counts and times in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Limits(NamedTuple):
    """As Work Queue's factory has them, with its defaults; ``timeout`` in seconds; ``tasks_per_worker`` 0: its
    cores."""

    min_workers: int = 5
    max_workers: int = 100
    workers_per_cycle: int = 5
    tasks_per_worker: float = 0
    timeout: float = 300.0
    cores: int = 1

    def to_submit(self, tasks: int, workers: int) -> int:
        """How many workers to submit now, for so many tasks that wait or run and so many workers that are or come."""
        per_worker = self.tasks_per_worker or self.cores
        wanted = min(max(math.ceil(tasks / per_worker), self.min_workers), self.max_workers)
        room = wanted - workers
        return max(0, min(room, self.workers_per_cycle) if self.workers_per_cycle > 0 else room)


class Idleness:
    """Since when each worker has had nothing to do."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def look(self, busy: Mapping[str, bool], now: float) -> None:
        """Workers by job, and whether each has something to do."""
        self._since = {job: self._since.get(job, now) for job, has_work in busy.items() if not has_work}

    def to_end(self, limits: Limits, workers: int, now: float) -> list[str]:
        """Those that have been idle too long, longest first, without going below the minimum; and any over the
        maximum."""
        longest = sorted(self._since, key=self._since.__getitem__)
        spare = max(0, workers - limits.min_workers)
        too_many = max(0, workers - limits.max_workers)
        idle = [job for job in longest if now - self._since[job] >= limits.timeout][:spare]
        return idle + [job for job in longest if job not in idle][: max(0, too_many - len(idle))]
