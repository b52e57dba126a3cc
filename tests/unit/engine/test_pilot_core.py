"""The pilot's core, each rule by its own example; what holds for any order of events is in test_pilot_core_model."""

import signal

import pytest

from hpcq.messages import TaskResult, TaskSpec
from hpcq.pilot.choice import AHEAD, START_TIMEOUT, STUCK
from hpcq.pilot.core import Core
from hpcq.pilot.deaths import START_FAILURES, how_it_died
from hpcq.pilot.doom import STRIKE_AGAIN, STRIKES
from hpcq.pilot.lanes import Broken, End, Give, Kill, Kind, Recall, Report, Start

NOTHING = (b"", b"")


def task(number, *, cores=1, memory=0, walltime=0.0, network="any", function=b"f"):
    return TaskSpec(number, function, b"", cores, memory, walltime, network)


def result(number, seconds=0.0):
    return TaskResult(number, "success", seconds=seconds)


def given(commands):
    return [(command.lane, command.task.id) for command in commands if isinstance(command, Give)]


def results(commands):
    return {r.id: r.outcome for c in commands if isinstance(c, Report) for r in c.results}


def returned(commands):
    return [number for c in commands if isinstance(c, Report) for number in c.returned]


def started(commands):
    return [number for c in commands if isinstance(c, Report) for number in c.started]


def kinds(commands):
    return [type(command) for command in commands]


@pytest.fixture
def core():
    """One core, whose claims are checked at the end."""
    core = Core(1, 100)
    yield core
    check(core)


def check(core):
    heads = [lane.tasks[0] for lane in core.lanes.values() if lane.tasks]
    assert core.free.cores == core.cores - sum(head.cores for head in heads) >= 0
    assert core.free.memory == core.memory - sum(head.memory for head in heads) >= 0


def warmed(core, *, learned=None):
    """A warm lane, 1, with nothing in it; ``learned`` seconds are known of the function."""
    core.run([task(1000)], 0.0)
    core.warm(1, 0.0)
    core.ended(1, [result(1000, 1.0 if learned is None else learned)], 0.0)
    return core


def ahead(core, count=3):
    """Lane 1 has tasks 1…count, of which the first is at its runner's head."""
    warmed(core, learned=1e-5)
    commands = core.run([task(n) for n in range(1, count + 1)], 0.0)
    assert given(commands) == [(1, n) for n in range(1, count + 1)]
    return core


def test_a_task_is_announced_before_its_runner_gets_it(core):
    assert kinds(core.run([task(1)], 0.0)) == [Report, Start, Give]


def test_a_result_frees_the_lane_for_the_next_task(core):
    commands = core.run([task(1), task(2)], 0.0)
    assert given(commands) == [(1, 1)]
    core.warm(1, 0.0)
    commands = core.ended(1, [result(1)], 1.0)
    assert results(commands) == {1: "success"}
    assert given(commands) == [(1, 2)]


def test_tasks_run_side_by_side_only_as_far_as_cores_and_memory_go():
    core = Core(4, 100)
    assert len(given(core.run([task(1, cores=3), task(2, cores=2)], 0.0))) == 1
    check(core)
    core = Core(4, 100)
    assert len(given(core.run([task(1, memory=60), task(2, memory=60)], 0.0))) == 1
    check(core)


def test_host_tasks_get_a_runner_outside_the_tunnel():
    core = Core(4, 0)
    commands = core.run([task(1), task(2, network="host"), task(3, network="wan")], 0.0)
    assert [(c.lane, c.kind.network) for c in commands if isinstance(c, Start)] == [(1, "any"), (2, "host"), (3, "any")]


# --- ahead and back --------------------------------------------------------------------------------------------------


def test_short_tasks_are_given_ahead_and_long_ones_are_not(core):
    ahead(core)
    assert core.free.cores == 0


def test_tasks_of_unknown_or_long_duration_are_not_given_ahead(core):
    warmed(core, learned=AHEAD * 2)
    assert given(core.run([task(1), task(2)], 0.0)) == [(1, 1)]
    assert given(core.run([task(3, function=b"g")], 0.0)) == []


