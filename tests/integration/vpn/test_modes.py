"""What every mode must do, the same for each: programs inside cannot tell which one carries them.

A second tunnel inside a batch job is tried where there are batch jobs: ``tests/site/test_tunnels_in_jobs.py``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAN = "203.0.113.1"
NEAR, NEAR6 = "192.0.2.1", "2001:db8:9::1"
TRAFFIC = str(Path(__file__).with_name("traffic.py"))
WAYS = {
    "openconnect": ["--mode", "openconnect"],
    "relay": ["--mode", "relay"],
    "relay without TLS": ["--mode", "relay", "--no-tls"],
    "socks": ["--mode", "socks"],
    "slirp": ["--mode", "slirp"],
    "auto": ["--mode", "auto"],
    "prototype": ["--mode", "prototype"],
}
WITHOUT_GATEWAY = ("slirp",)
GATEWAYS = {"prototype": "prototype"}
BIG = {  # bytes (up, down): beyond every buffer and window, and one way as much as a file of an analysis
    "openconnect": (100_000_000, 1_000_000_000),
    "relay": (1_000_000_000, 100_000_000),
    "relay without TLS": (100_000_000, 1_000_000_000),
    "socks": (1_000_000_000, 100_000_000),
    "slirp": (100_000_000, 1_000_000_000),
    "auto": (100_000_000, 100_000_000),  # which is relay here
    "prototype": (20_000_000, 20_000_000),
}

carries = pytest.mark.parametrize("mode", WAYS)
runs = pytest.mark.parametrize("mode", [name for name in WAYS if " " not in name])


class Outside:
    """A gateway's site, and programs run inside a tunnel to it."""

    def __init__(self, gateway):
        self.gateway = gateway
        self._made = 0

    def options(self, mode, *more):
        if mode in WITHOUT_GATEWAY:
            return ["run", *WAYS[mode], *more]
        self._made += 1
        credential = self.gateway.credential(f"{self._made}.json", gateway=GATEWAYS.get(mode, "default"))
        return ["run", *WAYS[mode], "--credential", credential, *more]

    def run(self, mode, *argv, options=(), **more):
        return self.gateway.vpn("node", *self.options(mode, *options), "--", *argv, **more)

    def start(self, mode, *argv, **more):
        return self.gateway.start_vpn("node", *self.options(mode), "--", *argv, **more)

    def traffic(self, mode, *what, options=()):
        """Kinds of traffic one after the other in one tunnel; what they print."""
        lines = [shlex.join([sys.executable, TRAFFIC, *each]) for each in what]
        done = self.run(mode, "sh", "-ec", "\n".join(lines), options=options)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def everywhere(shared_gateway):
    shared_gateway.start_gateway("--name", "prototype", "--uplink", "prototype")
    with serving(shared_gateway):
        yield Outside(shared_gateway)


@pytest.fixture
def outside(everywhere, mode):
    """The site, whose node has a way out of its own for the modes that are made over one."""
    if mode not in WITHOUT_GATEWAY:
        yield everywhere
        return
    site, route = everywhere.gateway, ["default", "via", "192.0.2.1"]
    site.check("login", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    site.check("wan", "ip", "route", "replace", "192.0.2.0/24", "via", "203.0.113.2")
    site.check("node", "ip", "route", "add", *route)
    yield everywhere
    site.check("node", "ip", "route", "del", *route)


@contextlib.contextmanager
def serving(site, *addresses, host="wan"):
    with site.start(host, sys.executable, TRAFFIC, "serve", *addresses, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        known = site.known
        site.known = known | site.extra()
        yield
        for pid in [
            pid for pid, line in site.processes().items() if " ".join(["traffic.py serve", *addresses]) in line
        ]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait(90)
        site.known = known


@carries
def test_tcp_both_ways_half_close_and_200_connections_at_once(outside, mode):
    outside.traffic(mode, ("up", WAN, "3000000"), ("down", WAN, "3000000"), ("half-close", WAN), ("many", WAN, "200"))


@pytest.fixture(scope="module")
def near(everywhere):
    """What is on the node's own network, by IPv4 and IPv6, where no gateway leads."""
    site = everywhere.gateway
    site.check("login", "ip", "addr", "add", f"{NEAR6}/64", "dev", "to-node", "nodad")
    site.check("node", "ip", "addr", "add", "2001:db8:9::11/64", "dev", "eth0", "nodad")
    with serving(site, NEAR, NEAR6, host="login"):
        yield


@carries
def test_direct_networks_are_reached_from_the_node_itself(outside, near, mode):
    direct = [
        "--direct",
        "192.0.2.0/24,2001:db8:9::/64",
        "--direct",
        "198.18.0.0/15",
    ]  # where gateways' name servers are
    what = [("half-close", NEAR), ("half-close", WAN), ("up", NEAR, "3000000"), ("dns", "web.example.org")]
    if mode != "slirp":  # this node has no default route for IPv6, so slirp has none at all
        what += [("half-close", NEAR6)]
    if mode != "socks":
        what += [("udp", NEAR, "1000"), ("udp", WAN, "1000")]
    outside.traffic(mode, *what, options=direct)


@pytest.mark.parametrize("mode", ["openconnect"])
def test_what_carries_direct_networks_is_a_part_of_the_tunnel(outside, mode):
    options = outside.options(mode, "--direct", "192.0.2.0/24")
    before = set(outside.gateway.find("vpn.relay.plane import main"))  # of the test before, ending
    argv = (*options, "--", "sh", "-c", "echo up; exec sleep 1000")
    with outside.gateway.start_vpn("node", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        (plane,) = set(outside.gateway.find("vpn.relay.plane import main")) - before
        os.kill(plane, signal.SIGKILL)
        assert process.wait(90) == 5
        assert b"ended with signal 9" in process.stderr.read()


@runs
def test_names(outside, mode):
    script = f"{shlex.join([sys.executable, TRAFFIC])} dns web.example.org; getent hosts no-such-name.example.org"
    done = outside.run(mode, "sh", "-c", script)
    assert (done.returncode, done.stdout.split()) == (2, [WAN]), done.stderr


@carries
def test_a_big_transfer_arrives_as_it_was(outside, mode):
    up, down = BIG[mode]
    outside.traffic(mode, ("up", WAN, str(up)), ("down", WAN, str(down)))


@runs
def test_the_status_is_the_commands(outside, mode):
    for script, status in (("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)):
        assert outside.run(mode, "sh", "-c", script).returncode == status


@runs
def test_signals_reach_the_command(outside, mode):
    script = "trap 'echo got; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done"
    with outside.start(mode, "sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        os.kill(outside.gateway.find_vpn("run"), signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(60) == 3


@runs
def test_nothing_is_left(outside, mode):
    before = set(outside.gateway.extra())
    done = outside.run(mode, "sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 0")
    assert done.returncode == 0, done.stderr
    outside.gateway.wait_gone(set(outside.gateway.extra()) - before)


@runs
def test_two_on_one_node(outside, mode):
    script = 'echo up; read line; exec "$@"'
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    argv = ("sh", "-c", script, "-", sys.executable, TRAFFIC, "up", WAN, "1000000")
    with outside.start(mode, *argv, **options) as one, outside.start(mode, *argv, **options) as other:
        for process in (one, other):
            assert process.stdout.readline() == b"up\n"
        for process in (one, other):
            process.stdin.write(b"\n")
            process.stdin.flush()
        assert [one.wait(90), other.wait(90)] == [0, 0]
