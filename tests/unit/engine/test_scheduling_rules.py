"""Needs, categories, copies, blocked hosts and explanations: each rule by its own example."""

import pytest
from scheduling import allotted, assigned, end, finished, ready, start, submit

from hpcq.benchmark_scheduler import Simulation
from hpcq.outcome import Outcome
from hpcq.scheduler import (
    AskBack,
    Cancelled,
    CategorySet,
    Ended,
    EndedTask,
    HostBlocked,
    HostUnblocked,
    NewTask,
    PilotDraining,
    PilotGone,
    Returned,
    Scheduler,
    SpeculationSet,
    StartFailed,
    Stop,
    Tick,
    explain,
    rows,
)
from hpcq.scheduler.categories import ENOUGH, Category, rounded
from hpcq.scheduler.hosts import FAILURES, PAUSE
from hpcq.scheduler.invariants import check
from hpcq.scheduler.needs import round_up
from hpcq.scheduler.pilots import Openings


@pytest.fixture
def scheduler():
    """A scheduler whose invariants are checked at the end of the test."""
    scheduler = Scheduler()
    yield scheduler
    check(scheduler)


@pytest.fixture
def copying():
    """One that gives copies to tasks that take three times as long as others did: category "c" takes 1 s."""
    scheduler = Scheduler(speculate=3)
    ready(scheduler, "a", host="h1")
    for number in range(100, 100 + ENOUGH):
        submit(scheduler, NewTask(number, kind="c"))
        end(scheduler, number, pilot="a", seconds=1.0)
    yield scheduler
    check(scheduler)


def tick(scheduler, now):
    return scheduler.handle([Tick()], now)


def test_copies_can_be_turned_on_and_off_while_tasks_run():
    scheduler = Scheduler()
    for pilot in ("a", "b"):
        ready(scheduler, pilot, host=pilot)
    submit(scheduler, NewTask(1, kind="c"))
    start(scheduler, 1, pilot="a", now=0.0)
    scheduler.handle([SpeculationSet(3.0)], 1.0)
    for number in range(100, 100 + ENOUGH):
        submit(scheduler, NewTask(number, kind="c"), now=1.0)
        end(scheduler, number, pilot="b", seconds=1.0, now=1.0)
    scheduler.handle([SpeculationSet(None)], 2.0)
    assert not scheduler.wants_tick
    assert assigned(tick(scheduler, 10.0)) == {}
    scheduler.handle([SpeculationSet(3.0)], 10.0)
    assert assigned(tick(scheduler, 11.0)) == {"b": [1]}
    check(scheduler)


# --- needs ---------------------------------------------------------------------------------------------------------

NEEDS = {
    "disk": (NewTask(1, disk=11), {"disk": 10}, {"disk": 11}),
    "gpus": (NewTask(1, gpus=1), {}, {"gpus": 1}),
    "features": (NewTask(1, features=frozenset({"x"})), {"features": frozenset({"y"})}, {"features": frozenset("xy")}),
    "walltime": (NewTask(1, walltime=60), {"time_left": 59.0}, {"time_left": 60.0}),
}


@pytest.mark.parametrize("need", NEEDS)
def test_a_task_goes_only_where_its_needs_are_met(scheduler, need):
    task, less, enough = NEEDS[need]
    submit(scheduler, task)
    assert ready(scheduler, "less", **less) == []
    assert need.removesuffix("s") in explain(scheduler, 1, 0.0)
    assert assigned(ready(scheduler, "enough", **enough)) == {"enough": [1]}


@pytest.mark.parametrize(("need", "has"), [("disk", 10), ("gpus", 2), ("memory", 1000), ("cores", 4)])
def test_nothing_is_promised_twice(scheduler, need, has):
    ready(scheduler, **{"cores": 4, "disk": 10, "gpus": 2, "memory": 1000, need: has})
    submit(scheduler, *(NewTask(number, **{need: has}) for number in (1, 2)))
    pilot = scheduler.pilots["p"]
    assert list(pilot.claimed) == [1]
    end(scheduler, 1, seconds=9.0)
    assert list(pilot.claimed) == [2]


