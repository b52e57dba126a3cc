"""Pilots that drain, die, hang or lose their runners, and what becomes of the tasks they had."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
from running import DEADLINE, appears, begun, call, eventually, gone, note_and_wait, ready, run, wait

import hpcq
import hpcq.links
from hpcq.messages import TaskResult
from hpcq.pilot.ending import SAME_SIGNAL
from hpcq.protocol import frame

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def report_another_task(once):
    """The first time: say on our runner's stream that a task ended which it does not have, and wait for the end."""
    if once.exists():
        return
    once.touch()
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        try:
            channel = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # the directory itself, and what is no socket
            continue
        if (channel.family, channel.type) == (socket.AF_UNIX, socket.SOCK_STREAM):
            channel.sendall(frame(TaskResult(1 << 40, "success")))
    signal.pause()


def kill_own_pilot(marks):
    """The runner's parent is its guard, whose parent is the pilot."""
    (marks / f"{os.getpid()}").touch()
    os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)
    signal.pause()


def test_a_killed_pilots_task_runs_again_elsewhere_once(queue, start_pilot, marks, tmp_path):
    first = start_pilot(queue)
    ready(queue, 1)
    task = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(task)
    (mark,) = begun(marks)
    runner = int(mark.read_text())
    os.kill(first.pid, signal.SIGKILL)
    start_pilot(queue)
    begun(marks, 2)
    (tmp_path / "go").touch()
    assert wait(queue) is task
    assert (task.outcome, task.attempts, task.output) == ("success", 2, "done")
    assert len(list(marks.iterdir())) == 2
    assert gone(runner)


def test_a_task_that_loses_all_its_pilots_is_lost(queue, start_pilot, marks, tmp_path):
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=1)
    queue.submit(task)
    for attempt in (1, 2):
        pilot = start_pilot(queue)
        begun(marks, attempt)
        os.kill(pilot.pid, signal.SIGKILL)
        pilot.wait()
    assert wait(queue) is task
    assert (task.outcome, task.attempts) == ("lost", 2)
    assert "went away" in task.message


def test_a_task_that_kills_its_pilot_at_once_runs_no_more_often_than_it_may(queue, start_pilot, marks):
    task = call(kill_own_pilot, marks).set(retries=1)
    queue.submit(task)
    for _ in range(2):
        start_pilot(queue).wait()
    assert wait(queue) is task
    assert (task.outcome, task.attempts, len(list(marks.iterdir()))) == ("lost", 2, 2)


def test_sigterm_drains_a_pilot(queue, start_pilot, marks, tmp_path, place):
    first = start_pilot(queue)
    ready(queue, 1)
    running = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(running)
    begun(marks)
    waiting = [call(os.getppid) for _ in range(10)]
    for task in waiting:
        queue.submit(task)
    first.process.terminate()
    eventually(lambda: [v.state for v in queue.pilots()] == ["draining"], "it drains")
    start_pilot(queue)
    done = [wait(queue) for _ in waiting]
    assert {task.outcome for task in done} == {"success"}
    assert {task.attempts for task in done} == {1}
    (tmp_path / "go").touch()
    assert wait(queue) is running
    assert (running.outcome, running.attempts) == ("success", 1)
    assert first.wait() == 0
    assert running.pilot != done[0].pilot
    assert len(list(place.scratch.glob("hpcq-pilot-*"))) == 1


def test_a_second_sigterm_does_not_wait_for_tasks(queue, start_pilot, marks, tmp_path):
    pilot = start_pilot(queue, "--drain-timeout", "600")
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=0)
    queue.submit(task)
    begun(marks)
    pilot.process.terminate()
    eventually(lambda: [v.state for v in queue.pilots()] == ["draining"], "it drains")
    time.sleep(SAME_SIGNAL + 0.5)  # or it is taken for the first, told twice
    pilot.process.terminate()
    assert pilot.wait() == 0
    assert wait(queue).outcome == "lost"


def test_the_walltime_of_a_pilot_ends_it_in_time(queue, start_pilot, marks, tmp_path):
    pilot = start_pilot(queue, "--walltime", "27", "--drain-timeout", "1")  # it leaves itself 15 s of these
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=0)
    queue.submit(task)
    begun(marks)
    assert pilot.wait() == 0
    assert wait(queue).outcome == "lost"
    assert "its walltime ends" in task.message


def test_read_only_directories_of_tasks_are_removed_too(queue, pilot):
    assert run(queue, hpcq.Task("mkdir -p a/b && touch a/b/c && chmod 500 a/b a")).outcome == "success"


