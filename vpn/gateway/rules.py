"""The packet filter of the gateway's namespace, as text for nft(8). Pure.

TCP from tunnels goes to the data plane, which decides by the allow-list. What is not TCP goes out through
slirp4netns (``tap0``) by rules made from the same allow-list: a rule that names hosts says nothing about packets,
so with such rules only, nothing but TCP and the name service passes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

from vpn.gateway.addresses import CLIENTS, PLANE, UPLINK
from vpn.gateway.policy import Policy, Rule


def ruleset(policy: Policy, name_servers: Sequence[str], plane_port: int) -> str:
    """The whole filter; ``plane_port`` 0: no data plane, everything goes out through slirp4netns."""
    servers = "".join(f"        ip daddr {server} meta l4proto {{ tcp, udp }} th dport 53 accept\n" for server in
                      name_servers if ":" not in server)  # fmt: skip
    others = "".join(f"        {line}\n" for line in _packets(policy, everything=not plane_port))
    divert = (
        f'        iifname "vpns*" ip daddr != {{ {CLIENTS}, {UPLINK}{_also(name_servers)} }} '
        f"meta l4proto tcp dnat to {PLANE}:{plane_port}\n"
        if plane_port
        else ""
    )
    return f"""\
table ip gateway {{
    chain outward {{
{servers}        ip daddr {UPLINK} drop
{others}    }}
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
{divert}    }}
    chain leave {{
        type nat hook postrouting priority 100; policy accept;
        iifname "vpns*" oifname "tap0" masquerade
    }}
}}
"""


def _also(name_servers: Iterable[str]) -> str:
    return "".join(f", {server}" for server in name_servers if ":" not in server)


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
