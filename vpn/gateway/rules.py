"""The packet filter of the gateway's namespace, as text for nft(8). Pure.

TCP from tunnels goes to the data plane, which decides by the allow-list, and what is sent to the name servers pilots
are told of goes to the resolver there. The rest goes out through slirp4netns (``tap0``) by rules made from the same
allow-list: a rule that names hosts says nothing about packets, so with such rules only, nothing else passes.
Without a data plane everything goes out by such rules, the name service first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from vpn.gateway.addresses import CLIENTS, DNS_PORT, PLANE, UPLINK
from vpn.gateway.policy import Policy, Rule


def ruleset(policy: Policy, name_servers: Sequence[str], plane_port: int) -> str:
    """The whole filter; ``name_servers`` are IPv4, one at least; ``plane_port`` 0: no data plane."""
    asking = f"ip daddr {{ {', '.join(name_servers)} }} meta l4proto {{ tcp, udp }} th dport {DNS_PORT}"
    outward = [f"ip daddr {UPLINK} drop", *_packets(policy, everything=not plane_port)]
    divert: list[str] = []
    if plane_port:
        divert = [
            f'iifname "vpns*" {asking} dnat to {PLANE}:{DNS_PORT}',
            f'iifname "vpns*" ip daddr != {{ {CLIENTS}, {UPLINK} }} meta l4proto tcp dnat to {PLANE}:{plane_port}',
        ]
    else:
        outward.insert(0, f"{asking} accept")
    return f"""\
table ip gateway {{
    chain outward {{
{_lines(outward)}    }}
    chain forward {{
        type filter hook forward priority 0; policy drop;
        iifname "vpns*" oifname "tap0" jump outward
        iifname "tap0" oifname "vpns*" ct state established,related accept
    }}
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "vpns*" ct status dnat accept
        iifname "vpns*" ip protocol != icmp drop
    }}
    chain divert {{
        type nat hook prerouting priority -100; policy accept;
{_lines(divert)}    }}
    chain leave {{
        type nat hook postrouting priority 100; policy accept;
        iifname "vpns*" oifname "tap0" masquerade
    }}
}}
"""


def _lines(rules: Sequence[str]) -> str:
    return "".join(f"        {rule}\n" for rule in rules)


def _packets(policy: Policy, *, everything: bool) -> list[str]:
    """Verdicts on packets that are not the name service's; those who are not mentioned are dropped."""
    networks = [rule for rule in policy.rules if isinstance(rule.network, ipaddress.IPv4Network)]
    grounds = [ground for ground in policy.grounds if isinstance(ground, ipaddress.IPv4Network)]
    opening = [rule for rule in networks if any(_inside(rule, ground) for ground in grounds)]
    kept = [f"ip daddr {{ {', '.join(map(str, ipaddress.collapse_addresses(grounds)))} }} drop"]
    others = [rule for rule in policy.rules if rule not in opening and not rule.name and _is_four(rule)]
    protocols = "{ tcp, udp }" if everything else "udp"
    return [
        line
        for rules in (opening, None, others)
        for line in (kept if rules is None else [text for rule in rules for text in _accept(rule, protocols)])
    ]


def _inside(rule: Rule, ground: ipaddress.IPv4Network) -> bool:
    return isinstance(rule.network, ipaddress.IPv4Network) and rule.network.subnet_of(ground)


def _is_four(rule: Rule) -> bool:
    return rule.network is None or rule.network.version == 4


def _accept(rule: Rule, protocols: str) -> list[str]:
    where = f"ip daddr {rule.network} " if rule.network is not None else ""
    ports = f"{rule.low}-{rule.high}" if rule.high > rule.low else f"{rule.low}"
    return [f"{where}meta l4proto {protocols} th dport {ports} accept", f"{where}meta l4proto icmp accept"]
