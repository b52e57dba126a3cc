"""What every mode must do, the same for each: programs inside cannot tell which one carries them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAN = "203.0.113.1"
TRAFFIC = str(Path(__file__).with_name("traffic.py"))
BIG = {  # bytes: beyond every buffer and window; once as much as a file of an analysis
    ("openconnect", "up"): 100_000_000,
    ("openconnect", "down"): 1_000_000_000,
    ("relay", "up"): 100_000_000,
    ("relay", "down"): 1_000_000_000,
    ("socks", "up"): 100_000_000,
    ("socks", "down"): 100_000_000,
}

MODES = ["openconnect", "relay", "socks"]
pytestmark = pytest.mark.parametrize("mode", MODES)


class Outside:
    """A gateway's site, and programs run inside a tunnel to it."""

    def __init__(self, gateway):
        self.gateway = gateway
        self._made = 0

    def options(self, mode):
        self._made += 1
        return ["run", "--mode", mode, "--credential", self.gateway.credential(f"{mode}-{self._made}")]

    def run(self, mode, *argv, **more):
        return self.gateway.vpn("node", *self.options(mode), "--", *argv, **more)

    def start(self, mode, *argv, **more):
        return self.gateway.start_vpn("node", *self.options(mode), "--", *argv, **more)

    def traffic(self, mode, *what):
        done = self.run(mode, sys.executable, TRAFFIC, *what)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def outside(shared_gateway):
    with serving(shared_gateway):
        yield Outside(shared_gateway)


@contextlib.contextmanager
def serving(site, *addresses):
    with site.start("wan", sys.executable, TRAFFIC, "serve", *addresses, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        known = site.known
        site.known = known | site.extra()
        yield
        for pid in [pid for pid, line in site.processes().items() if "traffic.py serve" in line]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait(90)
        site.known = known


@pytest.mark.parametrize("way", ["up", "down"])
def test_tcp_both_ways(outside, mode, way):
    outside.traffic(mode, way, WAN, "3000000")


def test_half_close(outside, mode):
    outside.traffic(mode, "half-close", WAN)


def test_200_connections_at_once(outside, mode):
    outside.traffic(mode, "many", WAN, "200")


def test_names(outside, mode):
    assert outside.traffic(mode, "dns", "web.example.org").split() == [WAN]
    done = outside.run(mode, "getent", "hosts", "no-such-name.example.org")
    assert done.returncode == 2


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_big_transfer_arrives_as_it_was(outside, mode, way):
    outside.traffic(mode, way, WAN, str(BIG[mode, way]))


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_the_status_is_the_commands(outside, mode, script, status):
    assert outside.run(mode, "sh", "-c", script).returncode == status


def test_signals_reach_the_command(outside, mode):
    script = "trap 'echo got; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done"
    with outside.start(mode, "sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        os.kill(outside.gateway.find_vpn("run"), signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(90) == 3


def test_nothing_is_left(outside, mode):
    before = set(outside.gateway.extra())
    done = outside.run(mode, "sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 0")
    assert done.returncode == 0, done.stderr
    outside.gateway.wait_gone(set(outside.gateway.extra()) - before)


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