def test_time_that_passes_counts(scheduler):
    ready(scheduler, time_left=100.0)
    assert submit(scheduler, NewTask(1, walltime=60), now=50.0) == []
    assert assigned(submit(scheduler, NewTask(2, walltime=50), now=50.0)) == {"p": [2]}


def test_what_was_sent_ahead_and_can_no_longer_end_in_time_is_asked_back(scheduler):
    ready(scheduler, time_left=100.0)
    submit(scheduler, NewTask(1), NewTask(2, walltime=60))
    assert list(scheduler.pilots["p"].backlog) == [2]
    assert scheduler.wants_tick
    assert tick(scheduler, 30.0) == []
    assert tick(scheduler, 50.0) == [AskBack("p", [2])]
    assert scheduler.handle([Returned("p", [2])], 50.0) == []


@pytest.mark.parametrize(("seconds", "rounded_up"), [(5400, 5400), (5401, 5500), (7, 7), (86400, 87000), (100, 100)])
def test_walltimes_are_rounded_up_to_two_figures(seconds, rounded_up):
    assert round_up(seconds) == rounded_up


def test_idle_cores_are_told_also_with_tasks_waiting_for_more(scheduler):
    ready(scheduler, "a", cores=4)
    ready(scheduler, "b", cores=4)
    submit(scheduler, NewTask(1, cores=3), NewTask(2, cores=3), NewTask(3, cores=64), NewTask(4, cores=64))
    assert scheduler.free_cores == 2
    scheduler.handle([PilotDraining("a")], 0.0)
    assert scheduler.free_cores == 1


def test_each_opening_is_looked_at_once():
    openings, looked = Openings(), []

    def refuse(pilot):
        looked.append(pilot)
        return False

    for pilot in "abc":
        openings.put(pilot)
    _, seen = openings.find(0, refuse)
    openings.put("b")
    openings.drop("c")
    _, seen = openings.find(seen, refuse)
    assert looked == ["a", "b", "c", "b"]
    for _ in range(1000):
        openings.put("a")
    assert openings.find(seen, lambda pilot: pilot == "a")[0] == "a"
    assert len(openings._log) < 100


def test_the_simulation_runs_to_its_end_and_costs_do_not_grow():
    small, large = Simulation(10, 400), Simulation(200, 8000)
    small.run()
    large.run()
    assert large.finished == 8000
    assert (
        large.seconds / large.events < 10 * small.seconds / small.events
    )  # a shared machine: only what is grossly off


# --- categories ----------------------------------------------------------------------------------------------------


def learn(scheduler, *memory, mode="max", **settings):
    scheduler.handle([CategorySet("c", mode, **settings)], 0.0)
    ready(scheduler, cores=4, memory=8000)
    for number, used in enumerate(memory, 1000):
        submit(scheduler, NewTask(number, kind="c"))
        end(scheduler, number, seconds=10.0, memory=used)


def test_fixed_gives_what_the_category_says_to_tasks_that_do_not(scheduler):
    scheduler.handle([CategorySet("c", memory=300)], 0.0)
    ready(scheduler, cores=4)
    commands = submit(scheduler, NewTask(1, kind="c"), NewTask(2, kind="c", memory=200), NewTask(3, kind="d"))
    assert allotted(commands) == {1: 300, 2: 200}
    assert scheduler.pilots["p"].free_memory == 500
    assert finished(end(scheduler, 1, outcome="resources", memory=400)) == {1: Outcome.RESOURCES}


@pytest.mark.parametrize(("mode", "memory"), [("max", 1000), ("max_throughput", 100)])
def test_learned_modes_follow_what_was_used(scheduler, mode, memory):
    learn(scheduler, *[100] * 19, 1000, mode=mode, memory=50)
    assert allotted(submit(scheduler, NewTask(1, kind="c"))) == {1: memory}


