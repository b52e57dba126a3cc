"""What only mode relay has to prove, between hosts that are namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_modes import TRAFFIC, WAN, serving

WAN6 = "2001:db8:1::1"


def accesses(site, file, count=1):
    """So many lines about a credential's connections: they are written when those end, and later."""
    path = site.directory / "home" / "hpcq-gateway" / "default" / "access.log"
    username = json.loads(Path(file).read_text())["username"]
    return [json.loads(line) for line in site.wait_for_line(path, username, count)]


class Inside:
    """Programs inside a relay's tunnel, each in one of its own."""

    def __init__(self, gateway):
        self.gateway = gateway
        self._made = 0

    def run(self, *argv, options=(), file=None):
        self._made += 1
        file = file or self.gateway.credential(f"inside-{self._made}")
        return self.gateway.vpn("node", "run", "--mode", "relay", "--credential", file, *options, "--", *argv)

    def __call__(self, *what, **more):
        """What ``traffic.py`` printed."""
        done = self.run(sys.executable, TRAFFIC, *what, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def python(self, script, *arguments):
        """Everything a script said, whatever its status."""
        done = self.run(sys.executable, "-W", "ignore", "-c", script, *arguments)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def inside(shared_gateway):
    with serving(shared_gateway):
        yield Inside(shared_gateway)


@pytest.mark.parametrize("size", ["0", "1", "1400", "60000"])
def test_udp(inside, size):
    inside("udp", WAN, size)


def test_udp_that_cannot_arrive_is_refused_as_by_the_kernel(inside):
    assert inside("udp-errno", WAN, "7001") == "ECONNREFUSED"
    assert inside("udp-errno", "192.0.2.1", "53") == "ECONNREFUSED"


@pytest.mark.parametrize(("host", "port"), [(WAN, "7001"), ("192.0.2.1", "22"), ("10.1.2.3", "80")])
def test_tcp_that_cannot_arrive_is_reset(shared_gateway, inside, host, port):
    file = shared_gateway.credential(f"to {host} {port}")
    assert inside("errno", host, port, file=file) in ("ECONNRESET", "EPIPE")
    (line,) = accesses(shared_gateway, file)
    assert (line["host"], line["port"]) == (host, int(port))
    assert line["outcome"].startswith("refused:" if host == WAN else "denied:")


def test_a_reset_of_the_far_end_is_a_reset(inside):
    script = "import socket, sys; s = socket.create_connection((sys.argv[1], 7000)); s.sendall(b'reset\\n'); s.recv(1)"
    assert "ConnectionResetError" in inside.python(script, WAN)


def test_the_log_says_who_where_and_how_much(shared_gateway, inside):
    file = shared_gateway.credential("known")
    inside("up", WAN, "1000000", file=file)
    (line,) = accesses(shared_gateway, file)
    assert line["client"] == json.loads(Path(file).read_text())["username"]
    assert (line["address"], line["port"], line["outcome"]) == (WAN, 7000, "ok")
    assert line["up"] == 1_000_003
    assert line["down"] == len("1000000 ") + 64


def test_names_by_tcp(inside):
    script = (
        "from dnslib import DNSRecord\n"
        "for tcp in (True, False):\n"
        "    answer = DNSRecord.question('web.example.org').send('198.18.0.1', tcp=tcp, timeout=90)\n"
        "    print(DNSRecord.parse(answer).rr[0].rdata)\n"
    )
    assert inside.python(script).split() == [WAN, WAN]


def test_networks_reached_directly(shared_gateway, inside):
    with shared_gateway.start("login", sys.executable, TRAFFIC, "serve", "192.0.2.1", stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        direct = ("--direct", "192.0.2.0/24,2001:db8:9::/64")
        inside("half-close", "192.0.2.1", options=direct)
        inside("udp", "192.0.2.1", "1000", options=direct)
        assert inside("udp-errno", "192.0.2.1", "7001", options=direct) == "ECONNREFUSED"
        inside("half-close", WAN, options=direct)
        for pid in shared_gateway.find("traffic.py serve 192.0.2.1"):
            os.kill(pid, signal.SIGKILL)
        server.wait(90)


@pytest.fixture
def six(site):
    """A site whose outside has IPv6."""
    site.check("wan", "ip", "addr", "add", f"{WAN6}/64", "dev", "eth0", "nodad")
    site.check("login", "ip", "addr", "add", "2001:db8:1::2/64", "dev", "to-wan", "nodad")
    site.check("login", "ip", "-6", "route", "add", "default", "via", WAN6)
    assert site.vpn("login", "gateway", "start").returncode == 0
    return site


def test_ipv6(six):
    with serving(six, WAN6, "0.0.0.0"):
        for number, what in enumerate((("up", WAN6, "1000000"), ("half-close", WAN6), ("udp", WAN6, "1000"))):
            file = str(six.directory / f"six{number}")
            assert six.vpn("login", "gateway", "credential", "--output", file).returncode == 0
            argv = ("run", "--mode", "relay", "--credential", file, "--", sys.executable, TRAFFIC, *what)
            done = six.vpn("node", *argv)
            assert done.returncode == 0, done.stderr


def test_an_allow_list(site):
    started = site.vpn("login", "gateway", "start", "--allow", "*.example.org:80", "--allow", "192.0.2.1:7000")
    assert started.returncode == 0, started.stderr
    with serving(site):
        for number, (what, statuses) in enumerate(
            (
                (f"curl -sf -o /dev/null http://{WAN}/", (7, 56)),  # curl may see the reset as its connection comes up
                ("curl -sf -o /dev/null http://web.example.org/", (0,)),
                (f"curl -sf -o /dev/null http://web.example.org/ && curl -sf -o /dev/null http://{WAN}/", (0,)),
                ("curl -sf -o /dev/null http://web.example.org:7000/", (7, 56)),
            )
        ):
            file = str(site.directory / f"c{number}")
            site.vpn("login", "gateway", "credential", "--output", file)
            done = site.vpn("node", "run", "--mode", "relay", "--credential", file, "--", "sh", "-c", what)
            assert done.returncode in statuses, (what, done.stderr)
            site.vpn("login", "gateway", "stop")  # what one pilot asked for is forgotten for the next
            site.vpn("login", "gateway", "start", "--allow", "*.example.org:80")


def test_a_bad_rule_is_refused_at_once(site):
    done = site.vpn("login", "gateway", "start", "--allow", "http://x/")
    assert done.returncode == 2
    assert "--allow" in done.stderr
    site.wait_empty()


def test_without_ocserv_the_relay_is_there_and_says_so(site):
    """PATH with nothing of openconnect's, as on a login node without the package."""
    script = (
        "import os, sys, vpn.programs as p\n"
        "real = p.shutil.which\n"
        "p.shutil.which = lambda name, path=None: None if name == 'ocserv' else real(name, path=path)\n"
        "from vpn.gateway.daemon import run_daemon\n"
        "from vpn.gateway.state import GatewayConfig\n"
        "run_daemon(GatewayConfig(), lambda record: print(record.refusal, flush=True))\n"
    )
    with site.start("login", sys.executable, "-c", script, stdout=subprocess.PIPE, text=True) as daemon:
        assert "ocserv was not found" in daemon.stdout.readline()
        status = site.check("login", sys.executable, "-m", "vpn", "gateway", "status")
        assert "openconnect is not offered: program: ocserv" in status
        file = str(site.directory / "c")
        assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
        done = site.vpn(
            "node", "run", "--mode", "relay", "--credential", file, "--require", f"http://{WAN}/", "--", "true"
        )
        assert done.returncode == 0, done.stderr
        site.vpn("login", "gateway", "credential", "--output", file)
        done = site.vpn("node", "run", "--credential", file, "--", "true")
        assert done.returncode == 5
        assert "does not offer openconnect" in done.stderr
        assert site.vpn("login", "gateway", "stop").returncode == 0
        assert daemon.wait(90) == 0
    site.wait_empty()


PARTS = {
    "vpn run": lambda site: site.find_vpn("run"),
    "data plane": lambda site: only(site, "vpn.relay.plane import main"),
    "holder": lambda site: min(site.find("vpn.holder import main")),
    "pid 1": lambda site: max(site.find("vpn.holder import main")),
    "keeper": lambda site: only(site, "vpn.keeper import main"),
}


def only(site, text):
    (pid,) = site.find(text)
    return pid


@pytest.mark.parametrize("part", PARTS)
def test_killing_a_part_leaves_nothing(gateway, credential, part):
    file = credential()
    before = set(gateway.extra())
    script = f"{sys.executable} {TRAFFIC} errno {WAN} 80 & setsid sleep 1000 & echo up; wait; sleep 1000"
    argv = ("run", "--mode", "relay", "--credential", file, "--", "sh", "-c", script)
    with gateway.start_vpn("node", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        known, gateway.known = gateway.known, gateway.known | dict.fromkeys(before, "")
        mine = list(gateway.extra())
        os.kill(PARTS[part](gateway), signal.SIGKILL)
        gateway.wait_gone(mine)
        gateway.known = known
        status, error = process.wait(90), process.stderr.read().decode()
    if part == "vpn run":
        assert status in (137, -9)
    else:
        assert (status, len(error.splitlines())) == (5, 1), error
    assert gateway.vpn("login", "gateway", "status").returncode == 0


def test_a_tunnel_whose_gateway_was_killed_waits_for_it_and_can_be_ended(gateway, credential):
    mine = list(gateway.extra())
    script = "echo up; exec sleep 1000"
    argv = ("run", "--mode", "relay", "--credential", credential(), "--", "sh", "-c", script)
    with gateway.start_vpn("node", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        os.kill(only(gateway, "gateway.daemon"), signal.SIGKILL)
        gateway.wait_gone(mine)
        os.kill(gateway.find_vpn("run"), signal.SIGTERM)  # it dials, for a minute; it must end all the same
        assert process.wait(90) == 143, process.stderr.read()
    gateway.wait_empty()


def test_stopping_the_gateway_in_order_tells_its_pilots(gateway, credential):
    script = "echo up; exec sleep 1000"
    argv = ("run", "--mode", "relay", "--credential", credential(), "--", "sh", "-c", script)
    with gateway.start_vpn("node", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        assert gateway.vpn("login", "gateway", "stop").returncode == 0
        assert process.wait(90) == 5
        assert "ended the session" in process.stderr.read().decode()
    gateway.wait_empty()


def test_a_revoked_pilot_is_cut_off(gateway, credential):
    file = credential()
    username = json.loads(Path(file).read_text())["username"]
    argv = ("run", "--mode", "relay", "--credential", file, "--", "sh", "-c", "echo up; exec sleep 1000")
    with gateway.start_vpn("node", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        assert username in gateway.vpn("login", "gateway", "status").stdout
        revoke = f"from vpn import GatewayClient; GatewayClient().revoke({username!r})"
        assert gateway.run("login", sys.executable, "-c", revoke).returncode == 0
        assert process.wait(90) == 5
        assert "ended the session" in process.stderr.read().decode()
    assert username not in gateway.vpn("login", "gateway", "status").stdout


def test_one_credential_is_one_login_whatever_the_mode(gateway, credential):
    first, second = credential("first"), credential("second")
    for file, modes in ((first, ("openconnect", "relay")), (second, ("relay", "openconnect"))):
        done = [gateway.vpn("node", "run", "--mode", mode, "--credential", file, "--", "true") for mode in modes]
        assert [each.returncode for each in done] == [0, 5], [each.stderr for each in done]
