"""Many pilots at one manager: how soon all serve when they come at once, what they cost when idle, that each works."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil

from hpcq import state_dir
from hpcq.benchmark_function import inc
from hpcq.errors import HpcqError
from hpcq.queue import Queue
from hpcq.task import PythonTask

SERVE_TIMEOUT = 180.0
"""Seconds after which the benchmark gives up on pilots that do not serve."""

IDLE_SECONDS = 20.0
"""Seconds for which the idle manager is watched: longer than the time between two heartbeats."""

ROUNDS = 10
"""Tasks for each pilot."""

TASK_TIMEOUT = 60.0
"""Seconds in which at least one task must end."""


class Simulators:
    """The processes that simulate pilots."""

    def __init__(self, queue: Queue, pilots: int, processes: int) -> None:
        self._pilots = pilots
        self._connection = state_dir.connection_file(queue.name)
        self._shares = [pilots * number // processes for number in range(processes + 1)]
        self.processes: list[subprocess.Popen[str]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start them and wait until they are prepared; end them."""
        try:
            for first, last in zip(self._shares, self._shares[1:], strict=False):
                argv = [sys.executable, "-m", "hpcq.benchmark_simulator", str(self._connection), str(first)]
                self.processes.append(
                    subprocess.Popen(
                        [*argv, str(last - first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                    )
                )
            self._expect("ready")
            yield
        finally:
            for process in self.processes:
                process.communicate()

    def _expect(self, word: str) -> None:
        for process in self.processes:
            assert process.stdout is not None
            said = process.stdout.readline().strip()
            if said != word:
                raise HpcqError(f"a process of simulated pilots ended with status {process.wait()} before {word!r}")

    def connect(self) -> None:
        """Have all pilots connect at once."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()

    def cpu_seconds(self) -> float:
        """CPU time of all of them."""
        return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in self.processes)


def measure_pilots(pilots: int, processes: int) -> dict[str, Any]:
    """Connect simulated pilots at once and measure. Times in seconds, memory in MB (2**20 bytes).

    Raises:
        HpcqError: they did not all serve, or a task did not succeed.
    """
    with Queue(address="127.0.0.1") as queue:
        me = psutil.Process()
        simulators = Simulators(queue, pilots, processes)
        with simulators.running():
            before, memory = _cpu(me), _memory(me)
            began = time.perf_counter()
            simulators.connect()
            serving = len(queue.wait_for_pilots(pilots, SERVE_TIMEOUT))
            seconds = time.perf_counter() - began
            if serving < pilots:
                raise HpcqError(f"only {serving} of {pilots} pilots serve after {SERVE_TIMEOUT:.0f} s")
            connected = _cpu(me) - before
            figures = {
                "pilots": pilots,
                "seconds_until_all_serve": seconds,
                "manager_cpu_seconds": connected,
                "simulators_cpu_seconds": simulators.cpu_seconds(),
                "memory_connected": _memory(me),
                "memory_before": memory,
            }
            return {**figures, **_idle(me), **_tasks(queue, pilots), "memory_after_tasks": _memory(me)}


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


def _memory(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / (1 << 20)


def _idle(me: psutil.Process) -> dict[str, Any]:
    """The share of one core that the manager takes with nothing to do."""
    before, began = _cpu(me), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return {"idle_core_share": (_cpu(me) - before) / (time.perf_counter() - began)}


def _tasks(queue: Queue, pilots: int) -> dict[str, Any]:
    """Tasks until each pilot has worked."""
    count, began = ROUNDS * pilots, time.perf_counter()
    for number in range(count):
        queue.submit(PythonTask(inc, number))
    total = 0
    for _ in range(count):
        task = queue.wait(TASK_TIMEOUT)
        if task is None or task.outcome != "success":
            raise HpcqError(f"a task did not succeed: {task or queue.stats}")
        total += task.output
    seconds = time.perf_counter() - began
    if total != count * (count + 1) // 2:
        raise HpcqError(f"the tasks' values sum to {total}, not {count * (count + 1) // 2}")
    worked = sum(pilot.tasks_done > 0 for pilot in queue.pilots())
    return {"tasks": count, "tasks_per_second": count / seconds, "pilots_that_worked": worked}
