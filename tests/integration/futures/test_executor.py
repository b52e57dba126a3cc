"""What `hpcq.Executor` does beyond CPython's tests: states, cancelling, errors from pilots, sharing a queue."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
from executor_help import DEADLINE, until

import hpcq


def inc(x: int) -> int:
    return x + 1


def fail(x: int) -> None:
    raise LookupError(f"no {x}")  # the line that is looked for


def wait_for(path: str) -> str:
    while not Path(path).exists():
        time.sleep(0.01)
    return path


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Unloadable:
    def __reduce__(self) -> tuple[object, ...]:
        return (_only_on_the_pilot, (os.getpid(),))


def _only_on_the_pilot(pid: int) -> int:
    if os.getpid() != pid:
        raise RuntimeError("made elsewhere")
    return pid


def make_unloadable() -> Unloadable:
    return Unloadable()


def begun(executor: hpcq.Executor, path: Path) -> futures.Future[str]:
    """A task that runs until ``path`` is there."""
    future = executor.submit(wait_for, str(path))
    until(future.running, "the task runs")
    return future


def test_a_future_goes_from_pending_to_running_to_done(executor: hpcq.Executor, tmp_path: Path) -> None:
    queued = executor.with_options(cores=10_000).submit(inc, 1)
    future = begun(executor, tmp_path / "go")
    assert not future.done()
    assert not queued.running()
    (tmp_path / "go").touch()
    assert future.result(DEADLINE) == str(tmp_path / "go")
    assert future.done()
    assert not future.running()
    assert queued.cancel()


def test_a_queued_task_can_be_cancelled(executor: hpcq.Executor) -> None:
    future = executor.with_options(cores=10_000).submit(inc, 1)
    assert future.cancel()
    assert future.cancelled()
    assert futures.wait([future], DEADLINE).done == {future}
    with pytest.raises(futures.CancelledError):
        future.result()


def test_a_running_task_can_be_cancelled_and_its_place_is_free_again(executor: hpcq.Executor, tmp_path: Path) -> None:
    every_core = executor.with_options(cores=5)
    future = begun(every_core, tmp_path / "never")
    assert future.cancel()
    assert futures.wait([future], DEADLINE).done == {future}
    assert every_core.submit(inc, 1).result(DEADLINE) == 2


def test_a_future_that_is_done_cannot_be_cancelled(executor: hpcq.Executor) -> None:
    future = executor.submit(inc, 1)
    assert future.result(DEADLINE) == 2
    assert not future.cancel()
    assert future.result() == 2


def test_the_remote_traceback_is_the_cause(executor: hpcq.Executor) -> None:
    future = executor.submit(fail, 7)
    with pytest.raises(LookupError, match="no 7") as caught:
        future.result(DEADLINE)
    assert isinstance(caught.value.__cause__, hpcq.RemoteTraceback)
    assert "in fail" in str(caught.value.__cause__)
    assert future.exception() is caught.value


def test_an_argument_that_cannot_be_pickled_is_named_on_the_future(executor: hpcq.Executor) -> None:
    future = executor.submit(inc, threading.Lock())
    assert isinstance(future.exception(DEADLINE), hpcq.SerializationError)
    with pytest.raises(hpcq.SerializationError, match="argument 1"):
        future.result()


def test_a_result_that_cannot_be_pickled_is_an_error(executor: hpcq.Executor) -> None:
    with pytest.raises(hpcq.SerializationError, match="the result"):
        executor.submit(threading.Lock).result(DEADLINE)


def test_a_result_that_cannot_be_rebuilt_here_is_an_error(executor: hpcq.Executor) -> None:
    future = executor.submit(make_unloadable)
    assert isinstance(future.exception(DEADLINE), hpcq.SerializationError)
    with pytest.raises(hpcq.SerializationError, match="made elsewhere"):
        future.result()


def test_a_task_that_dies_breaks_its_own_future_only(executor: hpcq.Executor) -> None:
    crashed, fine = executor.submit(die), executor.submit(inc, 1)
    with pytest.raises(hpcq.TaskFailedError, match="crash"):
        crashed.result(DEADLINE)
    assert fine.result(DEADLINE) == 2
    assert executor.submit(inc, 2).result(DEADLINE) == 3


def test_options_apply_to_what_is_submitted_through_them(executor: hpcq.Executor) -> None:
    short = executor.with_options(walltime=0.2)
    with pytest.raises(hpcq.TaskFailedError, match="walltime"):
        short.submit(time.sleep, 600).result(DEADLINE)
    longer = short.with_options(walltime=DEADLINE, env={"COLOUR": "red"})
    assert longer.submit(os.getenv, "COLOUR").result(DEADLINE) == "red"
    with pytest.raises(hpcq.UsageError, match="did you mean 'cores'"):
        executor.with_options(core=2)


def test_map_takes_chunks_and_several_iterables(executor: hpcq.Executor) -> None:
    assert list(executor.map(pow, range(50), range(60), chunksize=7)) == [n**n for n in range(50)]
    with pytest.raises(LookupError, match="no 3"):
        list(executor.map(fail, [3, 4], chunksize=2))


def test_arguments_are_taken_as_they_are_at_submit(executor: hpcq.Executor) -> None:
    numbers = [1, 2]
    future = executor.submit(sum, numbers)
    numbers.append(100)
    assert future.result(DEADLINE) == 3


def test_a_callback_that_blocks_holds_up_no_other_user_of_the_queue(queue: hpcq.Queue) -> None:
    release, entered = threading.Event(), threading.Event()
    blocked = hpcq.Executor(queue)

    def block(_: futures.Future[int]) -> None:
        entered.set()
        release.wait(DEADLINE)

    blocked.submit(inc, 1).add_done_callback(block)
    assert entered.wait(DEADLINE)
    with hpcq.Executor(queue) as other:
        assert other.submit(inc, 1).result(DEADLINE) == 2
    release.set()
    blocked.shutdown()


def test_a_callback_may_submit(executor: hpcq.Executor) -> None:
    second: futures.Future[int] = futures.Future()
    executor.submit(inc, 1).add_done_callback(
        lambda first: executor.submit(inc, first.result()).add_done_callback(lambda f: second.set_result(f.result()))
    )
    assert second.result(DEADLINE) == 3


def test_wait_of_the_queue_sees_only_its_own_tasks(queue: hpcq.Queue, executor: hpcq.Executor, tmp_path: Path) -> None:
    future = begun(executor, tmp_path / "go")
    done = executor.submit(inc, 1)
    number = queue.submit(hpcq.PythonTask(inc, 5))
    task = queue.wait(DEADLINE)
    assert task is not None
    assert (task.id, task.output) == (number, 6)
    assert done.result(DEADLINE) == 2
    assert queue.empty()
    assert queue.wait() is None
    (tmp_path / "go").touch()
    assert future.result(DEADLINE)


def test_the_queue_can_cancel_them_by_tag(queue: hpcq.Queue, executor: hpcq.Executor, tmp_path: Path) -> None:
    queued = executor.with_options(tag="mine", cores=10_000).submit(inc, 1)
    running = begun(executor.with_options(tag="mine"), tmp_path / "never")
    other = executor.submit(inc, 1)
    assert queue.cancel(tag="mine") == 2
    assert futures.wait([queued, running], DEADLINE).not_done == set()
    assert queued.cancelled()
    assert running.cancelled()
    assert other.result(DEADLINE) == 2


def test_asyncio_takes_it(executor: hpcq.Executor) -> None:
    async def work() -> list[int]:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, inc, n) for n in range(20)))

    assert asyncio.run(work()) == list(range(1, 21))


def test_shutting_it_down_leaves_a_given_queue_open(queue: hpcq.Queue) -> None:
    with hpcq.Executor(queue) as executor:
        future = executor.submit(inc, 1)
    assert future.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(inc, 1)
    queue.submit(hpcq.PythonTask(inc, 1))
    task = queue.wait(DEADLINE)
    assert task is not None
    assert task.output == 2


def test_shutdown_may_cancel_what_has_not_begun(queue: hpcq.Queue, tmp_path: Path) -> None:
    every_core = hpcq.Executor(queue).with_options(cores=5)
    running = begun(every_core, tmp_path / "go")
    queued = [every_core.submit(inc, n) for n in range(50)]
    every_core.shutdown(wait=False, cancel_futures=True)
    assert [future.cancelled() for future in queued] == [True] * 50
    assert not running.cancelled()
    (tmp_path / "go").touch()
    every_core.shutdown()
    assert running.result() == str(tmp_path / "go")


def test_options_of_an_own_queue_are_refused_with_a_given_one(queue: hpcq.Queue) -> None:
    with pytest.raises(hpcq.UsageError, match="pilots"):
        hpcq.Executor(queue, pilots=2)
    with pytest.raises(hpcq.UsageError, match="cores"):
        hpcq.Executor(queue, cores=2)
