"""The packet filter of the gateway's namespace, as text for nft(8). Pure.

TCP from tunnels goes to the data plane's listener, and what is sent to the name servers pilots are told of to the
resolver there. The rest is routed to the device that the data plane reads (``out0``): it decides on everything by the
allow-list. Of that no connections are tracked: whoever sends to ten thousand targets would fill a table that all need.

Without a data plane everything goes out through slirp4netns (``tap0``) by rules made from the same allow-list, the name
service first: a rule that names hosts says nothing about packets, so with such rules only, nothing else passes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from vpn.gateway.addresses import CLIENTS, DNS_PORT, OUT, PLANE, UPLINK
from vpn.gateway.policy import Policy, Rule


def ruleset(policy: Policy, name_servers: Sequence[str], plane_port: int) -> str:
    """The whole filter; ``name_servers`` are IPv4, one at least; ``plane_port`` 0: no data plane."""
    asking = f"ip daddr {{ {', '.join(name_servers)} }} meta l4proto {{ tcp, udp }} th dport {DNS_PORT}"
    return f"""\
table ip gateway {{
{_to_plane(asking, plane_port) if plane_port else _to_slirp(policy, asking)}\
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "vpns*" ct status dnat accept
        iifname "vpns*" ip protocol != icmp drop
    }}
}}
"""


def _to_plane(asking: str, port: int) -> str:
    return f"""\
    chain early {{
        type filter hook prerouting priority -300; policy accept;
        iifname "vpns*" {asking} accept
        iifname "vpns*" meta l4proto != {{ tcp, icmp }} notrack
        iifname "vpns*" icmp type echo-request notrack
        iifname "{OUT}" notrack
    }}
    chain divert {{
        type nat hook prerouting priority -100; policy accept;
        iifname "vpns*" {asking} dnat to {PLANE}:{DNS_PORT}
        iifname "vpns*" ip daddr != {{ {CLIENTS}, {UPLINK} }} meta l4proto tcp dnat to {PLANE}:{port}
    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname "vpns*" oifname "{OUT}" meta l4proto != tcp accept
        iifname "{OUT}" oifname "vpns*" accept
    }}
"""


def _to_slirp(policy: Policy, asking: str) -> str:
    outward = [f"{asking} accept", f"ip daddr {UPLINK} drop", *_packets(policy)]
    return f"""\
    chain outward {{
{_lines(outward)}    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname "vpns*" oifname "tap0" jump outward
        iifname "tap0" oifname "vpns*" ct state established,related accept
    }}
    chain leave {{
        type nat hook postrouting priority 100; policy accept;
        iifname "vpns*" oifname "tap0" masquerade
    }}
"""


def _lines(rules: Sequence[str]) -> str:
    return "".join(f"        {rule}\n" for rule in rules)


def _packets(policy: Policy) -> list[str]:
    """Verdicts on packets that are not the name service's; those who are not mentioned are dropped."""
    networks = [rule for rule in policy.rules if isinstance(rule.network, ipaddress.IPv4Network)]
    grounds = [ground for ground in policy.grounds if isinstance(ground, ipaddress.IPv4Network)]
    opening = [rule for rule in networks if any(_inside(rule, ground) for ground in grounds)]
    kept = [f"ip daddr {{ {', '.join(map(str, ipaddress.collapse_addresses(grounds)))} }} drop"]
    others = [rule for rule in policy.rules if rule not in opening and not rule.name and _is_four(rule)]
    return [
        line
        for rules in (opening, None, others)
        for line in (kept if rules is None else [text for rule in rules for text in _accept(rule)])
    ]


def _inside(rule: Rule, ground: ipaddress.IPv4Network) -> bool:
    return isinstance(rule.network, ipaddress.IPv4Network) and rule.network.subnet_of(ground)


def _is_four(rule: Rule) -> bool:
    return rule.network is None or rule.network.version == 4


def _accept(rule: Rule) -> list[str]:
    where = f"ip daddr {rule.network} " if rule.network is not None else ""
    ports = f"{rule.low}-{rule.high}" if rule.high > rule.low else f"{rule.low}"
    return [f"{where}meta l4proto {{ tcp, udp }} th dport {ports} accept", f"{where}meta l4proto icmp accept"]
