"""`Queue.map`, `Queue.pair` and `Queue.tree_reduce` on a queue that others use too."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from executor_help import DEADLINE, until

import hpcq
from hpcq.flow import AHEAD


def inc(x: int) -> int:
    return x + 1


def not_three(x: int) -> int:
    if x == 3:
        raise LookupError("it is three")
    return x


def join(words: list[str]) -> str:
    return "(" + "".join(words) + ")"


def two(words: list[int]) -> int:
    first, second = words
    return first + second


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map_gives_values_in_order(queue: hpcq.Queue, chunksize: int) -> None:
    assert list(queue.map(inc, range(50), chunksize)) == list(range(1, 51))


def test_map_of_nothing_is_empty(queue: hpcq.Queue) -> None:
    assert list(queue.map(inc, [])) == []
    assert list(queue.map(inc, [], 5)) == []


def test_map_reads_an_endless_input_as_values_are_taken(queue: hpcq.Queue) -> None:
    read = itertools.count()
    values = queue.map(inc, read)
    assert list(itertools.islice(values, 2 * AHEAD)) == list(range(1, 2 * AHEAD + 1))
    assert next(read) <= 3 * AHEAD + 1
    del values
    until(lambda: queue.stats["tasks"]["waiting"] == 0, "the rest is cancelled")


def test_map_runs_beside_the_users_own_tasks(queue: hpcq.Queue) -> None:
    own = {queue.submit(hpcq.PythonTask(inc, n).set(tag="0")): n + 1 for n in range(20)}
    assert list(queue.map(inc, range(20))) == list(range(1, 21))
    done = [queue.wait(DEADLINE) for _ in own]
    assert {task.id: task.output for task in done if task} == own
    assert queue.empty()


@pytest.mark.parametrize("chunksize", [1, 2])
def test_a_call_that_fails_raises_in_its_place_and_cancels_the_rest(queue: hpcq.Queue, chunksize: int) -> None:
    values = queue.map(not_three, itertools.chain(range(2), [3], range(100, 200)), chunksize)
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(LookupError, match="it is three") as caught:
        next(values)
    assert isinstance(caught.value.__cause__, hpcq.RemoteTraceback)
    assert list(values) == []
    assert queue.empty()


def test_long_tasks_of_a_failed_map_are_ended(queue: hpcq.Queue) -> None:
    values = queue.map(time.sleep, ["not a number", *[600] * 20])
    with pytest.raises(TypeError):
        next(values)
    assert list(queue.map(inc, range(10), cores=5)) == list(range(1, 11))


def test_an_error_of_the_input_ends_the_map(queue: hpcq.Queue) -> None:
    def broken() -> Iterator[float]:
        yield 600
        raise OSError("the list of files has gone")

    with pytest.raises(OSError, match="has gone"):
        queue.map(time.sleep, broken())
    until(lambda: queue.stats["tasks"]["running"] == 0, "the task is cancelled")


def test_map_takes_task_options(queue: hpcq.Queue, tmp_path: Path) -> None:
    with pytest.raises(hpcq.TaskFailedError, match="walltime"):
        list(queue.map(time.sleep, [600], walltime=0.2))
    with pytest.raises(hpcq.UsageError, match="unknown task option"):
        queue.map(inc, [1], chunk_size=2)


def test_pair_calls_with_every_pair(queue: hpcq.Queue) -> None:
    expected = [(x, y) for x in "abc" for y in range(4)]
    assert list(queue.pair(tuple, "abc", range(4))) == expected
    assert list(queue.pair(tuple, "abc", range(4), 5)) == expected


def test_tree_reduce_combines_neighbours_in_order(queue: hpcq.Queue) -> None:
    assert queue.tree_reduce(join, "abcdefg") == "(((ab)(cd))((ef)g))"
    assert queue.tree_reduce(join, "abcdefg", 3) == "((abc)(def)g)"


@pytest.mark.parametrize("count", [1, 2, 3, 100, 2 * AHEAD + 5])
def test_tree_reduce_never_calls_with_one_value(queue: hpcq.Queue, count: int) -> None:
    assert queue.tree_reduce(two, range(count)) == count * (count - 1) // 2


def test_tree_reduce_refuses_what_has_no_value(queue: hpcq.Queue) -> None:
    with pytest.raises(hpcq.UsageError, match="nothing to reduce"):
        queue.tree_reduce(sum, [])
    with pytest.raises(hpcq.UsageError, match="2 or more"):
        queue.tree_reduce(sum, [1], 1)
    with pytest.raises(hpcq.UsageError, match="1 or more"):
        queue.map(inc, [1], 0)


def test_tree_reduce_raises_what_the_function_raised(queue: hpcq.Queue) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        queue.tree_reduce(sum, [1, 2, "three", *range(1000)])
    until(lambda: queue.stats["tasks"]["waiting"] == 0, "the rest is cancelled")


def test_closing_the_queue_ends_a_map(state: Path) -> None:
    with hpcq.Queue() as queue:
        values = queue.map(inc, range(3))
    with pytest.raises(hpcq.QueueClosedError):
        next(values)
