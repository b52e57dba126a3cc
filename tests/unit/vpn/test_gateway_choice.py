"""Which of several gateways serves a pilot."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import UsageError
from vpn.gateway.choice import TROUBLE, Choice, gateway_names


@pytest.mark.parametrize(
    ("text", "names"), [("", ("default",)), ("a", ("a",)), ("a,b", ("a", "b")), (" a , b-2.x ", ("a", "b-2.x"))]
)
def test_names_of_gateways(text, names):
    assert gateway_names(text) == names


@pytest.mark.parametrize("text", [",", "a,", "a,,b", "a,b,a", "../a", "a/b,c", " "])
def test_what_names_no_gateway_is_refused(text):
    with pytest.raises(UsageError):
        gateway_names(text)


def test_pilots_spread_evenly():
    choice, names = Choice(), ("a", "b", "c")
    for _ in range(30):
        choice.took(choice.order(names, "", 0.0)[0])
    assert choice._clients == {"a": 10, "b": 10, "c": 10}


def test_a_pilot_that_asks_again_goes_elsewhere_even_where_more_are():
    choice = Choice()
    for _ in range(5):
        choice.took("b")
    assert choice.order(("a", "b"), "a", 0.0) == ["b", "a"]


def test_one_that_failed_is_asked_last_for_a_while():
    choice = Choice()
    choice.failed("a", 10.0)
    assert choice.order(("a", "b"), "b", 10.0 + TROUBLE - 1) == ["b", "a"]
    assert choice.order(("a", "b"), "b", 10.0 + TROUBLE) == ["a", "b"]
    choice.failed("a", 50.0)
    choice.served("a")
    assert choice.order(("a", "b"), "b", 50.0) == ["a", "b"]


NAMES = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(st.sampled_from(["ask", "leave", "fail"]), NAMES)), NAMES)
def test_every_gateway_is_always_asked_and_counts_are_those_of_clients(steps, before):
    choice, clients = Choice(), collections.Counter()
    for now, (what, name) in enumerate(steps):
        if what == "ask":
            choice.took(name)
            clients[name] += 1
        elif what == "leave" and clients[name]:
            choice.left(name)
            clients[name] -= 1
        elif what == "fail":
            choice.failed(name, now)
        order = choice.order(("a", "b", "c"), before, now)
        assert sorted(order) == ["a", "b", "c"]
        healthy = [name for name in order if not choice.in_trouble(name, now)]
        assert order[: len(healthy)] == healthy
        assert before not in healthy[:-1]
        assert choice._clients == +clients
