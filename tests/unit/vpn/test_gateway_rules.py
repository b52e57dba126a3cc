"""The packet filter's text: what it lets out besides TCP, by the allow-list."""

from __future__ import annotations

import pytest

from vpn.gateway.policy import Policy
from vpn.gateway.rules import ruleset

OWN = ["192.0.2.1", "2001:db8::1"]


def text_of(*rules, port=4000, servers=("198.19.0.3",)):
    return ruleset(Policy(rules, OWN), servers, port)


def outward(*rules):
    """The lines of the chain for packets to the outside, without a data plane."""
    text = text_of(*rules, port=0)
    chain = text[text.index("chain outward {") :].split("\n    }\n")[0]
    return [line.strip() for line in chain.splitlines()[1:]]


def test_private_ranges_and_the_host_itself_are_dropped_before_everything_public_is_let_out():
    lines = outward()
    (drop,) = [number for number, line in enumerate(lines) if "10.0.0.0/8" in line]
    assert "192.0.2.1/32" in lines[drop]
    assert "2001" not in lines[drop]
    assert lines[drop].endswith("drop")
    assert lines.index("meta l4proto { tcp, udp } th dport 1-65535 accept") > drop
    assert lines.index("meta l4proto icmp accept") > drop


def test_nothing_is_let_out_to_slirp4netns_itself_but_the_name_service():
    assert outward()[:2] == [
        "ip daddr { 198.19.0.3 } meta l4proto { tcp, udp } th dport 53 accept",
        "ip daddr 198.19.0.0/24 drop",
    ]


def test_the_name_service_goes_to_the_resolver_before_other_tcp_goes_to_the_data_plane():
    text = text_of(servers=["10.0.0.53", "10.0.0.54"])
    asking, rest = [line.strip() for line in text.splitlines() if " dnat to " in line]
    assert asking.endswith(
        "ip daddr { 10.0.0.53, 10.0.0.54 } meta l4proto { tcp, udp } th dport 53 dnat to 198.19.1.1:53"
    )
    assert rest.endswith("meta l4proto tcp dnat to 198.19.1.1:4000")
    assert "10.0.0.53" not in rest


def test_the_data_plane_has_the_rest_whatever_the_rules_and_nobody_else_has_anything():
    lines = [line.strip() for line in text_of("10.1.0.0/16:88").splitlines()]
    forward = lines[lines.index("chain forward {") + 1 :][:3]
    assert forward == [
        "type filter hook forward priority 0; policy drop;",
        'iifname "vpns*" oifname "out0" meta l4proto != tcp accept',
        'iifname "out0" oifname "vpns*" accept',
    ]
    assert text_of("10.1.0.0/16:88") == text_of()
    assert "tap0" not in text_of()


def test_connections_of_the_name_service_are_tracked_before_the_rest_is_not():
    lines = [line for line in text_of().splitlines() if line.endswith((" accept", " notrack"))]
    assert "th dport 53 accept" in lines[0]
    assert lines[1].endswith("meta l4proto != { tcp, icmp } notrack")


def test_a_rule_for_a_private_network_opens_it_a_wide_one_does_not():
    lines = outward("10.1.0.0/16:88", "0.0.0.0/0")
    (drop,) = [number for number, line in enumerate(lines) if line.startswith("ip daddr { 0.0.0.0/8")]
    assert lines.index("ip daddr 10.1.0.0/16 meta l4proto { tcp, udp } th dport 88 accept") < drop
    assert lines.index("ip daddr 0.0.0.0/0 meta l4proto { tcp, udp } th dport 1-65535 accept") > drop
    assert "meta l4proto { tcp, udp } th dport 1-65535 accept" not in lines


@pytest.mark.parametrize("rule", ["*.cern.ch", "se.example.org:1094", "[2001:db8::]/32"])
def test_a_rule_that_names_hosts_lets_no_packets_out(rule):
    assert [line for line in outward(rule) if line.endswith("accept")] == outward(rule)[:1]


def test_without_a_data_plane_tcp_goes_out_by_the_same_rules():
    assert "dnat" not in text_of(port=0).replace("ct status dnat", "")
