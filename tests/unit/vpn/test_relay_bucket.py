"""Bandwidth limits, by a clock of the test's own."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.relay.bucket import DELAY, QUANTUM, WAITING, Budget, Shaper, SharedBucket, TokenBucket

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


LARGEST = 65507


@given(
    st.floats(1e3, 1e9),
    st.lists(st.tuples(st.floats(0, 0.5), st.lists(st.integers(0, LARGEST), max_size=8)), max_size=40),
)
def test_datagrams_pass_in_order_within_the_rate_or_are_dropped(rate, steps):
    bucket = TokenBucket(rate)
    shaper, now, sent, passed = Shaper(Budget([bucket])), 0.0, 0, []
    came = {}
    for pause, sizes in steps:
        now += pause
        for size in sizes:
            shaper.add(len(came), size, now)
            came[len(came)] = (size, now)
        for one in shaper.pop_ready(now):
            size, at = came[one]
            assert now - at <= DELAY
            passed.append(one)
            sent += size
        assert sent <= bucket.burst + rate * now + LARGEST + 1
    assert passed == sorted(set(passed))
    shaper.pop_ready(now + 2 * DELAY)
    assert len(passed) + shaper.dropped == len(came)


def test_datagrams_below_the_rate_all_pass():
    shaper, now, passed = Shaper(Budget([TokenBucket(1e6)])), 0.0, []
    for number in range(1000):
        shaper.add(number, 900, now)
        passed += shaper.pop_ready(now)
        now += 0.001
    assert passed == list(range(1000))


def test_a_datagram_waits_for_its_turn_and_not_longer():
    shaper = Shaper(Budget([TokenBucket(1e6)]))
    for size in (50_000, 1000, 1000):
        shaper.add(size, size, 0.0)
    assert shaper.pop_ready(0.0) == [50_000]
    assert shaper.wait(0.0) == pytest.approx(0.002)
    assert shaper.pop_ready(0.0021) == [1000, 1000]
    assert shaper.wait(0.0021) is None
    shaper.add("late", LARGEST, 0.003)
    assert shaper.pop_ready(0.003 + DELAY + 0.01) == []
    assert shaper.dropped == 1


def test_who_floods_competes_for_quanta_like_connections():
    """Else whoever takes every few bytes that there are would leave none to those who want a quantum."""
    bucket = TokenBucket(1e6)
    budget = Budget([bucket])
    shaper = Shaper(budget)
    bucket.take(bucket.burst)
    for number in range(100):
        shaper.add(number, 1000, 0.0)
    assert shaper.pop_ready(0.010) == []
    assert budget.take(1 << 20, 0.017) >= QUANTUM
    assert shaper.pop_ready(0.020) == []


def test_what_waits_is_bounded():
    bucket = TokenBucket(1e9)
    bucket.take(2 * bucket.burst)
    shaper = Shaper(Budget([bucket]))
    for number in range(20):
        shaper.add(number, 65536, 0.0)
    assert shaper.dropped == 20 - WAITING // 65536


def test_datagrams_without_a_limit_pass_at_once():
    shaper = Shaper(Budget())
    shaper.add("one", LARGEST, 0.0)
    assert shaper.pop_ready(0.0) == ["one"]