def test_until_enough_have_ended_the_guess_serves(scheduler):
    learn(scheduler, *[700] * (ENOUGH - 1), memory=50)
    assert allotted(submit(scheduler, NewTask(1, kind="c"))) == {1: 50}


def test_tasks_that_wait_already_get_what_was_learned_meanwhile(scheduler):
    learn(scheduler, *[700] * (ENOUGH - 1), memory=5000)
    submit(scheduler, *(NewTask(number, kind="c") for number in range(1, 4)))
    assert list(scheduler.pilots["p"].claimed) == [1]
    assert allotted(end(scheduler, 1, seconds=10.0, memory=700)) == {3: 700}


def test_what_lacked_memory_gets_the_most_seen_then_a_whole_pilot_then_ends(scheduler):
    learn(scheduler, *[100] * 19, 1000, mode="max_throughput")
    submit(scheduler, NewTask(1, kind="c", retries=0))
    assert allotted(end(scheduler, 1, outcome="resources", memory=150)) == {1: 1000}
    commands = end(scheduler, 1, outcome="resources", memory=1001)
    assert allotted(commands) == {1: 8000}
    assert (scheduler.pilots["p"].free_cores, scheduler.pilots["p"].free_memory) == (0, 0)
    assert finished(end(scheduler, 1, outcome="resources", memory=8001)) == {1: Outcome.RESOURCES}


def test_a_category_s_maximum_is_the_last_try(scheduler):
    learn(scheduler, *[100] * 9, max_memory=3000)
    submit(scheduler, NewTask(1, kind="c"))
    assert allotted(end(scheduler, 1, outcome="resources", memory=150)) == {1: 3000}
    assert finished(end(scheduler, 1, outcome="resources", memory=3001)) == {1: Outcome.RESOURCES}


def test_no_more_is_promised_than_any_pilot_has(scheduler):
    learn(scheduler, *[100] * 9)
    submit(scheduler, NewTask(1, kind="c", memory=8000))
    assert finished(end(scheduler, 1, outcome="resources", memory=8001)) == {1: Outcome.RESOURCES}


def test_the_cheapest_first_allotment_counts_second_tries():
    category = Category("c")
    category.set(CategorySet("c", "max_throughput"))
    for used in [1000] * 15 + [2000] * 5:
        category.used(used, 0, 10.0)
    assert category.memory_used.cheapest() == 1000  # 1000 * 20 + 2000 * 5 < 2000 * 20
    for _ in range(20):
        category.used(2000, 0, 10.0)
    assert category.memory_used.cheapest() == 2000


@pytest.mark.parametrize(("amount", "bucket"), [(0.2, 1), (99, 99), (101, 110), (1000, 1000), (1001, 1100)])
def test_amounts_are_rounded_up_to_two_figures(amount, bucket):
    assert rounded(amount) == bucket


# --- copies --------------------------------------------------------------------------------------------------------


def straggle(scheduler):
    """Task 1 runs on pilot a since 0 s; b is idle; the copy is given."""
    submit(scheduler, NewTask(1, kind="c"))
    start(scheduler, 1, pilot="a")
    ready(scheduler, "b", host="h2")
    assert tick(scheduler, 2.9) == []
    assert assigned(tick(scheduler, 3.1)) == {"b": [1]}


def test_an_outlier_gets_a_copy_and_the_first_result_counts(copying):
    straggle(copying)
    assert tick(copying, 99.0) == []  # one copy, not more
    assert "so a copy runs on pilot b" in explain(copying, 1, 5.0)
    commands = end(copying, 1, pilot="b", now=4.0)
    assert finished(commands) == {1: Outcome.SUCCESS}
    assert Stop("a", [1]) in commands
    assert copying.pilots["a"].free_cores == 0  # until a has answered
    assert end(copying, 1, pilot="a", outcome="cancelled", now=4.1) == []
    assert copying.pilots["a"].free_cores == 1