def test_only_the_head_counts_as_begun(core):
    commands = warmed(core, learned=1e-5).run([task(1), task(2)], 0.0)
    assert started(commands) == [1]
    assert started(core.ended(1, [result(1)], 0.1)) == [2]


def test_a_head_that_takes_longer_gives_up_what_waits_behind_it(core):
    ahead(core)
    assert core.next_deadline() == STUCK
    assert core.time(STUCK) == [Recall(1)]
    assert given(core.recalled(1, {2, 3}, STUCK)) == []  # not behind the same slow task again
    assert core.next_deadline() is None
    assert returned(core.retract([2, 3], STUCK)) == [2, 3]


def test_a_stuck_lane_gets_nothing_more_until_its_head_ends(core):
    ahead(core)
    core.time(STUCK)
    core.recalled(1, {2, 3}, STUCK)
    assert given(core.run([task(4)], 1.0)) == []
    assert given(core.ended(1, [result(1, 1e-5)], 2.0)) == [(1, 2), (1, 3), (1, 4)]


def test_a_recall_that_comes_too_late_changes_nothing(core):
    ahead(core)
    core.time(STUCK)
    core.ended(1, [result(1), result(2), result(3)], STUCK)
    assert core.recalled(1, set(), STUCK) == []
    assert not core.busy


def test_asking_back_is_always_answered(core):
    ahead(core)
    commands = core.retract([1, 2, 99], 0.0)
    assert any(isinstance(c, Report) and c.answers for c in commands)
    assert returned(commands) == []


# --- deaths ----------------------------------------------------------------------------------------------------------


def test_a_dead_runner_is_blamed_on_the_task_it_was_doing_and_the_rest_runs_elsewhere(core):
    ahead(core)
    commands = core.dead(1, -signal.SIGSEGV, (b"out", b"err"), 1.0)
    (report,) = [c for c in commands if isinstance(c, Report) and c.results]
    (crash,) = report.results
    assert (crash.id, crash.outcome, crash.std_output, crash.std_error) == (1, "crash", b"out", b"err")
    assert "SIGSEGV" in crash.message
    assert given(commands) == [(2, 2)]


def test_a_task_the_dead_runner_had_not_read_is_not_blamed(core):
    ahead(core)
    commands = core.dead(1, 3, NOTHING, 1.0, unread={1, 2, 3})
    assert results(commands) == {}
    assert given(commands)[0] == (2, 1)


def test_an_idle_runner_may_die(core):
    warmed(core)
    assert core.dead(1, -9, NOTHING, 1.0) == []
    assert kinds(core.run([task(1)], 1.0)) == [Report, Start, Give]


def test_a_runner_that_dies_before_it_is_ready_is_started_again(core):
    core.run([task(1)], 0.0)
    commands = core.dead(1, 1, NOTHING, 0.0)
    assert Start(2, Kind("any", "warm")) in commands
    assert given(commands) == [(2, 1)]


def test_runners_that_never_get_ready_are_given_up_with_the_last_line_they_wrote(core):
    core.run([task(1)], 0.0)
    for lane in range(1, START_FAILURES):
        assert given(core.dead(lane, 1, (b"", b"x"), 0.0)) == [(lane + 1, 1)]
    (broken,) = core.dead(START_FAILURES, 1, (b"", b"trace\nImportError: no hpcq\n"), 0.0)
    assert isinstance(broken, Broken)
    assert "exit status 1: ImportError: no hpcq" in broken.message
    assert returned(core.drain(0.0)) == [1]


def test_a_runner_that_got_ready_makes_earlier_failures_forgotten(core):
    core.run([task(1)], 0.0)
    for lane in range(1, 10):
        if lane % 2:
            core.warm(lane, 0.0)
        commands = core.dead(lane, 1, NOTHING, 0.0)
        assert not any(isinstance(command, Broken) for command in commands)
        if lane % 2:
            commands = core.run([task(lane + 1)], 0.0)


