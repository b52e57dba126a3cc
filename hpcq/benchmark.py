"""Measuring the queue: the figures of ``hpcq bench``, each the median of several runs in one sitting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil

from hpcq.benchmark_function import inc
from hpcq.errors import HpcqError
from hpcq.futures import Executor
from hpcq.queue import Queue
from hpcq.task import PythonTask, Task

PILOT_TIMEOUT = 60.0
"""Seconds the local pilots have to be ready."""

TASK_TIMEOUT = 60.0
"""Seconds in which at least one task must end; else the benchmark is stuck and says so."""


def measure_tasks(pilots: int, cores: int, count: int, repeat: int) -> dict[str, Any]:
    """Start local pilots and measure. Rates in tasks per second, times in milliseconds.

    Raises:
        HpcqError: the pilots did not start, or a task did not succeed.
    """
    with Queue() as queue:
        queue.submit_pilots(pilots, batch="local", cores=cores)
        _run_all(queue, [PythonTask(inc, 0) for _ in range(100 * pilots * cores)], PILOT_TIMEOUT)
        return {
            "python": _python(queue, count, repeat),
            "round_trip": _round_trip(queue, max(200, min(2000, count))),
            "executor": _executor(queue, count, repeat),
            "fork": _fork(queue, max(100, count // 20), repeat),
            "shell": _shell(queue, max(100, count // 20), repeat),
        }


def measure_queue(pilots: int, cores: int, count: int) -> dict[str, Any]:
    """Queue ``count`` Python tasks before there is a pilot, then run them all. Bytes are of this process's memory.

    Raises:
        HpcqError: the pilots did not start, or a task did not succeed.
    """
    process = psutil.Process()
    with Queue() as queue:
        first = max(1, count // 20)
        for number in range(first):  # what is allocated once and used again
            queue.submit(PythonTask(inc, number))
        queue.stats  # noqa: B018 - the manager has taken what was submitted before it answers
        before, began, worked = process.memory_info().rss, time.perf_counter(), _cpu(process)
        for number in range(count):
            queue.submit(PythonTask(inc, number))
        submitted = time.perf_counter() - began
        queue.stats  # noqa: B018
        submit_cpu = _cpu(process) - worked
        grown = process.memory_info().rss - before
        queue.submit_pilots(pilots, batch="local", cores=cores)
        queue.wait_for_pilots(pilots, PILOT_TIMEOUT)
        began, worked = time.perf_counter(), _cpu(process)
        for _ in range(first + count):
            _wait(queue, 1, TASK_TIMEOUT)
        seconds = time.perf_counter() - began
        return {
            "count": count,
            "submits_per_second": count / submitted,
            "bytes_per_task": grown / count,
            "per_second": (first + count) / seconds,
            "submit_cpu_microseconds": 1e6 * submit_cpu / count,
            "cpu_microseconds": 1e6 * (_cpu(process) - worked) / (first + count),
        }


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _python(queue: Queue, count: int, repeat: int) -> dict[str, Any]:
    runs, submits = [], []
    for _ in range(repeat):
        began = time.perf_counter()
        for number in range(count):
            queue.submit(PythonTask(inc, number))
        submits.append(count / (time.perf_counter() - began))
        total = sum(task.output for task in _wait(queue, count, TASK_TIMEOUT))
        runs.append(count / (time.perf_counter() - began))
        if total != count * (count + 1) // 2:
            raise HpcqError(f"the tasks' values sum to {total}, not {count * (count + 1) // 2}")
    return {**_rates(runs, count), "submits_per_second": statistics.median(submits)}


def _executor(queue: Queue, count: int, repeat: int) -> dict[str, Any]:
    with Executor(queue) as executor:
        return _rates([_timed(lambda: _call_all(executor, count), count) for _ in range(repeat)], count)


def _call_all(executor: Executor, count: int) -> None:
    calls = [executor.submit(inc, number) for number in range(count)]
    total = sum(call.result(TASK_TIMEOUT) for call in calls)
    if total != count * (count + 1) // 2:
        raise HpcqError(f"the futures' values sum to {total}, not {count * (count + 1) // 2}")


def _round_trip(queue: Queue, count: int) -> dict[str, Any]:
    trips = []
    for number in range(count):
        began = time.perf_counter()
        queue.submit(PythonTask(inc, number))
        _wait(queue, 1, TASK_TIMEOUT)
        trips.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(trips, n=100)
    return {"p50_ms": statistics.median(trips), "p99_ms": cuts[98], "count": count}


def _fork(queue: Queue, count: int, repeat: int) -> dict[str, Any]:
    def tasks() -> list[PythonTask]:
        return [PythonTask(inc, number).set(isolation="fork") for number in range(count)]

    _run_all(queue, tasks()[:10])  # their interpreters start
    return _rates([_timed(lambda: _run_all(queue, tasks()), count) for _ in range(repeat)], count)


def _shell(queue: Queue, count: int, repeat: int) -> dict[str, Any]:
    def run(count: int) -> None:
        _run_all(queue, [Task("true") for _ in range(count)])

    run(10)  # their runners start
    return _rates([_timed(lambda: run(count), count) for _ in range(repeat)], count)


def _timed(work: Callable[[], None], count: int) -> float:
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def _run_all(queue: Queue, tasks: list[Any], timeout: float = TASK_TIMEOUT) -> None:
    for task in tasks:
        queue.submit(task)
    _wait(queue, len(tasks), timeout)


def _wait(queue: Queue, count: int, timeout: float) -> list[Task]:
    tasks = []
    for _ in range(count):
        task = queue.wait(timeout)
        if task is None:
            raise HpcqError(f"no task ended within {timeout:.0f} s; the pilots: {queue.pilots() or 'none has come'}")
        if task.outcome != "success":
            raise HpcqError(f"{task.label} ended as {task.outcome}: {task.message}")
        tasks.append(task)
    return tasks


def _rates(runs: list[float], count: int) -> dict[str, Any]:
    return {
        "per_second": statistics.median(runs),
        "slowest": min(runs),
        "fastest": max(runs),
        "runs": len(runs),
        "count": count,
    }
