"""What one task leaves for the next, in each kind of isolation, and what is left of a task when it ends or dies."""

import builtins
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import cloudpickle
import psutil
import pytest
from running import DEADLINE, appears, eventually, gone, run

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])
KINDS = ("warm", "fork", "fresh")
PRELOAD = Path(hpcq.__file__).parent / "preload"


def call(isolation, function, *args, **options):
    return hpcq.PythonTask(function, *args).set(isolation=isolation, **options)


def count():
    """How often this was called in this interpreter."""
    builtins.hpcq_count = getattr(builtins, "hpcq_count", 0) + 1
    return builtins.hpcq_count


def variable(name):
    return os.environ.get(name)


def daemon(path, end):
    """A child's child with a session of its own, away from every terminal; then the task returns or dies."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(path).write_text(str(os.getpid()))
            signal.pause()
        os._exit(0)
    while not Path(path).exists() or not Path(path).read_text():
        pass
    if end == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    return int(Path(path).read_text())


def write_everywhere(mark):
    """To both streams from Python, from C with its buffers, and from a subprocess."""
    libc = ctypes.CDLL(None)
    print(f"python {mark}")
    print(f"python error {mark}", file=sys.stderr)
    libc.printf(b"C %d\n", mark)
    subprocess.run(["sh", "-c", f"echo child {mark}; echo child error {mark} >&2"], check=True)


# --- state ---------------------------------------------------------------------------------------------------------


def test_globals_are_kept_in_warm_interpreters_and_nowhere_else(queue, pilot):
    found = {kind: [run(queue, call(kind, count)).output for _ in range(3)] for kind in KINDS}
    assert found == {"warm": [1, 2, 3], "fork": [1, 1, 1], "fresh": [1, 1, 1]}


def test_fork_tasks_have_processes_of_their_own_and_one_parent(queue, pilot):
    found = [run(queue, call("fork", lambda: (os.getpid(), os.getppid()))).output for _ in range(3)]
    assert len({pid for pid, _ in found}) == 3
    assert len({parent for _, parent in found}) == 1


def test_warm_interpreters_are_replaced_on_request(queue, pilot):
    def used_up():
        hpcq.recycle()
        return os.getpid()

    first = run(queue, call("warm", used_up)).output
    second = run(queue, call("warm", os.getpid)).output
    third = run(queue, call("warm", os.getpid)).output
    assert first != second == third
    eventually(lambda: gone(first), "the old interpreter ends")


def test_commands_do_not_see_what_functions_did_to_their_environment(queue, pilot):
    run(queue, call("warm", os.putenv, "LEAKED", "yes"))
    run(queue, call("warm", lambda: os.environ.update(LEAKED="yes")))
    assert run(queue, hpcq.Task("echo $LEAKED")).output == "\n"


# --- leaks ---------------------------------------------------------------------------------------------------------


def test_a_warm_interpreter_that_keeps_too_much_memory_is_replaced(queue, pilot):
    def keep(megabytes):
        builtins.hpcq_kept = os.urandom(1) * (megabytes << 20)
        return os.getpid()

    a_little = [run(queue, call("warm", keep, 10, memory=200)) for _ in range(2)]
    assert len({task.output for task in a_little}) == 1
    too_much = run(queue, call("warm", keep, 120, memory=200))
    assert too_much.outcome == "success"
    assert too_much.output == a_little[0].output
    after = run(queue, call("warm", os.getpid, memory=200))
    assert after.output != too_much.output


# --- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_is_that_tasks_only(queue, pilot, kind):
    crash = run(queue, call(kind, ctypes.string_at, 0))
    assert crash.outcome == "crash"
    assert "SIGSEGV" in crash.message
    left = run(queue, call(kind, os._exit, 7))
    assert (left.outcome, "exit status 7" in left.message) == ("crash", True)
    assert run(queue, call(kind, count)).output == 1


def test_a_crash_of_a_fork_leaves_its_parent(queue, pilot):
    parent = run(queue, call("fork", os.getppid)).output
    assert run(queue, call("fork", os._exit, 1)).outcome == "crash"
    assert run(queue, call("fork", os.getppid)).output == parent


@pytest.mark.parametrize("library", [True, False], ids=["by the library", "by itself"])
def test_a_fork_dies_with_its_runner(library):
    if library and not (PRELOAD / "forks_die.so").is_file() and not os.environ.get("HPCQ_TESTS_MUST_RUN"):
        pytest.skip("it is not compiled")
    program = f"""
import os
from hpcq.pilot import guard
runner = os.getpid()
if {library}:
    assert guard.forks_die_with_us()
child = os.fork()
if child == 0:
    {library} or guard.die_with(runner)
    grandchild = os.fork()
    if grandchild == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    print(os.getpid(), flush=True)
    os.read(0, 1)
