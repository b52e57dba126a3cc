"""What tasks may use, what they are seen to use, and what happens when that is too much."""

import builtins
import os
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
from running import DEADLINE, eventually, ready, run, wait

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def call(function, *args, **options):
    return hpcq.PythonTask(function, *args).set(**options)


def hold(megabytes):
    """Memory that is really used, until somebody ends us."""
    kept = os.urandom(4096) * (megabytes * 256)
    while kept:
        time.sleep(1)


def burn(seconds):
    while time.process_time() < seconds:
        pass


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["warm", "fork", "fresh"])
def test_a_task_over_its_memory_ends_as_resources_with_what_it_used(queue, pilot, isolation):
    task = run(queue, call(hold, 150, memory=100, isolation=isolation))
    assert task.outcome == "resources"
    assert "MB of memory and had asked for 100 MB" in task.message
    assert 100 < task.resources_measured["memory"] < 250  # it may be seen while it grows
    assert task.attempts == 1
    assert run(queue, call(os.getpid)).outcome == "success"


def test_memory_of_a_tasks_children_counts(queue, pilot):
    hog = "import os,time; x = os.urandom(4096) * 30000; time.sleep(600)"
    task = run(queue, hpcq.Task(f"{sys.executable} -c '{hog}' & wait", memory=100))
    assert task.outcome == "resources"
    assert task.resources_measured["memory"] > 100


def test_pages_shared_by_a_tasks_children_count_once(queue, pilot):
    def share(megabytes, go_on):
        kept = bytearray(os.urandom(4096) * (megabytes * 256))
        children = []
        for _ in range(3):
            children.append(os.fork())
            if not children[-1]:
                while not Path(go_on).exists():
                    time.sleep(0.01)
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)
        return len(kept)

    number = queue.submit(call(share, 60, "/proc/self/nothing", memory=180, walltime=2.0))
    task = queue.wait_for_id(number, DEADLINE)
    assert task.outcome == "walltime", task.message  # 4 x 60 MB by name, 60 MB by fact
    assert 60 <= task.resources_measured["memory"] < 180


def test_a_task_over_its_disk_ends_as_resources_with_what_it_used(queue, pilot):
    task = run(queue, hpcq.Task("head -c 50000000 /dev/zero > big; sleep 600", disk=20))
    assert task.outcome == "resources"
    assert "of disk and had asked for 20 MB; ask for more with disk=" in task.message
    assert 20 < task.resources_measured["disk"] <= 60


def test_output_counts_as_disk(queue, pilot):
    task = run(queue, hpcq.Task("head -c 50000000 /dev/zero; sleep 600", disk=20))
    assert task.outcome == "resources"


def test_what_an_earlier_task_left_behind_is_not_held_against_the_next(queue, pilot):
    def leave(megabytes):
        builtins.hpcq_left = bytearray(os.urandom(4096) * (megabytes * 256))
        return os.getpid()

    def use(megabytes):
        kept = bytearray(b"x") * (megabytes << 20)  # no more of it at any time
        time.sleep(1.2)  # so long that it is certainly looked at
        return os.getpid(), len(kept)

    first = run(queue, call(leave, 60, memory=150))
    second = run(queue, call(use, 80, memory=150))
    assert second.outcome == "success", second.message
    assert second.output[0] == first.output


# --- measures ------------------------------------------------------------------------------------------------------


def test_a_short_task_is_measured_too(queue, pilot):
    def use():
        Path("file").write_bytes(b"x" * (5 << 20))
        return len(bytearray(os.urandom(4096) * (70 * 256)))

    for isolation in ("warm", "fork", "fresh"):
        used = run(queue, call(use, isolation=isolation)).resources_measured
        assert used["memory"] >= 70
        assert 5 <= used["disk"] < 6
        assert used["cpu"] > 0
        assert used["wall"] > 0
        small = run(queue, call(os.getpid, isolation=isolation)).resources_measured
        assert small["memory"] < 70
        assert small["disk"] == 0


def test_cpu_seconds_include_those_of_children(queue, pilot):
    code = "import time\nwhile time.process_time() < 0.3: pass"
    task = run(queue, call(subprocess.check_call, [sys.executable, "-c", code]))
    assert 0.3 <= task.resources_measured["cpu"] < 3
    assert run(queue, hpcq.Task(f"{sys.executable} -c '{code}'")).resources_measured["cpu"] >= 0.3
    assert run(queue, call(burn, 0.3, isolation="fresh")).resources_measured["cpu"] >= 0.25


def test_a_killed_task_is_measured_up_to_then(queue, pilot):
    task = run(queue, call(burn, 600.0, isolation="fork", walltime=1.5))
    assert task.outcome == "walltime"
    assert task.resources_measured["cpu"] > 0
    assert task.resources_measured["wall"] >= 1.5


def test_a_task_that_never_ran_has_no_measures(queue):
    number = queue.submit(call(os.getpid))
    queue.cancel(id=number)
    task = queue.wait_for_id(number, DEADLINE)
    assert task.outcome == "cancelled"
    assert task.resources_measured == {}


# --- CPUs, GPUs, threads -------------------------------------------------------------------------------------------


def together(tmp_path, count, see):
    """A function that waits until ``count`` tasks run at once, then returns what it sees."""

    def meet(number):
        (tmp_path / str(number)).touch()
        while len(list(tmp_path.iterdir())) < count:
            time.sleep(0.01)
        return see()

    return meet


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs")
def test_each_task_has_cpus_of_its_own(queue, start_pilot, tmp_path):
    cpus = sorted(os.sched_getaffinity(0))
    start_pilot(queue, cores=len(cpus))
    ready(queue, 1)
    meet = together(tmp_path, 2, lambda: os.sched_getaffinity(0))
    for number, isolation in enumerate(("warm", "fork")):
        queue.submit(call(meet, number, isolation=isolation))
    first, second = wait(queue).output, wait(queue).output
    assert len(first) == len(second) == 1
    assert not first & second
    both = call(lambda: os.sched_getaffinity(0), cores=len(cpus))
    assert run(queue, both).output == set(cpus)


def test_without_a_cpu_for_each_core_nothing_is_pinned_and_that_is_said_once(queue, start_pilot):
    mine = os.sched_getaffinity(0)
    pilot = start_pilot(queue, cores=len(mine) + 1)
    ready(queue, 1)
    assert run(queue, call(os.sched_getaffinity, 0)).output == mine
    eventually(lambda: pilot.said().count("not pinned") == 1, "it says so")


def test_tasks_at_once_have_different_gpus_and_others_none(queue, start_pilot, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
    start_pilot(queue, "--gpus", "2", cores=3)
    ready(queue, 1)
    meet = together(tmp_path, 2, lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    for number in range(2):
        queue.submit(call(meet, number, gpus=1))
    assert {wait(queue).output, wait(queue).output} == {"4", "7"}
    assert run(queue, hpcq.Task("echo $CUDA_VISIBLE_DEVICES", gpus=2)).output == "4,7\n"
    assert run(queue, hpcq.Task("echo $CUDA_VISIBLE_DEVICES")).output == "\n"


def test_libraries_are_told_how_many_threads_they_may_start(queue, start_pilot, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    start_pilot(queue, cores=2)
    ready(queue, 1)
    script = "echo $OMP_NUM_THREADS $MKL_NUM_THREADS"
    assert run(queue, hpcq.Task(script, cores=2)).output == "2 7\n"
    assert run(queue, hpcq.Task(script, env={"OMP_NUM_THREADS": "5"})).output == "5 7\n"
