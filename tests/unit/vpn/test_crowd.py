"""Who of too many strangers has to go."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.gateway.crowd import Crowd, neighbourhood


def test_who_comes_without_end_pushes_out_his_own():
    crowd = Crowd(10)
    assert [crowd.add(f"pilot {number}", f"192.0.2.{number}") for number in range(3)] == [None] * 3
    gone = [crowd.add(number, "198.51.100.1") for number in range(1000)]
    assert gone[:7] == [None] * 7
    assert gone[7:] == list(range(993))
    assert {"pilot 0", "pilot 1", "pilot 2"} < set(crowd)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::2:3", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("no address", "no address", True),
    ],
)
def test_addresses_one_host_can_have(one, other, same):
    assert (neighbourhood(one) == neighbourhood(other)) is same


ADDRESSES = st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"])


@given(st.lists(st.one_of(ADDRESSES, st.integers(0, 40)), max_size=60), st.integers(1, 6))
def test_it_is_never_more_than_the_limit_and_who_goes_is_of_the_most(steps, limit):
    crowd, members = Crowd(limit), {}
    for number, step in enumerate(steps):
        if isinstance(step, int):
            crowd.remove(step)
            members.pop(step, None)
            continue
        members[number] = neighbourhood(step)
        gone = crowd.add(number, step)
        if gone is not None:
            counts = collections.Counter(members.values())
            group = members.pop(gone)
            assert counts[group] == max(counts.values())
            assert all(other > gone for other, where in members.items() if where == group)
        assert set(crowd) == set(members)
        assert len(crowd) <= limit