def test_a_runner_that_hangs_before_it_is_ready_is_killed_once(core):
    core.run([task(1)], 10.0)
    assert core.next_deadline() == 10.0 + START_TIMEOUT
    assert core.time(9.0 + START_TIMEOUT) == []
    assert core.time(10.0 + START_TIMEOUT) == [Kill(1)]
    assert core.next_deadline() is None
    assert core.time(11.0 + START_TIMEOUT) == []
    assert given(core.dead(1, -9, NOTHING, 200.0)) == [(2, 1)]


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (7, "exit status 7"), (-11, "SIGSEGV"), (-9, "memory"), (-99, "unknown")],
)
def test_deaths_in_words(status, words):
    assert words in how_it_died(status)


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_task_over_its_walltime_is_killed_and_told_so(core):
    warmed(core)
    core.run([task(1, walltime=5.0)], 10.0)
    assert core.next_deadline() == 15.0
    assert core.time(14.9) == []
    assert Kill(1) in core.time(15.0)
    assert core.next_deadline() is None
    core.recalled(1, set(), 15.0)
    assert results(core.dead(1, -9, NOTHING, 15.1)) == {1: "walltime"}


def test_the_start_of_the_runner_is_not_counted_as_the_tasks_time(core):
    core.run([task(1, walltime=5.0)], 0.0)
    assert core.next_deadline() == START_TIMEOUT
    assert core.time(99.0) == []
    core.warm(1, 100.0)
    assert core.next_deadline() == 105.0


def test_a_result_that_overtakes_the_kill_counts_and_the_task_behind_is_lost_or_goes_back(core):
    warmed(core, learned=1e-5)
    core.run([task(1, walltime=5.0), task(2), task(3)], 0.0)
    assert set(kinds(core.time(5.0))) == {Recall, Kill}
    core.recalled(1, {3}, 5.0)
    assert results(core.ended(1, [result(1)], 5.0)) == {1: "success"}
    commands = core.dead(1, -9, NOTHING, 5.0)
    assert results(commands) == {2: "lost"}
    assert given(commands) == [(2, 3)]


# --- tasks that are processes of their own ---------------------------------------------------------------------------


@pytest.fixture
def command(core):
    """Lane 1 has a command, task 1, which is over its walltime."""
    core.run([task(1, function=b"", walltime=5.0)], 0.0)
    core.warm(1, 0.0)
    assert kinds(core.time(5.0)) == [Recall]
    return core


def crashed(number, seconds=4.9):
    return TaskResult(number, "exit_code", b"x", 137, seconds=seconds, std_output=b"so far")


def test_a_command_is_ended_without_its_runner(command):
    assert command.recalled(1, set(), 5.0) == [End(1)]
    (report,) = command.ended(1, [crashed(1)], 5.1)
    (told,) = report.results
    assert (told.outcome, told.exit_code, told.payload, told.std_output) == ("walltime", None, b"", b"so far")
    assert told.seconds == pytest.approx(5.1)
    assert "walltime of 5 s" in told.message
    assert given(command.run([task(2, function=b"")], 5.1)) == []  # what ends the one may hit the other
    assert given(command.children_ended(1, 5.2)) == [(1, 2)]


def test_a_command_that_ends_well_before_it_is_ended_counts(command):
    command.recalled(1, set(), 5.0)
    assert results(command.ended(1, [result(1)], 5.0)) == {1: "success"}
    command.children_ended(1, 5.0)
    assert command.lanes[1].idle


def test_nothing_is_ended_when_the_result_is_there_first(command):
    assert results(command.ended(1, [crashed(1)], 5.0)) == {1: "exit_code"}
    assert command.recalled(1, set(), 5.0) == []
    assert command.lanes[1].idle


def test_a_task_behind_the_doomed_one_is_never_hit(core):
    warmed(core)
    core.run([task(900, function=b"")], 0.0)
    core.warm(2, 0.0)
    core.ended(2, [result(900, 1e-5)], 0.0)
    core.run([task(1, function=b"", walltime=5.0), task(2, function=b"")], 0.0)
    core.time(5.0)
    assert End(2) not in core.recalled(2, set(), 5.0)  # the second has begun: the first is done, and about to be told
    assert results(core.ended(2, [result(1)], 5.0)) == {1: "success"}
    assert core.lanes[2].doom is None
    assert results(core.ended(2, [result(2)], 5.0)) == {2: "success"}