def test_a_pilot_that_breaks_inside_ends_and_its_tasks_run_elsewhere(queue, start_pilot, marks, tmp_path):
    first = start_pilot(queue, cores=2)
    ready(queue, 1)
    beside = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(beside)
    begun(marks)
    breaking = call(report_another_task, tmp_path / "broken")
    queue.submit(breaking)
    assert first.wait() == 1
    assert "Traceback" in first.said()
    assert "AssertionError: lane" in first.said()
    (view,) = queue.pilots()
    assert (view.state, view.failed_layer) == ("failed", "pilot")
    assert "broke inside: AssertionError" in view.message
    (tmp_path / "go").touch()
    start_pilot(queue)
    done = {wait(queue), wait(queue)}
    assert {(task.outcome, task.attempts) for task in done} == {("success", 2)}
    assert done == {beside, breaking}


def test_children_of_a_killed_pilot_die_with_it(queue, start_pilot, tmp_path):
    note = tmp_path / "pid"
    pilot = start_pilot(queue)
    task = hpcq.Task(f"setsid sleep 600 & echo $! > {note}; sleep 600", retries=0)
    queue.submit(task)
    child = int(appears(note))
    os.kill(pilot.pid, signal.SIGKILL)
    eventually(lambda: gone(child), "what the task started is gone")
    assert wait(queue).outcome == "lost"


def test_what_a_killed_pilot_left_on_disk_is_removed_by_the_next(queue, start_pilot, place):
    pilot = start_pilot(queue)
    run(queue, call(os.getpid))
    os.kill(pilot.pid, signal.SIGKILL)
    pilot.wait()
    (left,) = place.scratch.glob("hpcq-pilot-*")
    start_pilot(queue)
    run(queue, call(os.getpid))
    assert not left.exists()


def test_a_pilot_that_hangs_is_given_up_and_comes_back(open_queue, start_pilot, marks, tmp_path, monkeypatch):
    queue = open_queue()
    first = start_pilot(queue)
    ready(queue, 1)
    task = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(task)
    begun(marks)
    first.process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:  # only now: on a busy machine others may be silent for as long
        patch.setattr(hpcq.links, "SILENCE_LIMIT", 1.0)
        eventually(lambda: queue.stats["pilots"]["gone"] == 1, "it is given up")
    second = start_pilot(queue)
    begun(marks, 2)
    first.process.send_signal(signal.SIGCONT)
    assert len(ready(queue, 2)) == 2
    (tmp_path / "go").touch()
    assert wait(queue) is task
    assert str(second.pid) in task.pilot
    assert queue.wait() is None


def test_crashes_leak_nothing_on_the_pilot(queue, start_pilot, place):
    pilot = start_pilot(queue, cores=2)
    run(queue, call(os._exit, 1))

    def held():
        return len(list(Path(f"/proc/{pilot.pid}/fd").iterdir()))

    run(queue, call(os.getpid))
    before = held()
    tasks = [call(os._exit, 1) for _ in range(30)]
    for task in tasks:
        queue.submit(task)
    assert {wait(queue).outcome for _ in tasks} == {"crash"}
    run(queue, call(os.getpid))
    eventually(lambda: held() <= before + 6, "descriptors of ended runners are closed")  # one runner more has six
    eventually(lambda: len(list(place.scratch.glob("*/runner-*"))) <= 2, "their directories are removed")


def test_host_and_tunnel_tasks_side_by_side(queue, start_pilot):
    start_pilot(queue, cores=2)
    tasks = [call(os.getpid).set(network=network) for network in ("any", "wan", "host")]
    for task in tasks:
        queue.submit(task)
    assert {wait(queue).outcome for _ in tasks} == {"success"}
    assert tasks[2].output != tasks[0].output


def test_many_runners_are_not_too_many_open_files(queue, start_pilot, marks, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -Sn 64\nexec {sys.executable} "$@"\n')
    python.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        start_pilot(queue, cores=12)
    together = f"touch {marks}/$HPCQ_TASK_ID; while [ $(ls {marks} | wc -l) -lt 12 ]; do sleep 0.05; done; ulimit -Sn"
    for _ in range(12):
        queue.submit(hpcq.Task(together))
    tasks = [queue.wait(DEADLINE) for _ in range(12)]
    assert [task.output for task in tasks] == ["64\n"] * 12  # what they would have without us


def test_the_environment_of_a_task_ends_with_it(queue, pilot):
    assert run(queue, call(os.getenv, "GREETING").set(env={"GREETING": "hello"})).output == "hello"
    assert run(queue, call(os.getenv, "GREETING")).output is None
