"""Queues with real local pilots, a state directory of their own, and what the tests of executors share.

One queue with a pilot of five cores serves all tests of a module; five, because CPython's tests count on as many
workers. Functions defined in test modules are pickled by value: pilots cannot import these.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_help import DEADLINE

import hpcq

CORES = 5


@pytest.fixture(scope="module", autouse=True)
def state(module_state: Path, by_value: None) -> Path:
    """The module's own; its functions travel by value."""
    return module_state


@pytest.fixture(scope="module")
def queue(state: Path) -> Iterator[hpcq.Queue]:
    """A queue with one local pilot that is ready."""
    with hpcq.Queue() as queue:
        queue.submit_pilots(1, batch="local", cores=CORES)
        queue.submit(hpcq.PythonTask(int))
        task = queue.wait(DEADLINE)
        assert task is not None
        assert task.outcome == "success"
        yield queue


@pytest.fixture
def executor(queue: hpcq.Queue) -> Iterator[hpcq.Executor]:
    """An executor on that queue; what a test leaves behind is cancelled."""
    executor = hpcq.Executor(queue)
    yield executor
    executor.shutdown(wait=False, cancel_futures=True)