def test_a_command_that_does_not_end_is_struck_again_and_at_last_with_its_runner(command):
    now = 5.0
    assert command.recalled(1, set(), now) == [End(1)]
    for _ in range(STRIKES - 1):
        assert command.next_deadline() is None
        assert command.children_ended(1, now) == []
        now += STRIKE_AGAIN
        assert command.next_deadline() == pytest.approx(now)
        assert command.time(now) == [End(1)]
    command.children_ended(1, now)
    assert command.time(now + STRIKE_AGAIN) == [Kill(1)]
    assert results(command.dead(1, -9, NOTHING, now)) == {1: "walltime"}


# --- cancel, drain, abandon ------------------------------------------------------------------------------------------


def test_cancel_of_a_waiting_task_gives_it_back(core):
    core.run([task(1), task(2)], 0.0)
    assert returned(core.cancel([2], 0.0)) == [2]


def test_cancel_of_a_task_given_ahead_takes_it_back_without_a_kill(core):
    ahead(core)
    assert core.cancel([3], 0.0) == [Recall(1)]
    commands = core.recalled(1, {2, 3}, 0.0)
    assert returned(commands) == [3]
    assert given(commands) == [(1, 2)]


def test_cancel_of_a_running_task_kills_its_runner(core):
    ahead(core)
    core.cancel([1], 0.0)
    assert Kill(1) in core.recalled(1, {2, 3}, 0.0)
    commands = core.dead(1, -9, NOTHING, 0.0)
    assert results(commands) == {1: "cancelled"}
    assert given(commands) == [(2, 2)]


def test_cancel_of_a_task_that_ends_meanwhile_reports_its_result(core):
    ahead(core, 1)
    core.cancel([1], 0.0)
    assert results(core.ended(1, [result(1)], 0.0)) == {1: "success"}
    assert core.recalled(1, set(), 0.0) == []


def test_draining_hands_back_what_has_not_begun_and_finishes_the_rest(core):
    ahead(core)
    core.run([task(n, function=b"other") for n in (7, 8)], 0.0)
    commands = core.drain(0.0)
    assert returned(commands) == [7, 8]
    assert returned(core.recalled(1, {2, 3}, 0.0)) == [2, 3]
    assert returned(core.run([task(9)], 0.0)) == [9]
    assert core.busy
    assert results(core.ended(1, [result(1)], 9.0)) == {1: "success"}
    assert not core.busy


def test_abandoning_reports_what_runs_as_lost(core):
    ahead(core)
    assert Kill(1) in core.abandon("its pilot ended", 0.0)
    core.recalled(1, {2, 3}, 0.0)
    commands = core.dead(1, -9, NOTHING, 0.0)
    assert results(commands) == {1: "lost"}
    assert not core.busy


def test_abandoning_a_runner_that_never_began_hands_its_task_back(core):
    core.run([task(1)], 0.0)
    core.abandon("its pilot ended", 0.0)
    assert returned(core.recalled(1, {1}, 0.0)) == [1]
    assert core.dead(1, -9, NOTHING, 0.0) == []
    assert not core.busy


def wan_task(number):
    return task(number, network="wan")


def test_a_broken_tunnel_ends_what_needs_it_and_hands_back_what_waits(core):
    core.run([wan_task(1), wan_task(2), task(3)], 0.0)
    core.warm(1, 0.0)
    commands = core.tunnel_down("openconnect ended", 1.0)
    assert returned(commands) == [2]
    assert Kill(1) in commands
    commands = core.dead(1, -9, NOTHING, 1.0)
    assert results(commands) == {1: "network"}
    assert given(commands) == [(2, 3)], "what needs no tunnel goes on"
    assert returned(core.run([wan_task(4)], 1.0)) == [4]


def test_what_needs_no_tunnel_survives_and_its_runner_retires_when_there_is_a_new_one(core):
    core.run([task(1)], 0.0)
    core.warm(1, 0.0)
    assert not core.tunnel_down("openconnect ended", 1.0)
    assert not core.tunnel_up(2.0)
    commands = core.ended(1, [result(1)], 3.0)
    assert results(commands) == {1: "success"}
    assert Kill(1) in commands
    assert given(core.run([wan_task(2)], 3.0)) == [(2, 2)]


