"""What decides which runner a task may have, and who gets which CPUs and GPUs; each rule by its own example."""

import pytest

from hpcq.messages import TaskResult, TaskSpec
from hpcq.pilot.choice import IDLE_LANES
from hpcq.pilot.core import Core
from hpcq.pilot.host import divide, own_cpus, own_gpus, task_environment
from hpcq.pilot.lanes import Give, Kill, Pin, Report, Start
from hpcq.pilot.usage import Used

NOTHING = (b"", b"")


def task(number, isolation="warm", *, function=b"f", **needs):
    return TaskSpec(number, function, b"", isolation=isolation, **needs)


def of(kind, commands):
    return [command for command in commands if isinstance(command, kind)]


def given(commands):
    return [(command.lane, command.task.id) for command in of(Give, commands)]


def end(core, lane, number, now=0.0):
    return core.ended(lane, [TaskResult(number, "success", seconds=1e-5)], now)


def ran(core, *tasks):
    """Each task began in a runner of its own or an idle one, and ended; the lanes they had."""
    lanes = []
    for one in tasks:
        ((lane, _),) = given(core.run([one], 0.0))
        core.warm(lane, 0.0)
        end(core, lane, one.id)
        lanes.append(lane)
    return lanes


# --- kinds ---------------------------------------------------------------------------------------------------------


def test_every_isolation_has_runners_of_its_own():
    core = Core(8, 100)
    commands = core.run([task(1), task(2, "fork"), task(3, "fresh"), task(4, function=b"")], 0.0)
    starts = [start.kind.isolation for start in of(Start, commands)]
    assert starts == ["warm", "fork", "fresh", "fresh", "shell"]  # one fresh runner is started ahead


def test_a_warm_runner_serves_tasks_of_equal_needs_only():
    core = Core(8, 100)
    assert ran(core, task(1), task(2), task(3, cores=2), task(4, memory=50), task(5, memory=50)) == [1, 1, 2, 3, 3]
    assert ran(core, task(6, "fork", memory=1), task(7, "fork", memory=2)) == [4, 4]  # nothing is left behind in these


def test_tasks_of_another_disk_claim_are_not_given_ahead():
    core = Core(1, 0, disk=10)
    ran(core, task(1))
    assert given(core.run([task(2), task(3), task(4, disk=5)], 0.0)) == [(1, 2), (1, 3)]


def test_fork_tasks_are_given_ahead():
    core = Core(1, 0)
    ran(core, task(1, "fork"))
    assert given(core.run([task(2, "fork"), task(3, "fork")], 0.0)) == [(1, 2), (1, 3)]


# --- fresh ---------------------------------------------------------------------------------------------------------


def test_a_fresh_runner_takes_one_task_and_the_next_is_ready():
    core = Core(1, 0)
    commands = core.run([task(1, "fresh"), task(2, "fresh")], 0.0)
    assert given(commands) == [(1, 1)]
    assert [start.lane for start in of(Start, commands)] == [1, 2]
    core.warm(1, 0.0)
    core.warm(2, 0.0)
    commands = end(core, 1, 1)
    assert given(commands) == [(2, 2)]
    assert [start.lane for start in of(Start, commands)] == [3]
    assert core.dead(1, 0, NOTHING, 0.0) == []


# --- disk and GPUs -------------------------------------------------------------------------------------------------


def test_disk_is_claimed():
    core = Core(4, 0, disk=100)
    assert len(given(core.run([task(1, disk=60), task(2, disk=60)], 0.0))) == 1
    core.warm(1, 0.0)
    assert len(given(end(core, 1, 1))) == 1


def test_gpus_are_whole_devices_and_each_has_one_user():
    core = Core(4, 0, gpus=("x", "y", "z"))
    commands = core.run([task(1, gpus=2), task(2, gpus=1), task(3, gpus=1)], 0.0)
    assert [start.gpus for start in of(Start, commands)] == [("x", "y"), ("z",)]
    core.warm(1, 0.0)
    commands = end(core, 1, 1)
    assert of(Kill, commands) == [Kill(1)], "an idle interpreter may hold memory of the device"
    assert [start.gpus for start in of(Start, commands)] == [("x",)]


def test_a_lane_with_gpus_is_used_again_with_the_same_ones():
    core = Core(4, 0, gpus=("x", "y"))
    assert ran(core, task(1, gpus=1), task(2, gpus=1)) == [1, 1]


