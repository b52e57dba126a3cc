"""Where a manager may be told to listen; pure, but for this host's own list of interfaces."""

import resource

import pytest

from hpcq import addresses
from hpcq.errors import UsageError


@pytest.mark.parametrize(
    ("port", "tried"),
    [(0, [0]), (20000, [20000]), ("20000", [20000]), ("20000-20002", [20000, 20001, 20002]), ([5, 7], [5, 7])],
)
def test_ports_are_one_or_a_range(port, tried):
    assert list(addresses.ports(port)) == tried


@pytest.mark.parametrize("port", ["", "x", "1-", "3-2", "0-5", "70000", -1, 65536, [], [0, 1], "1-2-3"])
def test_what_is_no_port_is_named(port):
    with pytest.raises(UsageError, match="port must be"):
        addresses.ports(port)


def test_an_interface_gives_its_own_address():
    listen, published = addresses.place(None, "lo")
    assert listen in ("127.0.0.1", "::1")
    assert published == [listen]


def test_an_unknown_interface_is_answered_with_those_there_are():
    with pytest.raises(UsageError, match=r"'nope0'; it has .*lo"):
        addresses.place(None, "nope0")


def test_address_and_interface_exclude_each_other():
    with pytest.raises(UsageError, match="not both"):
        addresses.place("127.0.0.1", "lo")


def test_an_address_is_told_to_pilots_as_a_number():
    assert addresses.place("127.0.0.1", None) == ("127.0.0.1", ["127.0.0.1"])


def test_all_addresses_are_told_when_it_listens_on_all():
    assert addresses.place(None, None) == (None, addresses.own_addresses())
    assert addresses.place("0.0.0.0", None)[1] == addresses.own_addresses()


def test_a_name_that_is_none_is_named():
    with pytest.raises(UsageError, match=r"'no such host!' cannot be resolved"):
        addresses.place("no such host!", None)


def test_open_files_are_counted_against_the_limit():
    counted = addresses.descriptors()
    assert 0 < counted["used"] <= counted["limit"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
