"""The packet filter's text: what it lets out besides TCP, by the allow-list."""

from __future__ import annotations

import pytest

from vpn.gateway.policy import Policy
from vpn.gateway.rules import ruleset

OWN = ["192.0.2.1", "2001:db8::1"]


def outward(*rules, port=4000, servers=("198.19.0.3",)):
    """The lines of the chain for packets to the outside."""
    text = ruleset(Policy(rules, OWN), servers, port)
    chain = text[text.index("chain outward {") :].split("\n    }\n")[0]
    return [line.strip() for line in chain.splitlines()[1:]]


def test_private_ranges_and_the_host_itself_are_dropped_before_everything_public_is_let_out():
    lines = outward()
    (drop,) = [number for number, line in enumerate(lines) if "10.0.0.0/8" in line]
    assert "192.0.2.1/32" in lines[drop]
    assert "2001" not in lines[drop]
    assert lines[drop].endswith("drop")
    assert lines.index("meta l4proto udp th dport 1-65535 accept") > drop
    assert lines.index("meta l4proto icmp accept") > drop


def test_the_name_service_is_let_out_first_and_nothing_else_to_slirp4netns_itself():
    assert outward()[:2] == [
        "ip daddr 198.19.0.3 meta l4proto { tcp, udp } th dport 53 accept",
        "ip daddr 198.19.0.0/24 drop",
    ]
    assert outward(servers=("10.0.0.53", "2001:db8::53"))[0].startswith("ip daddr 10.0.0.53 ")
    assert not any("2001" in line for line in outward(servers=("2001:db8::53",)))


def test_a_rule_for_a_private_network_opens_it_a_wide_one_does_not():
    lines = outward("10.1.0.0/16:88", "0.0.0.0/0")
    (drop,) = [number for number, line in enumerate(lines) if line.startswith("ip daddr { 0.0.0.0/8")]
    assert lines.index("ip daddr 10.1.0.0/16 meta l4proto udp th dport 88 accept") < drop
    assert lines.index("ip daddr 0.0.0.0/0 meta l4proto udp th dport 1-65535 accept") > drop
    assert "meta l4proto udp th dport 1-65535 accept" not in lines


@pytest.mark.parametrize("rule", ["*.cern.ch", "se.example.org:1094", "[2001:db8::]/32"])
def test_a_rule_that_names_hosts_lets_no_packets_out(rule):
    assert [line for line in outward(rule) if line.endswith("accept")] == outward()[:1]


def test_without_a_data_plane_tcp_goes_out_by_the_same_rules():
    text = ruleset(Policy((), OWN), ["198.19.0.3"], 0)
    assert "meta l4proto { tcp, udp } th dport 1-65535 accept" in text
    assert "dnat" not in text.replace("ct status dnat", "")