def test_a_device_that_no_idle_runner_holds_is_preferred():
    core = Core(4, 0, gpus=("x", "y"))
    ran(core, task(1, gpus=1))
    assert of(Start, core.run([task(2, "fork", gpus=1)], 0.0))[0].gpus == ("y",)


# --- CPUs ----------------------------------------------------------------------------------------------------------


def test_lanes_at_work_have_cpus_of_their_own_and_keep_them_when_they_can():
    core = Core(3, 0, cpus=((0,), (1,), (2,)))
    commands = core.run([task(1), task(2, cores=2)], 0.0)
    assert of(Pin, commands) == [Pin(1, (0,)), Pin(2, (1, 2))]
    core.warm(1, 0.0)
    assert of(Pin, [*end(core, 1, 1), *core.run([task(3)], 0.0)]) == []


def test_a_lane_whose_cpus_were_taken_gets_others():
    core = Core(2, 0, cpus=((0,), (1,)))
    ran(core, task(1))
    assert of(Pin, core.run([task(2, "fork")], 0.0)) == [Pin(2, (0,))]
    assert of(Pin, core.run([task(3)], 0.0)) == [Pin(1, (1,))]


# --- idle lanes, over-use ------------------------------------------------------------------------------------------


def test_idle_interpreters_are_ended_when_there_are_too_many():
    core = Core(1, 100)
    count = 1 + IDLE_LANES
    for number in range(1, count + 1):
        commands = core.run([task(number, memory=number)], float(number))
        assert not of(Kill, commands)
        core.warm(number, float(number))
        end(core, number, number, float(number))
    assert of(Kill, core.run([task(99, memory=99)], 99.0)) == [Kill(1)]
    assert core.dead(1, -9, NOTHING, 99.0) == []


def test_over_use_ends_the_task_with_what_was_measured():
    core = Core(1, 100)
    core.run([task(1, memory=10)], 0.0)
    core.warm(1, 0.0)
    assert Kill(1) in core.exceeded(1, 1, "it used 20 MB", 1.0)
    core.recalled(1, set(), 1.0)
    commands = core.dead(1, -9, NOTHING, 1.0, used=Used(20.0, 1.0, 0.5))
    (found,) = [r for report in of(Report, commands) for r in report.results]
    assert (found.outcome, found.message) == ("resources", "it used 20 MB")
    assert (found.memory, found.disk, found.cpu) == (20.0, 1.0, 0.5)


def test_over_use_of_a_task_that_has_ended_is_forgotten():
    core = Core(1, 100)
    ran(core, task(1))
    assert core.exceeded(1, 1, "it used 20 MB", 1.0) == []
    assert core.exceeded(77, 1, "it used 20 MB", 1.0) == []


# --- the host ------------------------------------------------------------------------------------------------------


def test_cpus_are_ours_when_they_come_out_even():
    assert divide(2, [4, 5], [(4,), (5,)]) == ((4,), (5,))
    assert divide(2, [0, 1, 4, 5], [(0, 4), (1, 5)]) == ((0, 4), (1, 5))
    assert divide(2, [0, 1, 2, 3], [(0,), (1,), (2,), (3,)]) == ()
    assert divide(4, [0, 1], [(0,), (1,)]) == ()
    assert own_cpus(1, "local") == ()


def test_gpus_are_those_of_the_job():
    assert own_gpus(None, {}) == ()
    assert own_gpus(2, {}) == ("0", "1")
    assert own_gpus(None, {"CUDA_VISIBLE_DEVICES": "3,GPU-ab", "SLURM_JOB_GPUS": "0"}) == ("3", "GPU-ab")
    assert own_gpus(None, {"SLURM_JOB_GPUS": "2,3"}) == ("2", "3")
    assert own_gpus(None, {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert own_gpus(1, {"CUDA_VISIBLE_DEVICES": "5,6"}) == ("5",)
    with pytest.raises(ValueError, match="2 GPUs were asked for, but the job has 1"):
        own_gpus(2, {"CUDA_VISIBLE_DEVICES": "5"})


def test_libraries_get_as_many_threads_as_cores_unless_the_user_said():
    environment = task_environment(4, (), False, {"OMP_NUM_THREADS": "1", "HOME": "/h"})
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"], environment["HOME"]) == ("1", "4", "/h")
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert task_environment(1, ("2",), True, {})["CUDA_VISIBLE_DEVICES"] == "2"
    assert task_environment(1, (), True, {})["CUDA_VISIBLE_DEVICES"] == "", "none was asked for"
