"""Bandwidth limits, by a clock of the test's own."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.relay.bucket import QUANTUM, Budget, SharedBucket, TokenBucket

steps = st.lists(st.tuples(st.floats(0, 2), st.integers(1, 1 << 20), st.floats(0, 1)), max_size=60)


@given(st.floats(1e3, 1e9), steps)
def test_never_more_than_the_rate_and_a_burst(rate, steps):
    bucket = TokenBucket(rate)
    budget, now, used = Budget([bucket]), 0.0, 0
    for pause, wanted, part in steps:
        now += pause
        granted = budget.take(wanted, now)
        assert 0 <= granted <= wanted
        kept = int(granted * part)
        budget.give_back(granted - kept)
        used += kept
        assert used <= bucket.burst + rate * now + 1


@given(st.floats(1e3, 1e9), st.floats(1e3, 1e9), st.integers(256, 1 << 20), st.floats(0, 100))
def test_after_the_wait_something_is_granted(first, second, wanted, now):
    budget = Budget([TokenBucket(first, now=now), TokenBucket(second, now=now)])
    for _ in range(5):
        while budget.take(1 << 40, now) or budget.take(wanted, now):  # all at once, and the rest
            pass
        wait = budget.wait(wanted, now)
        assert wait > 0
        now += wait * 1.001 + 1e-6
        assert budget.take(wanted, now) >= min(wanted, QUANTUM)


def test_without_limits_everything_is_granted():
    assert Budget().take(1 << 30, 0) == 1 << 30
    assert Budget().wait(1, 0) == 0


def test_a_clock_that_goes_back_adds_nothing():
    bucket = TokenBucket(1e6, now=100.0)
    bucket.take(bucket.burst)
    assert bucket.available(50.0) == 0
    assert bucket.available(50.01) == pytest.approx(10_000)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing"):
        TokenBucket(0)


@given(
    st.floats(1e4, 1e8),
    st.lists(st.tuples(st.integers(0, 2), st.floats(0, 3), st.integers(1, 1 << 20), st.floats(0, 1)), max_size=100),
)
def test_processes_that_share_a_rate_keep_it_together(rate, steps):
    spent, now, used = array("d", [0.0] * 3), 0.0, 0.0
    buckets = [SharedBucket(rate, spent, place) for place in range(3)]
    budgets = [Budget([bucket]) for bucket in buckets]
    for place, passed, wanted, unused in steps:
        now += passed
        granted = budgets[place].take(wanted, now)
        budgets[place].give_back(int(granted * unused))
        used += granted - int(granted * unused)
        assert used <= buckets[0].burst + rate * now + 1
    assert sum(spent) == used
    now += 10 * buckets[0].burst / rate
    assert all(bucket.available(now) == bucket.burst for bucket in buckets)  # nobody pays for ever for what others sent


def test_what_one_process_sends_the_others_wait_for():
    spent = array("d", [0.0, 0.0])
    one, other = (SharedBucket(1e6, spent, place) for place in (0, 1))
    assert Budget([one]).take(50_000, 0.0) == 50_000
    assert Budget([other]).take(50_000, 0.0) == 0
    assert other.wait(QUANTUM, 0.0) == pytest.approx(QUANTUM / 1e6)
    replaced = SharedBucket(1e6, spent, 0)  # a process that is started again owes nothing for the one before it
    assert replaced.available(0.0) == replaced.burst
    assert other.available(1.0) == other.burst
