"""Bandwidth limits, by a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.relay.bucket import QUANTUM, Budget, TokenBucket

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
