"""The parts of flows and executors that need no queue."""

from __future__ import annotations

import pickle
from concurrent import futures

import pytest

import hpcq
from hpcq import flow
from hpcq.serialize import FunctionCache


def double(x: int) -> int:
    return 2 * x


def test_chunks_keep_order_and_the_rest() -> None:
    assert list(flow.chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(flow.chunks([], 3)) == []


def test_chunks_are_read_when_they_are_taken() -> None:
    source = iter(range(10))
    chunks = flow.chunks(source, 4)
    assert next(chunks) == [0, 1, 2, 3]
    assert next(source) == 4


def test_the_function_of_a_chunk_is_pickled_once() -> None:
    cache, function = FunctionCache(), flow.each(double)
    key, body = cache.body(function)
    assert cache.body(function)[1] is body
    assert cache.body(function)[0] == key
    assert pickle.loads(body)([1, 2]) == [2, 4]


def test_a_broken_executor_is_what_the_standard_library_calls_one() -> None:
    assert issubclass(hpcq.BrokenExecutorError, futures.BrokenExecutor)
    assert issubclass(hpcq.BrokenExecutorError, hpcq.HpcqError)


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        hpcq.Executor(max_workers=0)
