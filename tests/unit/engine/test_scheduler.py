"""The scheduler's rules, each by its own example. What must hold for any order of events is in test_scheduler_model."""

import pytest

from hpcq.outcome import Outcome
from hpcq.scheduler import (
    TRANSITIONS,
    AskBack,
    Assign,
    Cancelled,
    Ended,
    EndedTask,
    Finish,
    IllegalTransitionError,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    Returned,
    Scheduler,
    Started,
    Stop,
    Submitted,
    TaskState,
    Tick,
)
from hpcq.scheduler.categories import Category
from hpcq.scheduler.invariants import check
from hpcq.scheduler.needs import Needs
from hpcq.scheduler.placement import UNUSED_KEPT
from hpcq.scheduler.records import Demand, Record


@pytest.fixture
def scheduler():
    """A scheduler whose invariants are checked at the end of the test."""
    scheduler = Scheduler()
    yield scheduler
    check(scheduler)


def submit(scheduler, *tasks, now=0.0):
    return scheduler.handle([Submitted(list(tasks))], now)


def ready(scheduler, pilot="p", cores=1, memory=1000, *, wan=True, now=0.0):
    return scheduler.handle([PilotReady(pilot, cores, memory, wan)], now)


def end(scheduler, *numbers, pilot="p", outcome="success", seconds=0.0, now=0.0):
    return scheduler.handle([Ended(pilot, [EndedTask(number, outcome, seconds) for number in numbers])], now)


def start(scheduler, *numbers, pilot="p", now=0.0):
    return scheduler.handle([Started(pilot, list(numbers))], now)


def done(number, outcome=Outcome.SUCCESS, attempts=1, pilot="p"):
    return Finish(number, outcome, attempts, True, pilot=pilot)


def assigned(commands):
    return {command.pilot: command.tasks for command in commands if isinstance(command, Assign)}


def finished(commands):
    return {command.task: command.outcome for command in commands if isinstance(command, Finish)}


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", TRANSITIONS)
@pytest.mark.parametrize("before", TaskState)
@pytest.mark.parametrize("after", TaskState)
def test_only_transitions_of_the_table_are_possible(trigger, before, after):
    record = Record(1, 0, 3, Demand(Needs(1)), Category(), 0.0)
    record.state = before
    if after in TRANSITIONS[trigger].get(before, ()):
        record.move(trigger, after, 1.0)
        assert record.state is after
    else:
        with pytest.raises(IllegalTransitionError, match=f"task 1: '{trigger}'.*{before.name} to {after.name}"):
            record.move(trigger, after, 1.0)
        assert record.state is before


def test_nothing_leads_out_of_done():
    assert not any(TaskState.DONE in states for states in TRANSITIONS.values())


# --- placement -------------------------------------------------------------------------------------------------------


def test_a_task_waits_for_a_pilot_and_goes_to_it(scheduler):
    assert submit(scheduler, NewTask(1)) == []
    assert ready(scheduler) == [Assign("p", [1])]
    assert end(scheduler, 1) == [done(1)]


def test_no_pilot_gets_more_cores_or_memory_claimed_than_it_has(scheduler):
    ready(scheduler, cores=4, memory=100)
    submit(scheduler, NewTask(1, cores=3, memory=10), NewTask(2, cores=3, memory=10), NewTask(3, cores=1, memory=95))
    check(scheduler)
    pilot = scheduler.pilots["p"]
    assert (pilot.free_cores, pilot.free_memory) == (1, 90)


@pytest.mark.parametrize(
    "task", [NewTask(1, cores=5), NewTask(1, memory=101), NewTask(1, network="wan")], ids=["cores", "memory", "wan"]
)
def test_a_task_that_fits_no_pilot_waits_and_does_not_hold_up_others(scheduler, task):
    ready(scheduler, cores=4, memory=100, wan=False)
    assert submit(scheduler, task) == []
    assert assigned(submit(scheduler, NewTask(2))) == {"p": [2]}
    assert assigned(ready(scheduler, "big", cores=5, memory=101)) == {"big": [1]}


def test_larger_priority_first_then_first_come_first_served(scheduler):
    submit(scheduler, *(NewTask(n, priority=p) for n, p in enumerate([0, 5, 0, 5, -1], 1)))
    order = []
    commands = ready(scheduler)
    while running := [n for tasks in assigned(commands).values() for n in tasks]:
        order += running
        commands = end(scheduler, *running, seconds=60.0)
    assert order == [2, 4, 1, 3, 5]


def test_priority_holds_between_tasks_of_different_needs(scheduler):
    submit(scheduler, NewTask(1, cores=1), NewTask(2, cores=2, priority=1))
    assert next(iter(ready(scheduler, cores=2).pop(0).tasks)) == 2


def test_pilots_take_turns(scheduler):
    ready(scheduler, "a", cores=2)
    ready(scheduler, "b", cores=2)
    commands = submit(scheduler, *(NewTask(n) for n in range(1, 5)))
    assert {pilot: len(tasks) for pilot, tasks in assigned(commands).items()} == {"a": 2, "b": 2}


