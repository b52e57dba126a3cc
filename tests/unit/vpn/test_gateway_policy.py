"""The gateway's allow-list: decided on addresses, closed where a site is private."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import UsageError
from vpn.gateway.policy import LINGER, Names, Policy, parse_rule

OWN = ("192.0.2.1", "203.0.113.2", "2001:db8::2", "fe80::1%eth0")


def ip(text):
    return ipaddress.ip_address(text)


def allows(rules, address, port=443, names=()):
    return Policy(rules, OWN).decide(ip(address), port, names).allowed


@pytest.mark.parametrize("address", ["203.0.113.1", "192.0.2.11", "8.8.8.8", "2001:db8::7"])
def test_public_addresses_are_open_by_default(address):
    assert allows((), address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.7.7", "100.64.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "::", "::1", "fe80::1", "fd00::1", "ff02::1", "192.0.2.1", "2001:db8::2",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::7f00:1", "64:ff9b::a00:1", "2002:a00:1::1", "64:ff9b::c000:201",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rules", [(), ("default",), ("*:443",), ("0.0.0.0/0", "::/0"), ("*.example.org",)])
def test_the_sites_own_is_closed_whatever_the_general_rules(rules, address):
    assert not allows(rules, address, names={"www.example.org"})


def test_a_private_network_is_opened_by_naming_it():
    rules = ("10.1.0.0/16:1094",)
    assert allows(rules, "10.1.2.3", 1094)
    assert not allows(rules, "10.1.2.3", 22)
    assert not allows(rules, "10.2.0.1", 1094)
    assert not allows(rules, "203.0.113.1", 1094)  # a list was given: only what is on it
    assert allows((*rules, "default"), "203.0.113.1", 1094)
    assert allows(("127.0.0.1:8000",), "127.0.0.1", 8000)
    assert allows(("192.0.2.1:1094",), "192.0.2.1", 1094)
    assert not allows(("192.0.2.0/24",), "192.0.2.1", 1094)


def test_a_named_host_opens_private_ranges_only():
    rules = ("se.example.org:1094",)
    assert allows(rules, "10.1.2.3", 1094, {"SE.example.org."})
    assert not allows(rules, "10.1.2.3", 1094, {"other.example.org"})
    assert not allows(rules, "127.0.0.1", 1094, {"se.example.org"})
    assert not allows(rules, "192.0.2.1", 1094, {"se.example.org"})


def test_wildcards():
    rules = ("*.cern.ch",)
    assert allows(rules, "8.8.8.8", names={"eos.cms.cern.ch"})
    assert not allows(rules, "8.8.8.8", names={"cern.ch.example.org", "notcern.ch"})
    assert not allows(rules, "8.8.8.8")


def test_ranges_of_ports():
    assert allows(("[2001:db8::]/32:1094-1099",), "2001:db8::7", 1099)
    assert not allows(("[2001:db8::]/32:1094-1099",), "2001:db8::7", 1100)
    assert not Policy().decide(ip("8.8.8.8"), 0).allowed


def test_the_reason_names_the_destination_and_what_to_do():
    reason = Policy((), OWN).decide(ip("10.1.2.3"), 22, {"a.example.org"}).reason
    assert "10.1.2.3 (a.example.org)" in reason
    assert "--allow" in reason
    assert "allow-list" in Policy(("8.8.8.8",)).decide(ip("9.9.9.9"), 22).reason


@pytest.mark.parametrize(
    "text",
    [
        "", ":443", "a b", "host:0", "host:70000", "host:9-2", "1.2.3", "*.*.ch", "ho*st", "[::1", "a:b", "a.b:",
        "300.1.1.1", "10.0.0.0/33", "-x.org", "http://x",
    ],
)  # fmt: skip
def test_a_bad_rule_is_named(text):
    with pytest.raises(UsageError, match="--allow"):
        parse_rule(text)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_a_usage_error(text):
    try:
        rule = parse_rule(text)
    except UsageError:
        return
    assert 0 < rule.low <= rule.high < 65536


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(["default", "*:1-65535", "0.0.0.0/0", "::/0"]))
def test_mapped_addresses_are_judged_as_what_they_are(address, port, rule):
    policy = Policy((rule,), OWN)
    if address.version == 4:
        mapped = ip(f"::ffff:{address}")
        assert policy.decide(mapped, port).allowed == policy.decide(address, port).allowed
    if policy.decide(address, port).allowed:
        assert not (address.is_loopback)
        assert not (address.is_link_local)
        assert not (address.is_multicast)
        assert not (address.is_unspecified)


def test_names_are_learned_for_a_time():
    names = Names(limit=2)
    names.learn("A.example.org.", [ip("8.8.8.8"), ip("::ffff:9.9.9.9")], 60, 100.0)
    names.learn("b.example.org", [ip("8.8.8.8")], 10, 100.0)
    assert names.of(ip("8.8.8.8"), 100) == {"a.example.org", "b.example.org"}
    assert names.of(ip("9.9.9.9"), 100) == {"a.example.org"}
    assert names.of(ip("8.8.8.8"), 100 + 10 + LINGER) == {"a.example.org"}
    assert names.of(ip("8.8.8.8"), 100 + 60 + LINGER) == frozenset()
    names.learn("c.example.org", [ip("7.7.7.7"), ip("6.6.6.6")], 10, 200.0)
    assert not names.of(ip("9.9.9.9"), 200)  # the oldest went
    assert names.of(ip("6.6.6.6"), 200)


def test_an_address_the_host_has_got_since_is_closed_too():
    policy = Policy(["default", "192.0.2.7:22"])
    address = ipaddress.ip_address("::ffff:192.0.2.7")
    assert policy.decide(address, 80).allowed
    policy.learn_own(address)
    policy.learn_own(ipaddress.ip_address("192.0.2.7"))
    assert "own host" in policy.decide(address, 80).reason
    assert policy.decide(address, 22).allowed  # named by its address
    assert policy.decide(ipaddress.ip_address("192.0.2.8"), 80).allowed
