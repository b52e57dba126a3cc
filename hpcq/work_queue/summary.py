"""What Work Queue tells in C structs: resources and statistics, as objects with its field names.

A field of Work Queue's that hpcq does not know raises `NotImplementedError`, so that no script takes a 0 for a figure.
"""

from __future__ import annotations

from typing import Any

from hpcq.work_queue.constants import unsupported

RESOURCE_FIELDS = frozenset(
    """
    start end wall_time cpu_time cores cores_avg gpus memory disk workers max_concurrent_processes total_processes
    virtual_memory swap_memory bytes_read bytes_written bytes_received bytes_sent bandwidth total_files machine_cpus
    machine_load context_switches fs_nodes snapshots snapshots_count snapshot_name peak_times
    """.split()  # noqa: SIM905 - a table of names reads better
)

STATISTICS_FIELDS = frozenset(
    """
    workers_connected workers_init workers_idle workers_busy workers_able workers_joined workers_removed
    workers_released workers_idled_out workers_fast_aborted workers_blocked workers_lost tasks_waiting
    tasks_on_workers tasks_running tasks_with_results tasks_submitted tasks_dispatched tasks_done tasks_failed
    tasks_cancelled tasks_exhausted_attempts time_when_started time_send time_receive time_send_good
    time_receive_good time_status_msgs time_internal time_polling time_application time_workers_execute
    time_workers_execute_good time_workers_execute_exhaustion bytes_sent bytes_received bandwidth capacity_tasks
    capacity_cores capacity_memory capacity_disk capacity_gpus capacity_instantaneous capacity_weighted total_cores
    total_memory total_disk total_gpus committed_cores committed_memory committed_disk committed_gpus max_cores
    max_memory max_disk max_gpus min_cores min_memory min_disk min_gpus manager_load port priority workers_ready
    workers_full total_worker_slots avg_capacity workers_blacklisted total_workers_connected total_workers_joined
    total_workers_removed total_workers_lost tasks_complete total_tasks_dispatched total_tasks_complete
    total_tasks_failed total_tasks_cancelled total_exhausted_attempts start_time capacity
    """.split()  # noqa: SIM905 - a table of names reads better
)

RENAMED = {
    "total_workers_connected": "workers_connected",
    "total_workers_joined": "workers_joined",
    "total_workers_removed": "workers_removed",
    "tasks_complete": "tasks_with_results",
    "total_tasks_complete": "tasks_done",
    "total_tasks_failed": "tasks_failed",
    "total_tasks_cancelled": "tasks_cancelled",
    "start_time": "time_when_started",
    "workers_ready": "workers_idle",
    "workers_full": "workers_busy",
    "total_worker_slots": "tasks_running",
    "workers_blacklisted": "workers_blocked",
}
"""Statistics under their deprecated names."""


class Fields:
    """Named values, and the names that Work Queue has and hpcq does not."""

    _known: frozenset[str] = frozenset()
    _what = ""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name in self._known:
            unsupported(f"{self._what}.{name}", f"there are {', '.join(self.__dict__) or 'none'}")
        raise AttributeError(f"{self._what} has no field {name!r}")

    def __repr__(self) -> str:
        return f"<{self._what} {' '.join(f'{name}={value}' for name, value in self.__dict__.items())}>"


class Resources(Fields):
    """Resources of a task. Times in seconds but ``start`` and ``end`` (µs since the epoch), sizes in MB."""

    _known = RESOURCE_FIELDS
    _what = "resources"


class Statistics(Fields):
    """Statistics of a queue or a category at one moment. Times in µs, sizes in MB."""

    _known = STATISTICS_FIELDS
    _what = "stats"

    def __getattr__(self, name: str) -> Any:
        if name in RENAMED and RENAMED[name] in self.__dict__:
            return self.__dict__[RENAMED[name]]
        return super().__getattr__(name)
