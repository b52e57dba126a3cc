"""The user's program is interrupted, killed, or just ends; its pilots and jobs follow, or stay when they should."""

import os
import signal
import subprocess
import sys

import cloudpickle
import pytest
from running import DEADLINE, appears, call, eventually, gone, ready, run

import hpcq
import hpcq.manager
from hpcq import state_dir

cloudpickle.register_pickle_by_value(sys.modules[__name__])


PROGRAM = """
import sys, time, hpcq
queue = hpcq.Queue("q", address="127.0.0.1", **{options})
{before}
print("serving", flush=True)
queue.submit(hpcq.Task("echo $$ > {note}; sleep 600"))
with queue:
    queue.wait()
"""


class Program:
    """A user's program in a process of its own."""

    def __init__(self, note, before="", **options):
        text = PROGRAM.format(options=options, before=before, note=note)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line == "serving\n", self.process.stderr.read()


@pytest.fixture
def program():
    started = []

    def make(*args, **options):
        started.append(Program(*args, **options))
        return started[-1].process

    yield make
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_pilots_of_a_killed_program_end_by_themselves(program, start_pilot, place, tmp_path):
    process = program(tmp_path / "pid")
    pilot = start_pilot(connection=state_dir.connection_file("q"), manager_timeout=1.0)
    child = int(appears(tmp_path / "pid"))
    process.kill()
    assert pilot.wait() == 0
    assert gone(child)
    assert "the manager is gone" in pilot.said()


def test_a_program_started_again_takes_its_pilots_over(program, start_pilot, open_queue, tmp_path):
    process = program(tmp_path / "pid")
    pilot = start_pilot(connection=state_dir.connection_file("q"), manager_timeout=90.0)
    child = int(appears(tmp_path / "pid"))
    process.kill()
    process.wait()
    queue = open_queue()
    task = run(queue, hpcq.Task("echo again"))
    assert task.output == "again\n"
    assert gone(child)
    assert pilot.process.poll() is None


LOCAL = "queue.submit_pilots(2, batch='local', manager_timeout=1)"


def test_ctrl_c_in_the_program_ends_its_pilots_and_jobs(program, place, tmp_path):
    process = program(tmp_path / "pid", LOCAL)
    child = int(appears(tmp_path / "pid"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    eventually(lambda: gone(child), "what they ran is gone")
    eventually(place.nothing_left, "all pilots have ended")


def test_ctrl_c_leaves_pilots_that_are_to_be_kept(program, open_queue, place, tmp_path):
    process = program(tmp_path / "pid", LOCAL.replace("=1", "=90"), keep_pilots=True)
    appears(tmp_path / "pid")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert place.processes()
    queue = open_queue()
    assert len(ready(queue, 2)) == 2
    assert run(queue, call(os.getpid)).outcome == "success"


def test_a_program_that_just_ends_closes_its_queue(place):
    text = """
import hpcq
import hpcq.manager
queue = hpcq.Queue("q", address="127.0.0.1")
queue.submit_pilots(1, batch="local", manager_timeout=60)
queue.submit(hpcq.Task("true"))
assert queue.wait(90).outcome == "success"
"""
    done = subprocess.run([sys.executable, "-c", text], check=False, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    eventually(place.nothing_left, "its pilot has ended")


def test_a_fork_of_the_program_leaves_its_queue_alone(queue, pilot):
    child = os.fork()
    if child == 0:
        queue.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert state_dir.connection_file("q").exists()
    assert run(queue, call(os.getpid)).outcome == "success"
