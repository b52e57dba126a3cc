"""What is not TCP in mode openconnect: carried by the gateway's data plane, decided on, limited, counted and logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAN = "203.0.113.1"
TRAFFIC = str(Path(__file__).with_name("traffic.py"))
PORT = 7000
PING_RANGE = "/proc/sys/net/ipv4/ping_group_range"


@pytest.fixture(scope="module")
def far(shared_gateway):
    """Echo servers outside, for the whole module; ping is allowed to the gateway's group."""
    process = shared_gateway._hold([*shared_gateway.enter("wan"), sys.executable, TRAFFIC, "serve", WAN])
    shared_gateway.children.append(process)
    shared_gateway.known = {**shared_gateway.known, **{pid: "" for pid in shared_gateway.find(TRAFFIC)}}
    shared_gateway.check("login", "sh", "-c", f"echo 0 0 > {PING_RANGE}")
    return shared_gateway


def run(site, name, *argv, options=()):
    file = site.credential(name)
    done = site.vpn("node", "run", "--mode", "openconnect", "--credential", file, *options, "--", *argv)
    return done, json.loads(Path(file).read_text())["username"]


def state(site):
    return site.directory / "home" / "hpcq-gateway" / "default"


def accesses(site, text, count=1):
    return [json.loads(line) for line in site.wait_for_line(state(site) / "access.log", text, count)]


def figures(site, username):
    report = json.loads(site.check("login", sys.executable, "-m", "vpn", "gateway", "status", "--json"))
    (pilot,) = [pilot for pilot in report["pilots"] if pilot["username"] == username]
    return pilot


def revoke(site, username):
    """After which what it had open is closed, and logged."""
    site.check("login", sys.executable, "-c", f"from vpn import GatewayClient; GatewayClient().revoke({username!r})")


@pytest.mark.parametrize("options", [(), ("--dtls",), ("--mtu", "1400")])
def test_datagrams_of_every_size_go_both_ways(far, options):
    """Larger ones than the tunnel takes in fragments, both ways; each target of a port has a line, bytes are counted."""
    sizes = [1, 1472, 30_000, 65_507]
    script = f'for size in {" ".join(map(str, sizes))}; do {sys.executable} {TRAFFIC} udp {WAN} $size || exit; done'
    done, username = run(far, f"sizes {options}", "sh", "-c", script, options=options)
    assert done.returncode == 0, done.stderr
    pilot = figures(far, username)
    revoke(far, username)
    lines = accesses(far, username, len(sizes))
    for line, size in zip(sorted(lines, key=lambda line: line["down"]), sizes, strict=True):
        assert (line["host"], line["port"], line["protocol"], line["address"]) == (WAN, PORT, "udp", WAN)
        assert (line["outcome"], line["up"], line["down"]) == ("ok", 5 * size, 5 * size)
    assert pilot["up"] == pilot["down"] == 5 * sum(sizes)