def test_the_original_may_win(copying):
    straggle(copying)
    commands = end(copying, 1, pilot="a", now=4.0)
    assert (finished(commands), commands[-1]) == ({1: Outcome.SUCCESS}, Stop("b", [1]))


def test_both_results_in_one_step_count_once(copying):
    straggle(copying)
    events = [Ended(pilot, [EndedTask(1, "success")]) for pilot in "ba"]
    assert finished(copying.handle(events, 4.0)) == {1: Outcome.SUCCESS}


@pytest.mark.parametrize("pilot", ["a", "b"])
def test_when_one_goes_the_other_carries_on(copying, pilot):
    straggle(copying)
    assert copying.handle([PilotGone(pilot)], 4.0) == []
    other = "b" if pilot == "a" else "a"
    assert finished(end(copying, 1, pilot=other, now=5.0)) == {1: Outcome.SUCCESS}


def test_a_cancel_stops_both(copying):
    straggle(copying)
    commands = copying.handle([Cancelled([1])], 4.0)
    assert commands == [Stop("a", [1]), Stop("b", [1])]
    assert finished(end(copying, 1, pilot="b", outcome="cancelled", now=4.1)) == {1: Outcome.CANCELLED}
    assert end(copying, 1, pilot="a", outcome="cancelled", now=4.2) == []


def test_no_copy_where_a_task_waits_for_the_room(copying):
    submit(copying, NewTask(1, kind="c"))
    start(copying, 1, pilot="a")
    ready(copying, "b", host="h2")
    submit(copying, NewTask(2, kind="d"))
    assert assigned(tick(copying, 9.0)) == {}


def test_never_without_being_asked(scheduler):
    ready(scheduler, "a")
    for number in range(100, 110):
        submit(scheduler, NewTask(number))
        end(scheduler, number, pilot="a", seconds=1.0)
    submit(scheduler, NewTask(1))
    start(scheduler, 1, pilot="a")
    ready(scheduler, "b")
    assert not scheduler.wants_tick
    assert tick(scheduler, 1e6) == []


# --- hosts ---------------------------------------------------------------------------------------------------------


def test_nothing_more_is_placed_on_a_blocked_host(scheduler):
    ready(scheduler, cores=2, host="bad")
    submit(scheduler, NewTask(1), NewTask(2), NewTask(3))
    assert scheduler.handle([HostBlocked("bad", 60.0)], 0.0) == [AskBack("p", [3])]
    scheduler.handle([Returned("p", [3])], 0.0)
    assert assigned(end(scheduler, 1)) == {}
    assert "host bad is blocked: on request" in explain(scheduler, 3, 0.0)
    assert ready(scheduler, "q", host="bad") == []
    assert tick(scheduler, 59.0) == []
    assert assigned(tick(scheduler, 60.0)) == {"p": [3]}


def test_a_host_blocked_for_good_waits_for_the_user(scheduler):
    scheduler.handle([HostBlocked("bad")], 0.0)
    ready(scheduler, host="bad")
    assert submit(scheduler, NewTask(1)) == []
    assert tick(scheduler, 1e9) == []
    assert assigned(scheduler.handle([HostUnblocked("bad")], 1e9)) == {"p": [1]}


def crash_on(scheduler, pilot, count, first=1, outcome="crash"):
    for number in range(first, first + count):
        submit(scheduler, NewTask(number, features=frozenset({pilot})))
        end(scheduler, number, pilot=pilot, outcome=outcome)


@pytest.fixture
def two_hosts(scheduler):
    for pilot in ("bad", "good"):
        ready(scheduler, pilot, host=pilot, features=frozenset({pilot}))
    return scheduler