def test_a_lost_namespace_takes_everything_in_it_along_but_not_the_host_s(core):
    core.run([task(1), task(2, network="host")], 0.0)
    core.warm(1, 0.0)
    core.tunnel_down("its holder was killed", 1.0, inside=False)
    commands = core.dead(1, -9, NOTHING, 1.0)
    assert results(commands) == {1: "network"}
    assert given(commands) == [(2, 2)]
    assert returned(core.run([task(3)], 1.0)) == [3]


@pytest.mark.parametrize("outcome", ["exception", "exit_code", "crash"])
def test_a_failure_while_the_tunnel_is_down_is_the_tunnel_s(core, outcome):
    core.run([wan_task(1)], 0.0)
    core.warm(1, 0.0)
    core.tunnel_down("openconnect ended", 1.0)
    assert results(core.ended(1, [TaskResult(1, outcome)], 1.0)) == {1: "network"}


def test_a_success_while_the_tunnel_is_down_is_one(core):
    core.run([wan_task(1)], 0.0)
    core.warm(1, 0.0)
    core.tunnel_down("openconnect ended", 1.0)
    assert results(core.ended(1, [result(1)], 1.0)) == {1: "success"}


# --- how long a lane needs nothing of us ---------------------------------------------------------------------------


def test_only_what_lies_behind_the_current_task_keeps_a_lane_busy(core):
    warmed(core, learned=AHEAD / 4)
    assert core.busy_for(1) == 0
    core.run([task(1)], 1.0)
    assert core.busy_for(1) == 0
    core.run([task(2), task(3)], 1.0)
    assert core.busy_for(1) == pytest.approx(AHEAD / 2)
    core.ended(1, [result(1, seconds=AHEAD / 4)], 1.0)
    assert core.busy_for(1) == pytest.approx(AHEAD / 4)


def test_a_lane_that_was_told_to_give_back_or_is_unknown_is_not_busy(core):
    warmed(core, learned=AHEAD / 4)
    core.run([task(1), task(2), task(3)], 1.0)
    core.time(1.0 + STUCK)
    assert core.busy_for(1) == 0
    assert core.busy_for(7) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_runner_that_the_end_of_the_job_kills_costs_its_task_nothing(core, number):
    core.run([task(1)], 0.0)
    core.warm(1, 0.0)
    assert core.may_be_the_jobs_end(1, -number)
    core.job_ends = "its job was ended"
    commands = core.dead(1, -number, NOTHING, 1.0)
    assert results(commands) == {1: "lost"}


def test_a_runner_that_crashes_while_its_job_ends_is_still_a_crash(core):
    core.run([task(1)], 0.0)
    core.warm(1, 0.0)
    assert not core.may_be_the_jobs_end(1, -signal.SIGSEGV)
    core.job_ends = "its job was ended"
    assert results(core.dead(1, -signal.SIGSEGV, NOTHING, 1.0)) == {1: "crash"}


@pytest.mark.parametrize(
    ("outcome", "exit_code", "told"),
    [
        ("exit_code", -15, "lost"),
        ("exit_code", 143, "lost"),
        ("exit_code", 3, "exit_code"),
        ("crash", None, "lost"),
        ("success", 0, "success"),
        ("network", 143, "network"),
    ],
)
def test_commands_and_forks_that_the_end_of_the_job_kills(core, outcome, exit_code, told):
    core.run([task(1)], 0.0)
    core.warm(1, 0.0)
    core.job_ends = "its job was ended"
    assert results(core.ended(1, [TaskResult(1, outcome, b"", exit_code)], 1.0)) == {1: told}


def test_a_task_that_needs_the_tunnel_and_fails_is_suspected_not_judged(core):
    core.run([wan_task(1), task(2)], 0.0)
    core.warm(1, 0.0)
    core.ended(1, [TaskResult(1, "exception")], 1.0)
    core.ended(1, [TaskResult(2, "exception")], 1.0)
    assert core.suspects == {1}
