"""dask computes on an executor: `dask` takes any executor of ``concurrent.futures`` as its scheduler."""

from __future__ import annotations

import os

import pytest
from executor_help import missing

import hpcq

try:
    import dask
    import dask.array
except ModuleNotFoundError as error:
    missing(f"{error.name} is not installed")


def inc(x: int) -> int:
    return x + 1


def fail(x: int) -> int:
    raise LookupError(f"no {x}")


def test_a_delayed_graph_runs_on_the_pilots(executor: hpcq.Executor) -> None:
    total = dask.delayed(sum)([dask.delayed(inc)(n) for n in range(20)])
    where = dask.delayed(os.getpid)()
    value, pid = dask.compute(total, where, scheduler=executor)
    assert value == 210
    assert pid != os.getpid()


def test_an_array_graph_runs_on_the_pilots(executor: hpcq.Executor) -> None:
    array = dask.array.ones((400, 400), chunks=(100, 100))
    with dask.config.set(scheduler=executor):
        assert (array + array.T).sum().compute() == 320_000


def test_the_schedulers_of_dask_take_it_as_their_pool(executor: hpcq.Executor) -> None:
    total = dask.delayed(sum)([dask.delayed(inc)(n) for n in range(20)])
    for scheduler in ("threads", "processes"):
        with dask.config.set(scheduler=scheduler, pool=executor):
            assert total.compute() == 210


def test_an_exception_reaches_the_user(executor: hpcq.Executor) -> None:
    with pytest.raises(LookupError, match="no 7"):
        dask.delayed(fail)(7).compute(scheduler=executor)