def test_a_host_where_alone_tasks_crash_is_blocked_for_a_while(two_hosts):
    crash_on(two_hosts, "bad", 1)
    crash_on(two_hosts, "good", FAILURES, 100, "success")
    crash_on(two_hosts, "bad", FAILURES - 2, 200)
    assert not two_hosts.hosts.why("bad")
    crash_on(two_hosts, "bad", 1, 300)
    assert f"{FAILURES} crashes" in two_hosts.hosts.why("bad")
    tick(two_hosts, PAUSE)
    assert not two_hosts.hosts.why("bad")


def test_a_host_is_not_blamed_for_tasks_that_crash_everywhere(two_hosts):
    for number in range(1, 20):
        crash_on(two_hosts, "bad", 1, 10 * number)
        crash_on(two_hosts, "good", 1, 1000 + 10 * number)
    assert not two_hosts.hosts.why("bad")


def test_a_success_ends_the_row(two_hosts):
    for number in range(1, 20):
        crash_on(two_hosts, "good", 1, 1000 + 10 * number, "success")
        crash_on(two_hosts, "bad", FAILURES - 1, 10 * number)
        crash_on(two_hosts, "bad", 1, 5000 + number, "success")
    assert not two_hosts.hosts.why("bad")


def test_failed_starts_block_a_host_too(two_hosts):
    two_hosts.handle([StartFailed("worse")], 0.0)
    crash_on(two_hosts, "good", FAILURES, outcome="success")
    two_hosts.handle([StartFailed("worse")] * (FAILURES - 1), 0.0)
    assert "failed starts" in two_hosts.hosts.why("worse")


# --- explanations --------------------------------------------------------------------------------------------------


def test_every_place_of_a_task_is_explained(scheduler):
    submit(scheduler, NewTask(1), NewTask(2), NewTask(3), NewTask(4))
    assert explain(scheduler, 1, 0.0) == "task 1 waits: no pilot is ready"
    ready(scheduler, host="h")
    assert explain(scheduler, 1, 1.0) == "task 1 was sent to pilot p on h 1.0 s ago and is about to begin"
    assert explain(scheduler, 2, 1.0) == "task 2 was sent to pilot p on h 1.0 s ago and waits there behind 1 task"
    assert explain(scheduler, 4, 1.0) == "task 4 waits: 1 pilot could run it, and it is full; 1 task before it"
    start(scheduler, 1, now=1.0)
    assert explain(scheduler, 1, 301.0) == "task 1 runs on pilot p on h since 5 min"
    scheduler.handle([Cancelled([1])], 2.0)
    assert explain(scheduler, 1, 3.0) == "task 1 is being cancelled on pilot p on h since 1.0 s"
    end(scheduler, 1)
    assert explain(scheduler, 1, 0.0) == "task 1 has ended, or was never submitted"
    scheduler.handle([PilotDraining("p")], 3.0)
    assert explain(scheduler, 4, 3.0) == "task 4 waits: 1 pilot could run it, but 1 pilot draining"


def test_needs_that_nobody_meets_are_named_with_the_most_there_is(scheduler):
    ready(scheduler, "a", cores=2, wan=False)
    ready(scheduler, "b", cores=4)
    submit(scheduler, NewTask(1, cores=8, network="wan", features=frozenset({"x"})))
    assert explain(scheduler, 1, 0.0) == (
        "task 1 waits: no pilot meets its needs: cores 8: 2 of 2 pilots have less (the most is 4); "
        "network 'wan': 1 of 2 pilots has no tunnel; feature 'x': 2 of 2 pilots have it not"
    )


def test_lists_are_in_order_and_bounded(scheduler):
    ready(scheduler)
    submit(scheduler, NewTask(1), NewTask(2), NewTask(3), NewTask(4, priority=1))
    start(scheduler, 4, now=2.0)
    found = rows(scheduler, 3, 5.0)
    assert [(row.id, row.state, row.since) for row in found] == [
        (4, "running", 3.0),
        (1, "assigned", 5.0),
        (2, "waiting", 5.0),
    ]
