"""Finished tasks on their way to who waits for them."""

import threading
from collections import OrderedDict

import pytest

import hpcq
from hpcq.dispatch import Finished
from hpcq.mailbox import Mailbox
from hpcq.outcome import Attempt, Outcome

DONE = Attempt(Outcome.SUCCESS)


@pytest.fixture
def box():
    return Mailbox()


def expect(box, number, tag=None):
    task = hpcq.Task("true", tag=tag)
    task.id = number
    box.expect(number, task)
    return task


def put(box, *numbers):
    box.put([Finished(number, DONE) for number in numbers])


def take(box, timeout=0.0):
    return box.take(box.first, box.expects_any, timeout)


def take_tagged(box, tag, timeout=0.0):
    return box.take(lambda: box.first_tagged(tag), lambda: box.expects_tagged(tag), timeout)


def take_id(box, number, timeout=0.0):
    return box.take(lambda: box.has(number), lambda: box.expects(number), timeout)


def test_tasks_come_in_the_order_they_finished(box):
    tasks = {number: expect(box, number) for number in (1, 2, 3)}
    put(box, 2)
    put(box, 3, 1)
    assert [take(box) for _ in range(4)] == [tasks[2], tasks[3], tasks[1], None]


def test_a_task_is_done_when_it_is_put(box):
    task = expect(box, 1)
    assert not task.done
    put(box, 1)
    assert task.outcome == "success"


def test_nothing_to_come_needs_no_waiting(box):
    assert take(box, None) is None
    assert take_tagged(box, "x", None) is None
    assert take_id(box, 5, None) is None


def test_by_tag_and_by_id(box):
    tasks = [expect(box, 1, "a"), expect(box, 2, "b"), expect(box, 3, "a")]
    put(box, 1, 2, 3)
    assert take_tagged(box, "b") is tasks[1]
    assert take_id(box, 3) is tasks[2]
    assert take_tagged(box, "a") is tasks[0]
    assert take_tagged(box, "a", None) is None
    assert box.empty


def test_a_tag_is_expected_until_its_last_task_is_here(box):
    expect(box, 1, "a")
    expect(box, 2, "a")
    put(box, 1)
    assert box.expects_tagged("a")
    put(box, 2)
    assert not box.expects_tagged("a")


def test_empty_only_when_nothing_is_here_or_to_come(box):
    assert box.empty
    expect(box, 1)
    assert not box.empty
    put(box, 1)
    assert not box.empty
    take(box)
    assert box.empty


def test_a_time_limit_ends_the_wait(box):
    expect(box, 1)
    assert take(box, 0) is None
    assert take(box, 0.001) is None


def test_failure_wakes_who_waits_for_what_will_not_come(box):
    first = expect(box, 1)
    expect(box, 2)
    put(box, 1)
    box.fail(ValueError("a bug"))
    assert take(box) is first
    with pytest.raises(hpcq.QueueClosedError, match="the queue has ended: a bug"):
        take(box, None)


def test_failure_does_not_matter_when_nothing_was_to_come(box):
    box.fail(ValueError("closed"))
    assert take(box, None) is None


def test_who_waits_for_a_task_that_another_takes_is_woken(box):
    expect(box, 1)
    taken = []
    threads = [threading.Thread(target=lambda: taken.append(take(box, None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    put(box, 1)
    for thread in threads:
        thread.join(10)
    assert sorted(task is None for task in taken) == [False, True, True]


def test_the_first_of_many_is_found_at_once_and_in_order():
    """By the kind of container: a dict passes over all that were taken before, sixty microseconds for 100,000."""
    box = Mailbox()
    for number in range(100):
        box.expect(number, hpcq.Task("true").set(tag="t"))
    box.put([Finished(number, DONE) for number in range(100)])
    assert isinstance(box._tasks, OrderedDict)
    assert isinstance(box._by_tag["t"], OrderedDict)
    for number in range(100):
        assert box.first() == box.first_tagged("t") == number
        assert box.take(box.first, box.expects_any, 0) is not None
    assert box.empty
