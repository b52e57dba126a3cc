"""Explanations, categories, copies and blocked hosts through real queues and pilots."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpcq

HPCQ = [sys.executable, "-m", "hpcq"]


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def outcomes(queue):
    found = {}
    while not queue.empty():
        task = queue.wait(60)
        assert task is not None
        found[task.id] = task.outcome
    return found


def ask(*arguments):
    return subprocess.run([*HPCQ, *arguments], capture_output=True, text=True, check=True, timeout=60).stdout


def test_explain_and_tasks_follow_a_task_through_its_life(open_queue, tmp_path):
    queue = open_queue()
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    first = queue.submit(hpcq.Task(f"cat {fifo}", tag="held", category="c"))
    large = queue.submit(hpcq.Task("true", cores=64))
    odd = queue.submit(hpcq.Task("true", features={"tunnel=relay"}))
    eventually(lambda: "runs on pilot" in queue.explain(first))
    assert "cores 64: 1 of 1 pilot has less (the most is 1)" in queue.explain(large)
    assert "feature 'tunnel=relay'" in ask("explain", str(odd), "--name", queue.name)
    listed = json.loads(ask("tasks", "--name", queue.name, "--json", "--limit", "2"))
    assert listed["total"] == 3
    assert [(t["id"], t["tag"], t["category"], t["state"]) for t in listed["tasks"]] == [
        (first, "held", "c", "running"),
        (large, None, None, "waiting"),
    ]
    assert "and 2 more" in ask("tasks", "--name", queue.name, "--limit", "1")
    assert queue.cancel(id=large) == queue.cancel(id=odd) == 1
    Path(fifo).write_text("")
    assert outcomes(queue) == {first: "success", large: "cancelled", odd: "cancelled"}
    assert queue.explain(first) == f"task {first} has ended"
    with pytest.raises(hpcq.UsageError, match="no task 99 was submitted"):
        queue.explain(99)


def test_features_of_the_pilot_are_met(open_queue):
    queue = open_queue()
    host = queue.pilots()[0].hostname
    queue.submit(hpcq.Task("true", features={f"host={host}", "tunnel=none"}))
    assert list(outcomes(queue).values()) == ["success"]


def test_hungry_counts_cores_that_no_waiting_task_can_use(open_queue):
    queue = open_queue(cores=3)
    assert queue.hungry() == 3
    running = queue.submit(hpcq.Task("sleep 60", cores=2))
    eventually(lambda: "runs on" in queue.explain(running))
    queue.submit(hpcq.Task("true", cores=64))
    assert queue.hungry() == 1
    queue.cancel()
    outcomes(queue)


def test_a_blocked_host_gets_nothing_until_it_is_unblocked(open_queue):
    queue = open_queue()
    host = queue.pilots()[0].hostname
    queue.block_host(host)
    assert queue.pilots()[0].blocked == "on request"
    number = queue.submit(hpcq.Task("true"))
    assert f"host {host} is blocked: on request" in queue.explain(number)
    assert queue.hungry() == 0
    queue.unblock_host(host)
    assert outcomes(queue) == {number: "success"}


def test_a_straggler_gets_a_copy_and_the_first_result_counts(open_queue, tmp_path):
    queue = open_queue(pilots=2, speculate=3)
    for _ in range(6):
        queue.submit(hpcq.Task("sleep 0.05", category="c"))
    outcomes(queue)
    # The first to come waits for ever, the second does not.
    queue.submit(hpcq.Task(f"mkdir {tmp_path}/slow && sleep 600; echo quick", category="c"))
    task = queue.wait(60)
    assert (task.outcome, task.output) == ("success", "quick\n")
    eventually(lambda: queue.hungry() == 2)  # the slow one was ended, and its pilot is free again


def test_a_category_learns_what_its_tasks_use(open_queue):
    queue = open_queue(memory=2000)
    queue.category("c", "max", memory=700)
    first = queue.submit(hpcq.Task("sleep 60", category="c"))
    eventually(lambda: "runs on" in queue.explain(first))
    second = queue.submit(hpcq.Task("true", category="c", memory=3000))
    assert "memory 3000 MB: 1 of 1 pilot has less (the most is 2000 MB)" in queue.explain(second)
    queue.cancel()
    outcomes(queue)


@pytest.mark.parametrize(
    "call",
    [
        lambda queue: queue.category("c", "most"),
        lambda queue: queue.category("", "max"),
        lambda queue: queue.category("c", memory=-1),
        lambda queue: queue.block_host(""),
        lambda queue: queue.block_host("h", seconds=0),
        lambda queue: hpcq.Task("true", features="x"),
        lambda queue: hpcq.Queue(speculate=1),
    ],
)
def test_what_makes_no_sense_is_refused(open_queue, call):
    with pytest.raises(hpcq.UsageError):
        call(open_queue(pilots=0))
