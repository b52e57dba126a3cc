"""Under which addresses a gateway says that it can be reached."""

from __future__ import annotations

import ipaddress

import pytest

from vpn.gateway.state import usable_addresses

ADDRESSES = [
    (name, ipaddress.ip_address(address))
    for name, address in (
        ("lo", "127.0.0.1"),
        ("ib0", "2001:db8::7"),
        ("eth0", "192.0.2.1"),
        ("eth0", "169.254.3.4"),
        ("docker0", "172.17.0.1"),
    )
]
RUNNING, UP, DOWN = ("up", "broadcast", "running"), ("up", "broadcast"), ("broadcast",)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lo": RUNNING, "ib0": RUNNING, "eth0": RUNNING, "docker0": UP}, ["192.0.2.1", "2001:db8::7"]),
        ({"lo": RUNNING, "ib0": UP, "eth0": UP, "docker0": DOWN}, ["192.0.2.1", "2001:db8::7"]),
        ({"lo": RUNNING, "ib0": DOWN, "eth0": DOWN}, []),
        ({"lo": RUNNING}, []),
    ],
)
def test_those_of_links_that_run_else_of_those_that_are_up(flags, expected):
    assert usable_addresses(ADDRESSES, flags) == expected
