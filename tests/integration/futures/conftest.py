"""Queues with real local pilots, a state directory of their own, and what the tests of executors share.

One queue with a pilot of five cores serves all tests of a module; five, because CPython's tests count on as many
workers. Functions defined in test modules are pickled by value: pilots cannot import these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from executor_help import DEADLINE

import hpcq

CORES = 5


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory of the module's own."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="module", autouse=True)
def by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the test's module travel by value."""
    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


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