def test_free_places_are_filled_before_anything_is_sent_ahead(scheduler):
    submit(scheduler, *(NewTask(n) for n in range(1, 4)))
    ready(scheduler, "a", cores=1)
    assert assigned(ready(scheduler, "b", cores=2))["b"]
    assert scheduler.pilots["b"].claimed


@pytest.mark.parametrize(("seconds", "held"), [(100.0, 1), (0.001, 40)])
def test_short_tasks_are_sent_ahead_and_long_ones_are_not(scheduler, seconds, held):
    ready(scheduler)
    submit(scheduler, NewTask(1))
    end(scheduler, 1, seconds=seconds)
    submit(scheduler, *(NewTask(n) for n in range(2, 42)))
    assert len(scheduler.pilots["p"].held()) == held


# --- pilots that go --------------------------------------------------------------------------------------------------


def test_a_task_started_retries_plus_one_times_on_dying_pilots_ends_lost(scheduler):
    submit(scheduler, NewTask(1, retries=2))
    for attempt in range(3):
        assert assigned(ready(scheduler, f"p{attempt}")) == {f"p{attempt}": [1]}
        start(scheduler, 1, pilot=f"p{attempt}")
        commands = scheduler.handle([PilotGone(f"p{attempt}", "node failure")], 0.0)
    assert commands == [Finish(1, Outcome.LOST, 3, False, "its pilot p2 went away: node failure (attempt 3)")]


def test_a_task_that_had_not_begun_costs_no_retry(scheduler):
    submit(scheduler, NewTask(1, retries=0))
    for attempt in range(20):
        ready(scheduler, f"p{attempt}")
        assert scheduler.handle([PilotGone(f"p{attempt}")], 0.0) == []
    ready(scheduler)
    assert end(scheduler, 1) == [done(1)]


def test_a_task_announced_and_given_back_costs_no_retry(scheduler):
    submit(scheduler, NewTask(1, retries=0))
    ready(scheduler)
    for _ in range(5):
        start(scheduler, 1)
        assert assigned(scheduler.handle([Returned("p", [1])], 0.0)) == {"p": [1]}
    start(scheduler, 1)
    assert finished(scheduler.handle([PilotGone("p")], 0.0)) == {1: Outcome.LOST}


def test_a_task_that_may_have_begun_is_announced_and_counts_as_begun_once(scheduler):
    submit(scheduler, NewTask(1, retries=1))
    assert ready(scheduler, "p1") == [Assign("p1", [1])]
    assert scheduler.handle([PilotGone("p1")], 0.0) == []  # it ran, or it did not
    assert ready(scheduler, "p2") == [Assign("p2", [1], announced=[1])]
    start(scheduler, 1, pilot="p2")
    assert scheduler.handle([PilotGone("p2", "node failure")], 0.0) == [
        Finish(1, Outcome.LOST, 2, False, "its pilot p2 went away: node failure (attempt 2)")
    ]


def test_doubts_count_once_and_cost_a_task_that_succeeds_later_nothing(scheduler):
    submit(scheduler, NewTask(1, retries=1))
    for number in range(5):
        ready(scheduler, f"p{number}")
        scheduler.handle([PilotGone(f"p{number}")], 0.0)
    ready(scheduler, "last")
    assert end(scheduler, 1, pilot="last") == [done(1, attempts=2, pilot="last")]


def test_what_waited_on_a_pilot_behind_another_task_is_not_in_doubt(scheduler):
    ready(scheduler)
    submit(scheduler, NewTask(1), NewTask(2))
    scheduler.handle([PilotGone("p")], 0.0)
    assert ready(scheduler, "q", cores=2) == [Assign("q", [1, 2], announced=[1])]


def test_a_task_the_pilot_reports_lost_runs_again_up_to_its_retries(scheduler):
    submit(scheduler, NewTask(1, retries=1))
    ready(scheduler)
    start(scheduler, 1)
    assert assigned(end(scheduler, 1, outcome="lost")) == {"p": [1]}
    start(scheduler, 1)
    assert end(scheduler, 1, outcome="lost") == [done(1, Outcome.LOST, attempts=2)]


@pytest.mark.parametrize("outcome", ["exception", "exit_code", "walltime", "crash", "unserializable"])
def test_other_outcomes_are_not_retried(scheduler, outcome):
    submit(scheduler, NewTask(1))
    ready(scheduler)
    assert end(scheduler, 1, outcome=outcome) == [done(1, Outcome(outcome))]


def test_what_a_dead_pilot_held_comes_before_what_was_submitted_later(scheduler):
    ready(scheduler)
    submit(scheduler, NewTask(1), NewTask(2), NewTask(3))
    scheduler.handle([PilotGone("p")], 0.0)
    assert assigned(ready(scheduler, "q", cores=3)) == {"q": [1, 2, 3]}


