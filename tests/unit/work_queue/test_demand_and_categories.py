"""How many workers a factory wants, and what categories add; pure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcq.work_queue as wq
from hpcq.work_queue.categories import Category, check_mode, check_resources
from hpcq.work_queue.demand import Idleness, Limits
from hpcq.work_queue.summary import Resources, Statistics


@pytest.mark.parametrize(
    ("limits", "tasks", "workers", "wanted"),
    [
        (Limits(), 0, 0, 5),
        (Limits(), 1000, 5, 5),
        (Limits(workers_per_cycle=50), 1000, 60, 40),
        (Limits(min_workers=0), 0, 0, 0),
        (Limits(min_workers=0), 3, 0, 3),
        (Limits(min_workers=0, cores=4), 9, 0, 3),
        (Limits(min_workers=0, cores=4, tasks_per_worker=1, workers_per_cycle=100), 9, 2, 7),
        (Limits(max_workers=2), 50, 7, 0),
        (Limits(min_workers=9, max_workers=3, workers_per_cycle=0), 0, 0, 3),
    ],
)
def test_workers_to_submit(limits, tasks, workers, wanted):
    assert limits.to_submit(tasks, workers) == wanted


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 20), st.integers(0, 50), st.integers(0, 20))
def test_a_factory_stays_between_its_limits(low, more, per_cycle, tasks, workers):
    limits = Limits(low, low + more, per_cycle)
    count = limits.to_submit(tasks, workers)
    assert count == 0 or workers + count <= limits.max_workers
    assert not per_cycle or count <= per_cycle
    if not per_cycle:
        assert workers + count >= limits.min_workers


def test_idle_workers_end_after_their_time_and_the_busy_do_not():
    idleness, limits = Idleness(), Limits(min_workers=1, timeout=10)
    idleness.look({"a": False, "b": True, "c": False}, 0.0)
    assert idleness.to_end(limits, 3, 9.9) == []
    idleness.look({"a": False, "b": False, "c": True}, 5.0)
    idleness.look({"a": False, "b": False, "c": False}, 10.0)
    assert idleness.to_end(limits, 3, 10.0) == ["a"]
    assert idleness.to_end(limits, 1, 10.0) == []  # not below the minimum
    assert idleness.to_end(limits, 3, 21.0) == ["a", "b"]


def test_workers_over_the_maximum_end_when_they_are_idle():
    idleness = Idleness()
    idleness.look({"a": False, "b": True, "c": False}, 0.0)
    assert idleness.to_end(Limits(min_workers=0, max_workers=2), 3, 1.0) == ["a"]


def test_a_fixed_category_adds_what_its_tasks_do_not_ask_for():
    category = Category("c", wq.WORK_QUEUE_ALLOCATION_MODE_FIXED)
    category.max = check_resources("x", {"cores": 2, "memory": 100, "gpus": -1})
    category.min = check_resources("x", {"cores": 3, "disk": 5})
    assert category.added() == {"cores": 3, "memory": 100, "disk": 5}


def test_a_category_that_learns_leaves_memory_and_disk_to_the_scheduler():
    category = Category("c", wq.WORK_QUEUE_ALLOCATION_MODE_MAX)
    category.max = {"cores": 2, "memory": 100, "disk": 50}
    category.guess = {"memory": 10}
    assert category.added() == {"cores": 2}
    assert category.learned() == {"mode": "max", "memory": 10, "disk": 50, "max_memory": 100, "max_disk": 50}
    category.min = {"memory": 1}
    with pytest.raises(NotImplementedError, match="minimum of memory"):
        category.learned()


def test_modes_and_resources_that_are_not_here_are_named():
    for mode in (wq.WORK_QUEUE_ALLOCATION_MODE_MIN_WASTE, wq.WORK_QUEUE_ALLOCATION_MODE_GREEDY_BUCKETING):
        with pytest.raises(NotImplementedError, match=f"mode {mode}"):
            check_mode(mode)
    with pytest.raises(ValueError, match="not an allocation mode"):
        check_mode(99)
    with pytest.raises(NotImplementedError, match="'bandwidth' in this"):
        check_resources("this", {"bandwidth": 1})


def test_a_full_category_holds_its_tasks_back():
    category = Category("c", 0)
    assert not category.is_full
    category.max_concurrent, category.out = 2, 1
    assert not category.is_full
    category.out = 2
    assert category.is_full


def test_fields_that_are_not_known_are_no_zeros():
    stats = Statistics(workers_connected=2)
    assert stats.workers_connected == stats.total_workers_connected == 2
    with pytest.raises(NotImplementedError, match=r"stats\.bandwidth"):
        stats.bandwidth  # noqa: B018
    with pytest.raises(AttributeError):
        stats.nothing  # noqa: B018
    with pytest.raises(NotImplementedError, match=r"resources\.swap_memory"):
        Resources(memory=1).swap_memory  # noqa: B018


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("autosize", True, NotImplementedError),
        ("condor_requirements", "x", NotImplementedError),
        ("wrapper", "x", NotImplementedError),
        ("no_such", 1, AttributeError),
    ],
)
def test_a_factory_refuses_what_it_cannot_honour(name, value, error):
    factory = wq.Factory("local", manager_name="m")
    with pytest.raises(error, match=name):
        setattr(factory, name, value)
    with pytest.raises(error if name != "wrapper" else KeyError, match=name):
        getattr(factory, name)


def test_a_factory_needs_a_queue_and_a_batch_system():
    with pytest.raises(ValueError, match="manager"):
        wq.Factory("local")
    with pytest.raises(NotImplementedError, match="batch_type='condor'"):
        wq.Factory("condor", manager_name="m")
    with pytest.raises(NotImplementedError, match="worker_binary"):
        wq.Factory("local", manager_name="m", worker_binary="w")
    factory = wq.Factory("local", manager_name="m")
    assert (factory.batch_type, factory.min_workers, factory.timeout) == ("local", 5, 300)
    with pytest.raises(RuntimeError, match="not yet started"):
        factory.stop()
