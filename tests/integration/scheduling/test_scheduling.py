"""Explanations, categories, copies and blocked hosts through real queues and pilots."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEADLINE = 90.0
HPCQ = [sys.executable, "-m", "hpcq"]


def eventually(condition, seconds=DEADLINE):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def outcomes(queue):
    found = {}
    while not queue.empty():
        task = queue.wait(DEADLINE)
        assert task is not None
        found[task.id] = task.outcome
    return found


def ask(*arguments):
    return subprocess.run([*HPCQ, *arguments], capture_output=True, text=True, check=True, timeout=DEADLINE).stdout


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
    with pytest.raises(subprocess.CalledProcessError) as refused:
        ask("explain", "99", "--name", queue.name)
    assert refused.value.stderr == f"hpcq: no task 99 was submitted to queue {queue.name!r}\n"
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


def test_a_task_that_waits_for_anothers_output_is_listed_and_explained(open_queue):
    queue = open_queue()
    first = hpcq.Task("touch o", features={"nowhere"}, outputs={"o": hpcq.Temp()})
    queue.submit(first)
    second = queue.submit(hpcq.Task("cat i", inputs={"i": first.file("o")}))
    assert "output 'o' of task 1 (touch o) is not there yet" in queue.explain(second)
    listed = json.loads(ask("tasks", "--name", queue.name, "--json"))
    assert [(t["id"], t["state"]) for t in listed["tasks"]] == [(1, "waiting"), (2, "waiting")]
    assert listed["total"] == 2


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
    task = queue.wait(DEADLINE)
    assert (task.outcome, task.output) == ("success", "quick\n")
    eventually(lambda: queue.hungry() == 2)  # the slow one was ended, and its pilot is free again


def hold(megabytes, until):
    """Use so much memory until a file is there; how much we were given."""
    kept = os.urandom(4096) * (256 * megabytes)
    while not Path(until).exists():
        time.sleep(0.01)
    return len(kept)


def hold_at_first(megabytes, begun):
    """The first time for ever, until that is noticed."""
    again = Path(begun).exists()
    Path(begun).touch()
    return hold(megabytes, begun if again else "/nowhere/at/all")


def held(queue, megabytes, until="/", **options):
    """A task that holds memory, by number."""
    return queue.submit(hpcq.PythonTask(hold, megabytes, until).set(category="c", **options))


def ended(queue, number):
    task = queue.wait_for_id(number, DEADLINE)
    assert task is not None, queue.explain(number)
    return task


@pytest.mark.parametrize("mode", ["max", "max_throughput"])
def test_a_category_learns_what_its_tasks_use(open_queue, tmp_path, mode):
    """Two tasks fit beside each other only after their category has learned that 600 MB are more than they need."""
    queue = open_queue(cores=2, memory=1000)
    queue.category("c", mode, memory=600)
    release = tmp_path / "release"
    pair = [held(queue, 60, release) for _ in range(2)]
    eventually(lambda: any("runs on" in queue.explain(number) for number in pair))
    assert sum("runs on" in queue.explain(number) for number in pair) == 1  # 2 x 600 MB are more than there are
    release.touch()
    for number in [*pair, *(held(queue, 60) for _ in range(4))]:
        used = ended(queue, number).resources_measured["memory"]
        assert used < 300
    release.unlink()
    pair = [held(queue, 60, release) for _ in range(2)]
    eventually(lambda: all("runs on" in queue.explain(number) for number in pair))
    release.touch()
    assert {ended(queue, number).outcome for number in pair} == {"success"}


@pytest.mark.parametrize("mode", ["max", "max_throughput"])
def test_a_task_that_needs_more_than_its_category_knew_gets_it_at_the_next_try(open_queue, tmp_path, mode):
    queue = open_queue(cores=2, memory=1500)
    queue.category("c", mode, memory=400)
    for _ in range(6):
        assert ended(queue, held(queue, 30)).outcome == "success"
    large = hpcq.PythonTask(hold_at_first, 500, tmp_path / "begun").set(category="c", retries=0)
    task = ended(queue, queue.submit(large))  # such a try is none of the user's retries
    assert task.outcome == "success", task.message
    assert task.attempts == 2
    assert task.resources_measured["memory"] > 500


def test_a_fixed_category_ends_what_needs_more_as_resources(open_queue):
    queue = open_queue(memory=1500)
    queue.category("c", memory=200)
    task = ended(queue, held(queue, 500, "/nowhere/at/all"))
    assert (task.outcome, task.attempts) == ("resources", 1)


def test_nothing_gets_more_than_its_category_may(open_queue):
    queue = open_queue(memory=1500)
    queue.category("c", "max", memory=100, max_memory=300)
    task = ended(queue, held(queue, 500, "/nowhere/at/all"))
    assert task.outcome == "resources"
    assert task.attempts == 2
    assert "300 MB" in task.message


def test_a_walltime_is_not_begun_where_less_is_left(open_queue):
    queue = open_queue(pilots=0)
    queue.submit_pilots(1, walltime=90)
    assert len(queue.wait_for_pilots(1, DEADLINE)) == 1
    long = queue.submit(hpcq.Task("true", walltime=3600))
    short = queue.submit(hpcq.Task("true", walltime=5))
    assert ended(queue, short).outcome == "success"
    assert "walltime" in queue.explain(long)
    queue.submit_pilots(1)  # without an end
    task = ended(queue, long)
    assert task.outcome == "success"
    assert task.pilot != queue.pilots()[0].name


HOST = """
import socket, sys
if any("hpcq.pilot" in word for word in sys.orig_argv):
    socket.gethostname = lambda: {name!r}
"""


def on_host(queue, tmp_path, name):
    """A local pilot that takes itself to be on another host."""
    site = tmp_path / name
    site.mkdir()
    (site / "sitecustomize.py").write_text(HOST.format(name=name))
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    queue.submit_pilots(1, variables={"PYTHONPATH": path})
    eventually(lambda: any(pilot.hostname == name and pilot.state == "ready" for pilot in queue.pilots()))


def crash_on(host):
    """Dies on one host, and is fine on others."""
    import socket  # noqa: PLC0415

    if os.environ["HPCQ_TEST_HOST_OF_TASK"] == host:
        os._exit(1)
    return socket.gethostname()


def test_a_host_where_tasks_crash_is_blocked_while_others_do_fine(open_queue, tmp_path):
    queue = open_queue(pilots=0)
    for name in ("good", "bad"):
        on_host(queue, tmp_path, name)
    crashed = 0
    for _ in range(40):
        numbers = {
            host: queue.submit(
                hpcq.PythonTask(crash_on, "bad").set(features={f"host={host}"}, env={"HPCQ_TEST_HOST_OF_TASK": host})
            )
            for host in ("good", "bad")
        }
        assert ended(queue, numbers["good"]).outcome == "success"
        if any(pilot.blocked for pilot in queue.pilots()):
            break
        crashed += ended(queue, numbers["bad"]).outcome == "crash"
    (blocked,) = [pilot for pilot in queue.pilots() if pilot.blocked]
    assert blocked.hostname == "bad"
    assert "crashes or failed starts in a row" in blocked.blocked
    assert 5 <= crashed < 40
    waiting = queue.submit(hpcq.Task("true", features={"host=bad"}))
    assert "host bad is blocked" in queue.explain(waiting)
    queue.unblock_host("bad")
    assert ended(queue, waiting).outcome == "success"


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