def test_a_draining_pilot_gets_nothing_new(scheduler):
    ready(scheduler, cores=2)
    submit(scheduler, NewTask(1))
    scheduler.handle([PilotDraining("p")], 0.0)
    assert submit(scheduler, NewTask(2)) == []
    assert assigned(end(scheduler, 1)) == {}
    assert assigned(ready(scheduler, "q")) == {"q": [2]}


def test_what_a_draining_pilot_gives_back_goes_elsewhere(scheduler):
    ready(scheduler, "a")
    submit(scheduler, NewTask(1), NewTask(2))
    ready(scheduler, "b")
    commands = scheduler.handle([PilotDraining("a"), Returned("a", [2])], 0.0)
    assert assigned(commands) == {"b": [2]}


def test_a_pilot_ready_twice_is_a_bug_of_the_caller(scheduler):
    ready(scheduler)
    with pytest.raises(IllegalTransitionError, match="pilot p is ready twice"):
        ready(scheduler)


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_before_placement_is_immediate(scheduler):
    submit(scheduler, NewTask(1))
    commands = scheduler.handle([Cancelled([1])], 0.0)
    assert commands == [Finish(1, Outcome.CANCELLED, 0, False, "cancelled before it began")]
    assert ready(scheduler) == []


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(
    "answer", [Ended("p", [EndedTask(1, "cancelled")]), Ended("p", [EndedTask(1, "success")]), Returned("p", [1]),
               PilotGone("p"), Ended("p", [EndedTask(1, "lost")])]
)  # fmt: skip
def test_cancel_on_a_pilot_ends_cancelled_whatever_it_answers(scheduler, started, answer):
    ready(scheduler)
    submit(scheduler, NewTask(1))
    if started:
        start(scheduler, 1)
    assert scheduler.handle([Cancelled([1])], 0.0) == [Stop("p", [1])]
    assert scheduler.handle([Cancelled([1])], 0.0) == []  # again: nothing more to do
    assert finished(scheduler.handle([answer], 0.0)) == {1: Outcome.CANCELLED}


def test_cancel_of_unknown_and_finished_tasks_is_ignored(scheduler):
    ready(scheduler)
    submit(scheduler, NewTask(1))
    end(scheduler, 1)
    assert scheduler.handle([Cancelled([1, 99])], 0.0) == []


# --- asking back -----------------------------------------------------------------------------------------------------


def stuck(scheduler):
    """Pilot a runs 1 and holds 2 in advance; b comes and is idle."""
    ready(scheduler, "a")
    submit(scheduler, NewTask(1), NewTask(2))
    assert list(scheduler.pilots["a"].backlog) == [2]
    ready(scheduler, "b")


def test_what_is_stuck_behind_a_long_task_is_asked_back_for_an_idle_pilot(scheduler):
    stuck(scheduler)
    assert scheduler.handle([Tick()], 0.01) == []
    assert scheduler.handle([Tick()], 1.0) == [AskBack("a", [2])]
    assert scheduler.handle([Tick()], 2.0) == []  # not asked twice
    assert assigned(scheduler.handle([Returned("a", [2])], 2.0)) == {"b": [2]}


def test_a_pilot_that_had_nothing_to_give_back_can_be_asked_again(scheduler):
    stuck(scheduler)
    scheduler.handle([Tick()], 1.0)
    scheduler.handle([Returned("a", [])], 1.1)
    assert scheduler.handle([Tick()], 2.0) == [AskBack("a", [2])]


def test_nothing_is_asked_back_when_nobody_is_idle(scheduler):
    ready(scheduler, "a")
    submit(scheduler, NewTask(1), NewTask(2))
    assert not scheduler.wants_tick
    assert scheduler.handle([Tick()], 9.0) == []


# --- words of pilots that are wrong or late --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", [Started("nobody", [1]), Ended("nobody", [EndedTask(1, "success")]), Returned("nobody", [1]),
              PilotGone("nobody"), PilotDraining("nobody")]
)  # fmt: skip
@pytest.mark.parametrize("placed", [False, True])
def test_a_pilot_that_is_not_ready_changes_nothing(scheduler, event, placed):
    submit(scheduler, NewTask(1))
    if placed:
        ready(scheduler)
    assert scheduler.handle([event], 0.0) == []
    assert 1 in scheduler.tasks


@pytest.mark.parametrize("event", [Started("b", [1]), Ended("b", [EndedTask(1, "success")]), Returned("b", [1])])
def test_a_pilot_cannot_speak_for_a_task_of_another(scheduler, event):
    ready(scheduler, "a")
    submit(scheduler, NewTask(1))
    ready(scheduler, "b")
    assert scheduler.handle([event], 0.0) == []
    assert end(scheduler, 1, pilot="a") == [done(1, pilot="a")]


def test_nothing_is_kept_of_finished_tasks(scheduler):
    ready(scheduler, cores=8)
    for number in range(1, 100):
        submit(scheduler, NewTask(number, cores=1 + number % 3, memory=number % 5))
        end(scheduler, number)
    assert not scheduler.tasks
    assert len(scheduler.placement.demands) == len(scheduler.placement._unused) <= UNUSED_KEPT
    assert scheduler.finished == {"success": 99}