os.read(0, 1)
"""
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program], stdin=reader, stdout=subprocess.PIPE, text=True) as runner:
        child = int(runner.stdout.readline())
        (grandchild,) = eventually(lambda: psutil.Process(child).children(), "it forks as well")
        runner.kill()
    eventually(lambda: gone(child), "the fork dies with it")
    assert not gone(grandchild.pid)
    os.close(writer)  # that one is nobody's but its own
    os.close(reader)
    eventually(lambda: gone(grandchild.pid), "all has ended")


def test_a_runner_that_forks_leaves_nothing_of_its_own_to_tasks(queue, pilot):
    assert run(queue, call("fork", variable, "LD_BIND_NOW")).result() is None


def test_a_fork_task_that_leaves_by_exception_or_with_a_value_that_cannot_travel(queue, pilot):
    raised = run(queue, call("fork", {}.__getitem__, "key"))
    assert (raised.outcome, type(raised.exception)) == ("exception", KeyError)
    assert run(queue, call("fork", sys._getframe)).outcome == "unserializable"
    assert run(queue, call("fork", os.urandom, 20 << 20)).outcome == "success"


@pytest.mark.parametrize("kind", KINDS)
def test_limits_hold_in_every_kind(queue, pilot, kind):
    task = run(queue, call(kind, signal.pause, walltime=0.3))
    assert task.outcome == "walltime"
    assert task.resources_measured["wall"] >= 0.3
    assert run(queue, call(kind, count)).output == 1


@pytest.mark.parametrize("how", ["walltime", "cancel"])
def test_the_end_of_a_fork_is_not_its_parents(queue, pilot, tmp_path, how):
    def parent_of(path):
        print("said before", flush=True)
        Path(path).write_text("begun")
        signal.pause()

    parent = run(queue, call("fork", os.getppid)).output
    number = queue.submit(call("fork", parent_of, str(tmp_path / "a"), walltime=2 if how == "walltime" else None))
    appears(tmp_path / "a")
    if how == "cancel":
        queue.cancel(id=number)
    task = queue.wait_for_id(number, DEADLINE)
    assert task.outcome == {"cancel": "cancelled"}.get(how, how)
    assert task.std_output == "said before\n"
    assert run(queue, call("fork", os.getppid)).output == parent


@pytest.mark.parametrize("how", ["walltime", "cancel"])
def test_the_end_of_a_command_is_not_its_runners(queue, pilot, tmp_path, how):
    parent = run(queue, hpcq.Task("echo $PPID")).output
    script = f"echo said before; touch {tmp_path}/a; sleep 600; echo said after"
    number = queue.submit(hpcq.Task(script, walltime=2 if how == "walltime" else None))
    eventually((tmp_path / "a").exists, "it has begun")
    if how == "cancel":
        queue.cancel(id=number)
    task = queue.wait_for_id(number, DEADLINE)
    assert (task.outcome, task.exit_code) == ({"cancel": "cancelled"}.get(how, how), None)
    assert task.std_output == "said before\n"
    assert run(queue, hpcq.Task("echo $PPID")).output == parent


def test_a_command_that_signals_its_process_group_does_not_end_its_runner(queue, pilot):
    parent = run(queue, hpcq.Task("echo $PPID")).output
    for env in ({}, {"LD_BIND_NOW": "1"}):  # which needs a shell of its own
        task = run(queue, hpcq.Task("trap '' TERM; kill 0; echo done", env=env))
        assert (task.outcome, task.output) == ("success", "done\n")
        assert run(queue, hpcq.Task("echo $PPID")).output == parent


def test_a_command_that_ruins_its_directory_leaves_a_good_one_to_the_next(queue, pilot):
    home = run(queue, hpcq.Task("pwd")).output
    for ruin in (
        "chmod 000 .",
        'rm -r "$PWD"',
        'mv "$PWD" ../elsewhere; mkdir "$PWD"; touch x',
        "touch .hidden; mkdir d",
    ):
        assert run(queue, hpcq.Task(ruin)).outcome == "success", ruin
        after = run(queue, hpcq.Task("pwd; ls -A; touch y && stat -c %a ."))
        assert after.output == f"{home}700\n", ruin


# --- children ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["return", "die"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_child_outlives_its_task(queue, pilot, tmp_path, kind, end):
    file = tmp_path / "pid"
    task = run(queue, call(kind, daemon, str(file), end))
    assert task.outcome == ("success" if end == "return" else "crash"), task.message
    assert gone(int(appears(file)))


def test_no_child_outlives_its_command(queue, pilot, tmp_path):
    file = tmp_path / "pid"
    script = (
        f"setsid sh -c 'echo $$ > {file}.new; mv {file}.new {file}; exec sleep 600' & until test -s {file}; do :; done"
    )
    assert run(queue, hpcq.Task(script)).outcome == "success"
    assert gone(int(file.read_text()))


def test_no_child_outlives_a_task_that_is_cancelled(queue, pilot, tmp_path):
    def wait_with_a_daemon(path):
        daemon(path, "return")
        signal.pause()

    for kind in KINDS:
        file = tmp_path / kind
        number = queue.submit(call(kind, wait_with_a_daemon, str(file)))
        pid = int(appears(file))
        queue.cancel(id=number)
        assert queue.wait_for_id(number, DEADLINE).outcome == "cancelled"
        assert gone(pid)


# --- output --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_task_writes_is_its_own_wherever_it_comes_from(queue, pilot, kind):
    for mark in (1, 2):
        task = run(queue, call(kind, write_everywhere, mark))
        assert sorted(task.std_output.splitlines()) == [f"C {mark}", f"child {mark}", f"python {mark}"]
        assert sorted(task.std_error.splitlines()) == [f"child error {mark}", f"python error {mark}"]
