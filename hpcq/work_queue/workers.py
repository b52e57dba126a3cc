"""What Work Queue tells of workers and tasks, and what a program can do with workers. A part of `WorkQueue`."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from hpcq.batch import records
from hpcq.batch.base import get_batch_system
from hpcq.batch.states import by_batch, recorded_end
from hpcq.work_queue import constants as c
from hpcq.work_queue.categories import Category
from hpcq.work_queue.constants import unsupported
from hpcq.work_queue.summary import Statistics
from hpcq.work_queue.tasks import Task

if TYPE_CHECKING:
    import hpcq

log = logging.getLogger("hpcq.work_queue")

STATES = {
    c.WORK_QUEUE_TASK_READY: "WAITING",
    c.WORK_QUEUE_TASK_RUNNING: "RUNNING",
    c.WORK_QUEUE_TASK_RETRIEVED: "RETRIEVED",
}


class Workers:
    """Methods on workers, and statistics."""

    _queue: hpcq.Queue
    _name: str | None
    _started: float
    _execution: float
    _tasks: dict[int, Task]
    _held: dict[int, Task]
    _arrived: dict[int, Task]
    _categories: dict[str, Category]

    def _connected(self) -> list[hpcq.PilotView]:
        return [pilot for pilot in self._queue.pilots() if pilot.state in ("starting", "ready", "draining")]

    # --- hosts and workers ---

    def block_host(self, host: str) -> None:
        """Nothing more is placed on this host."""
        self._queue.block_host(host)

    blacklist = block_host

    def block_host_with_timeout(self, host: str, timeout: float) -> None:
        """The same for so many seconds; less than 1: for good."""
        self._queue.block_host(host, timeout if timeout >= 1 else None)

    blacklist_with_timeout = block_host_with_timeout

    def unblock_host(self, host: str | None = None) -> None:
        """Use the host again, or all hosts that have workers."""
        hosts = {pilot.hostname for pilot in self._queue.pilots()} if host is None else {host}
        for one in hosts:
            self._queue.unblock_host(one)

    blacklist_clear = unblock_host

    def specify_draining_by_hostname(self, hostname: str, drain_mode: bool = True) -> None:
        """Refused."""
        unsupported("specify_draining_by_hostname", "block_host places nothing more there")

    def shutdown_workers(self, n: int) -> int:
        """End ``n`` workers, idle ones first; 0: all. Their batch jobs are cancelled; returns how many."""
        pilots = sorted(self._connected(), key=lambda pilot: pilot.cores_busy)
        rank = {pilot.job_id: position for position, pilot in enumerate(pilots)}
        jobs = [job for job in records.load_jobs(self._queue.name) if recorded_end(job) is None]
        jobs.sort(key=lambda job: rank.get(job.id, -1))
        chosen = jobs if n < 1 else jobs[:n]
        for batch, members in by_batch(chosen).items():
            get_batch_system(batch).cancel(members)
        return len(chosen)

    def workers_summary(self) -> list[dict[str, int]]:
        """How many workers there are with the same cores, gpus, memory and disk."""
        count = Counter((one.cores, one.gpus, one.memory, one.disk) for one in self._connected())
        return [
            {"workers": number, "cores": cores, "gpus": gpus, "memory": memory, "disk": disk}
            for (cores, gpus, memory, disk), number in count.items()
        ]

    # --- statistics ---

    @property
    def stats(self) -> Statistics:
        """What is known of workers and tasks now; a field that is not known raises `NotImplementedError`."""
        pilots = self._queue.pilots()
        connected = [pilot for pilot in pilots if pilot.state in ("starting", "ready", "draining")]
        ready = [pilot for pilot in connected if pilot.state != "starting"]
        busy = sum(pilot.cores_busy > 0 for pilot in ready)
        return Statistics(
            workers_connected=len(connected),
            workers_init=len(connected) - len(ready),
            workers_idle=len(ready) - busy,
            workers_busy=busy,
            workers_joined=len(pilots),
            workers_removed=len(pilots) - len(connected),
            workers_blocked=sum(bool(pilot.blocked) for pilot in connected),
            time_when_started=int(self._started * 1e6),
            time_workers_execute=int(self._execution),
            committed_cores=sum(pilot.cores_busy for pilot in ready),
            port=self._queue.connection.port,
            **self._task_statistics(),
            **_sizes(connected),
        )

    def _task_statistics(self) -> dict[str, int]:
        now = self._queue.stats["tasks"]
        counted = self._categories.values()
        out = len(self._tasks) - len(self._held) - len(self._arrived)
        return {
            "tasks_waiting": max(0, out - now["sent"] - now["running"]) + len(self._held),
            "tasks_on_workers": now["sent"] + now["running"],
            "tasks_running": now["running"],
            "tasks_with_results": len(self._arrived),
            "tasks_submitted": sum(category.submitted for category in counted),
            "tasks_done": sum(category.done for category in counted),
            "tasks_failed": sum(category.failed for category in counted),
            "tasks_cancelled": sum(category.cancelled for category in counted),
        }

    @property
    def stats_hierarchy(self) -> Statistics:
        """The same: there are no foremen."""
        return self.stats

    def stats_category(self, category: str) -> Statistics:
        """What is known of the tasks of one category."""
        found = self._categories.get(category, Category(category, c.WORK_QUEUE_ALLOCATION_MODE_FIXED))
        members = [task for task in self._tasks.values() if task.category == category]
        running = self._queue.running([task._run.id for task in members if task._run.id is not None])
        arrived = sum(task._id in self._arrived for task in members)
        return Statistics(
            tasks_waiting=len(members) - len(running) - arrived, tasks_running=len(running), tasks_with_results=arrived,
            tasks_submitted=found.submitted, tasks_done=found.done, tasks_failed=found.failed,
            tasks_cancelled=found.cancelled,
        )  # fmt: skip

    def task_state(self, taskid: int) -> int:
        """See `WorkQueue.task_state`."""
        raise NotImplementedError

    def status(self, request: str) -> list[dict[str, Any]]:
        """``queue``, ``tasks``, ``workers`` or ``categories`` as a list of dictionaries."""
        answers = {
            "queue": self._queue_status,
            "tasks": self._tasks_status,
            "workers": self._workers_status,
            "categories": self._categories_status,
        }
        if request not in answers:
            raise ValueError(f"status takes one of {', '.join(answers)}, not {request!r}")
        return answers[request]()

    def _queue_status(self) -> list[dict[str, Any]]:
        return [{"name": self._queue.name, **vars(self.stats)}]

    def _tasks_status(self) -> list[dict[str, Any]]:
        return [
            {"taskid": number, "state": STATES[self.task_state(number)], "command_line": task.command, "tag": task.tag,
             "category": task.category, "priority": task.priority}
            for number, task in self._tasks.items()
        ]  # fmt: skip

    def _workers_status(self) -> list[dict[str, Any]]:
        return [
            {"hostname": one.hostname, "workerid": one.name, "cores_total": one.cores, "cores_inuse": one.cores_busy,
             "memory_total": one.memory, "disk_total": one.disk, "gpus_total": one.gpus,
             "total_tasks_complete": one.tasks_done, "blocked": bool(one.blocked)}
            for one in self._connected()
        ]  # fmt: skip

    def _categories_status(self) -> list[dict[str, Any]]:
        return [{"category": name, **vars(self.stats_category(name))} for name in self._categories]


def _sizes(pilots: list[hpcq.PilotView]) -> dict[str, int]:
    sizes = {}
    for name, (prefix, of) in itertools.product(
        ("cores", "memory", "disk", "gpus"), (("total", sum), ("max", max), ("min", min))
    ):
        values = [int(pilot[name]) for pilot in pilots]
        sizes[f"{prefix}_{name}"] = of(values) if values else 0
    return sizes
