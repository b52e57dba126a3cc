"""CPython's own tests of executors, run against `hpcq.Executor` with the interpreter's own files.

Left out, with the reason:

- initializers and ``max_tasks_per_child``: pilots keep their runners; what a task needs it sets up itself.
- tests that look at ``_threads``, ``_processes`` or worker names, and those that pass semaphores or locks to the tasks
  (``test_saturation``, ``test_threads_terminate``, ``test_idle_*``, ``test_pending_calls_race``,
  ``test_executor_map_current_future_cancel``): workers are in other processes, perhaps on other hosts.
- those that start a program which imports the class by its name from ``concurrent.futures``
  (``test_interpreter_shutdown``, ``test_submit_after_interpreter_shutdown``, ``test_hang_gh83386``,
  ``test_hang_gh94440``, ``test_cancel_futures_wait_false``): `test_executor_end` tests the same for ours.
- ``test_cancel_futures``: wants a task to have begun the moment 50 are submitted; on a pilot it begins a round trip
  later. `test_executor` waits until one has.
- ``test_killed_child`` and ``ExecutorDeadlockTest``: a dead worker breaks their whole pool; here it costs one task
  (`test_executor`).
- ``test_traceback``: wants the process pool's private class as the cause; `test_executor` tests ours.
- the classes of `Future` alone: they do not touch an executor.
"""

from __future__ import annotations

import importlib
import itertools
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from executor_help import missing

import hpcq

HOME = "test.test_concurrent_futures"


def from_cpython(name: str) -> Any:
    """A class of that name: from one module up to Python 3.11, from a package after it."""
    for module in (HOME, *(f"{HOME}.{part}" for part in ("util", "executor", "test_wait", "test_as_completed",
                                                         "test_shutdown", "test_process_pool"))):  # fmt: skip
        try:
            return getattr(importlib.import_module(module), name)
        except (AttributeError, ModuleNotFoundError):
            continue
    return None


if from_cpython("BaseTestCase") is None:
    missing("this interpreter comes without CPython's tests (Debian: apt-get install libpython3-testsuite)")


class OnPilots(from_cpython("ExecutorMixin"), unittest.TestCase):
    """Executors on the module's queue, in the place of the pools CPython makes for each test.

    Not CPython's own base: it counts the threads of the whole process, the queue's among them.
    """

    queue: hpcq.Queue

    def executor_type(self, max_workers: int | None = None) -> hpcq.Executor:
        return hpcq.Executor(self.queue, max_workers=max_workers)


@pytest.fixture(scope="module", autouse=True)
def _shared_queue(queue: hpcq.Queue) -> Iterator[None]:
    OnPilots.queue = queue
    yield
    del OnPilots.queue


def only(tests: Any, *names: str) -> type:
    """Of a class of tests, those named, and nothing else of it."""
    found = {name: getattr(tests, name) for name in names}
    return type(tests.__name__, (), found)


class TestExecutor(from_cpython("ExecutorTest"), OnPilots):
    pass


class TestWait(from_cpython("WaitTests"), OnPilots):
    pass


class TestAsCompleted(from_cpython("AsCompletedTests"), OnPilots):
    pass


class TestShutdown(
    only(from_cpython("ExecutorShutdownTest"), "test_run_after_shutdown", "test_hang_issue12364"),
    OnPilots,
):
    pass


class TestChunks(only(from_cpython("ProcessPoolExecutorTest"), "test_map_chunksize"), OnPilots):
    pass


def test_all_of_these_are_real_tests() -> None:
    loader = unittest.TestLoader()
    classes = (TestExecutor, TestWait, TestAsCompleted, TestShutdown, TestChunks)
    names = list(itertools.chain.from_iterable(map(loader.getTestCaseNames, classes)))
    assert len(names) >= 25
