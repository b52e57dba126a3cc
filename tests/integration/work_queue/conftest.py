"""A `WorkQueue` with one real local worker of two cores, for all tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcq.work_queue as wq


@pytest.fixture(scope="module", autouse=True)
def state(module_state: Path, by_value: None) -> Path:
    """The module's own; its functions travel by value."""
    return module_state


@pytest.fixture(scope="module")
def working(state: Path) -> Iterator[wq.WorkQueue]:
    """The queue, its worker there."""
    with wq.WorkQueue(port=0, shutdown=True) as queue:
        factory = wq.Factory("local", manager=queue)
        factory.min_workers = factory.max_workers = 1
        factory.cores = 2
        with factory:
            assert queue.hpcq_queue.wait_for_pilots(1, 90)
            yield queue


@pytest.fixture
def q(working: wq.WorkQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[wq.WorkQueue]:
    """The same, in a directory of the test's own, with nothing of other tests in it."""
    monkeypatch.chdir(tmp_path)
    yield working
    working.cancel_all_tasks()
    assert not list(tmp_path.glob(".hpcq*"))
