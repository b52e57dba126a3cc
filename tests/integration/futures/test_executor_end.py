"""How executors end: with their own queue, at the interpreter's end, interrupted, broken, forgotten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

import pytest
from executor_help import DEADLINE, until

import hpcq
from hpcq import state_dir


def inc(x: int) -> int:
    return x + 1


def touch(path: str) -> None:
    Path(path).touch()


def program(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has an executor of its own."""
    text = f"import sys, time, pathlib, hpcq\n{body}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text, *arguments],
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip


def test_an_executor_of_its_own_ends_its_queue_and_pilots(state: Path) -> None:
    with hpcq.Executor(cores=1) as executor:
        assert executor.submit(inc, 1).result(DEADLINE) == 2
        queue = executor.queue
        assert [view.state for view in queue.pilots()] == ["ready"]
        assert state_dir.connection_file(queue.name).exists()
    with pytest.raises(hpcq.QueueClosedError):
        queue.submit(hpcq.PythonTask(inc, 1))
    assert not state_dir.connection_file(queue.name).exists()


def test_max_workers_are_cores_of_the_pilots(state: Path) -> None:
    with hpcq.Executor(max_workers=2) as executor:
        executor.submit(inc, 1).result(DEADLINE)
        assert executor.queue.cores == 2


def test_a_bad_option_leaves_no_queue_behind(state: Path) -> None:
    before = threading.active_count()
    with pytest.raises(hpcq.UsageError, match="initializer"):
        hpcq.Executor(name="never", initializer=print)
    assert threading.active_count() == before
    assert not state_dir.connection_file("never").exists()


def test_shutdown_without_waiting_finishes_what_was_submitted(state: Path) -> None:
    executor = hpcq.Executor(cores=1)
    values = [executor.submit(inc, n) for n in range(10)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(inc, 1)
    assert [future.result(DEADLINE) for future in values] == list(range(1, 11))
    executor.shutdown()


def test_one_that_is_dropped_finishes_and_closes_its_queue(state: Path) -> None:
    executor = hpcq.Executor(cores=1).with_options(retries=1)
    queue = executor.queue
    (thread,) = [one for one in threading.enumerate() if one.name == f"hpcq-{queue.name}-futures"]
    values = executor.map(inc, range(10))
    del executor
    assert list(values) == list(range(1, 11))
    thread.join(DEADLINE)
    assert not thread.is_alive()
    with pytest.raises(hpcq.QueueClosedError):
        queue.submit(hpcq.PythonTask(inc, 1))


def test_the_interpreters_end_waits_for_what_was_submitted(state: Path, tmp_path: Path) -> None:
    answer = program(
        "pool = hpcq.Executor(cores=1)\nfor path in sys.argv[1:]: pool.submit(pathlib.Path.touch, pathlib.Path(path))",
        str(tmp_path / "a"), str(tmp_path / "b"),
    )  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_nothing_is_taken_after_the_interpreters_end(state: Path) -> None:
    answer = program(
        "import atexit\n"
        "def last():\n"
        "    try: pool.submit(int)\n"
        "    except RuntimeError as error: print(error)\n"
        "atexit.register(last)\n"
        "pool = hpcq.Executor(cores=1)\n"
        "pool.submit(int).result()"
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == "cannot schedule new futures after shutdown\n"


def test_an_interrupted_block_cancels_everything(state: Path) -> None:
    out: list[futures.Future[None]] = []

    def interrupted() -> None:
        with hpcq.Executor(cores=1) as executor:
            out.extend(executor.submit(time.sleep, 600) for _ in range(2))
            until(out[0].running, "the task runs")
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [future.cancelled() for future in out] == [True, True]
    assert time.monotonic() - began < DEADLINE


def test_it_is_broken_when_all_its_pilots_have_failed(state: Path) -> None:
    with hpcq.Executor(cores=1, setup=["echo the node is on fire", "exit 7"]) as executor:
        future = executor.submit(inc, 1)
        assert isinstance(future.exception(DEADLINE), hpcq.BrokenExecutorError)
        with pytest.raises(futures.BrokenExecutor, match="the node is on fire"):
            future.result()
        with pytest.raises(hpcq.BrokenExecutorError, match="no pilot of queue"):
            executor.submit(inc, 1)


def test_it_is_broken_as_soon_as_its_last_pilot_is_killed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcq.futures.LOOK_AT_PILOTS", None)  # it is told, or it never knows
    monkeypatch.setattr("hpcq.batch.tracker.POLL_INTERVAL", 3600.0)
    with hpcq.Executor(cores=1) as executor:
        assert executor.submit(inc, 1).result(DEADLINE) == 2
        (pid,) = executor.queue._manager.call(
            lambda: [entry.pid for entry in executor.queue._manager._roster.entries.values()]
        )
        future = executor.submit(time.sleep, 600)
        until(future.running, "the task runs")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(hpcq.BrokenExecutorError, match="all its batch jobs have ended"):
            future.result(DEADLINE)


def test_it_is_broken_when_its_queue_is_closed(state: Path) -> None:
    with hpcq.Queue() as queue:
        executor = hpcq.Executor(queue)
        future = executor.submit(inc, 1)
    with pytest.raises(hpcq.BrokenExecutorError, match="it was closed"):
        future.result(DEADLINE)
    with pytest.raises(hpcq.BrokenExecutorError):
        executor.submit(inc, 1)
    executor.shutdown()
