"""The fast path: pilots' TCP ends at the gateway and goes on from the host's side, watched and counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

WAN = "203.0.113.1"
GET = "import sys, urllib.request; print(len(urllib.request.urlopen(sys.argv[1], timeout=90).read()))"


def run(site, credential, *argv, options=(), **more):
    return site.vpn("node", "run", "--credential", credential, *options, "--", *argv, **more)


def get(site, credential, url, **more):
    return run(site, credential, sys.executable, "-c", GET, url, **more)


def username(file):
    return json.loads(Path(file).read_text())["username"]


def state(site):
    return site.directory / "home" / "hpcq-gateway" / "default"


def status(site):
    done = site.vpn("login", "gateway", "status", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def accesses(site, text, count=1):
    """The lines with a text in them, when there are as many: they are written when connections end, and later."""
    return [json.loads(line) for line in site.wait_for_line(state(site) / "access.log", text, count)]


def only(site, text):
    (pid,) = [pid for pid in site.find(text) if "nsenter" not in site.extra().get(pid, "nsenter")]
    return pid


def start_waiting(site, file, script="echo up; read line"):
    process = site.start_vpn(
        "node", "run", "--credential", file, "--", "sh", "-c", script,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"up\n", process.stderr.read()
    return process


def test_connections_are_counted_and_logged_by_their_pilot(gateway, credential):
    files = [credential("a"), credential("b")]
    for file in files:
        done = get(gateway, file, f"http://{WAN}/3000000")
        assert (done.returncode, done.stdout) == (0, "3000000\n"), done.stderr
    pilots = {pilot["username"]: pilot for pilot in status(gateway)["pilots"]}
    for file in files:
        pilot = pilots[username(file)]
        assert 3_000_000 < pilot["down"] < 3_010_000
        assert 0 < pilot["up"] < 10_000
        (line,) = accesses(gateway, username(file))
        assert (line["host"], line["port"], line["outcome"]) == (WAN, 80, "ok")
        assert line["down"] == pilot["down"]


@pytest.mark.parametrize("address", ["203.0.113.2", "192.0.2.1", "10.1.2.3"])
def test_the_gateways_own_host_and_private_addresses_are_denied(gateway, credential, address):
    file = credential()
    done = get(gateway, file, f"http://{address}:22/")
    assert done.returncode == 1
    assert "ConnectionResetError" in done.stderr
    (line,) = accesses(gateway, username(file))
    assert line["outcome"].startswith("denied: ")


@pytest.mark.parametrize("target", ["http://10.1.2.3/", "root://10.1.2.3:1094"])
def test_the_ready_gate_says_that_the_gateway_may_not_allow_it(gateway, credential, target):
    done = gateway.vpn("node", "run", "--credential", credential(), "--require", target, "--", "true")
    assert done.returncode == 5
    assert "connection reset: by the server, or by a gateway that cannot reach it or does not allow it" in done.stderr


def test_packets_keep_to_the_allow_list_as_well(site):
    """UDP goes another way than TCP, by a device, to the same rules."""
    assert site.vpn("login", "gateway", "start", "--allow", f"{WAN}:80").returncode == 0
    script = f"""
import socket, sys
def asks(port):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.settimeout(1)
    question = bytes.fromhex("12340100000100000000000003776562076578616d706c65036f72670000010001")
    for _ in range(int(sys.argv[1])):
        sock.sendto(question, ("{WAN}", port))
        try:
            return bool(sock.recv(512))
        except TimeoutError:
            pass
    return False
import urllib.request
print(asks(53), len(urllib.request.urlopen("http://{WAN}/10", timeout=90).read()))
"""
    file = str(site.directory / "credential")
    assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
    done = run(site, file, sys.executable, "-c", script, "1")
    assert done.stdout == "False 10\n", done.stderr
    assert site.vpn("login", "gateway", "stop").returncode == 0
    assert site.vpn("login", "gateway", "start").returncode == 0
    assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
    assert run(site, file, sys.executable, "-c", script, "90").stdout == "True 10\n"


def test_a_rule_may_name_a_host(site):
    rule = "web.example.org:80"
    assert site.vpn("login", "gateway", "start", "--allow", rule).returncode == 0
    file = str(site.directory / "credential")
    assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
    done = get(site, file, "http://web.example.org/1000")
    assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr
    (line,) = accesses(site, username(file))
    assert (line["host"], line["outcome"]) == (WAN, "ok")


ASKS = """
import socket, urllib.request
question = bytes.fromhex("12340100000100000000000003776562076578616d706c65036f72670000010001")
server = [line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver")][0]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(90)
    sock.sendto(question, (server, 53))
    answer, where = sock.recvfrom(512)
    assert where == (server, 53), where
with socket.create_connection((server, 53), timeout=90) as sock, sock.makefile("rb") as file:
    sock.sendall(len(question).to_bytes(2, "big") + question)
    assert file.read(int.from_bytes(file.read(2), "big"))[12:] == answer[12:]
print(len(urllib.request.urlopen("http://web.example.org/1000", timeout=90).read()))
try:
    urllib.request.urlopen("http://web.example.org:8080/", timeout=90)
except OSError as error:
    print(type(getattr(error, "reason", error)).__name__)  # in the middle of the request it is an URLError
"""


@pytest.mark.parametrize("options", [(), ("--dns", WAN)])
def test_a_rule_may_name_a_domain_in_both_modes(site, options):
    """Its names are known once a pilot has asked for them, by UDP or TCP: both modes ask the same resolver."""
    assert site.vpn("login", "gateway", "start", "--allow", "*.example.org:80", *options).returncode == 0
    for mode in ("openconnect", "relay"):
        file = str(site.directory / mode)
        assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
        done = run(site, file, sys.executable, "-c", ASKS, options=("--mode", mode))
        assert (done.returncode, done.stdout) == (0, "1000\nConnectionResetError\n"), done.stderr
        ok, denied = sorted(accesses(site, username(file), 2), key=lambda line: line["port"])
        assert (ok["host"], ok["port"], ok["outcome"]) == (WAN, 80, "ok")
        assert "8080 is not on the gateway's allow-list" in denied["outcome"]


TIMED = f"""
import time, urllib.request
print("up", flush=True)
input()
began = time.monotonic()
assert len(urllib.request.urlopen("http://{WAN}/10000000", timeout=90).read()) == 10_000_000
print(began, time.monotonic())
"""


def timed_at_once(site, *limit):
    """A client of each mode reads as much, at once; when each began and ended."""
    assert site.vpn("login", "gateway", "start", *limit).returncode == 0
    processes = []
    for mode in ("openconnect", "relay"):
        file = str(site.directory / mode)
        assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
        command = ["run", "--mode", mode, "--credential", file, "--", sys.executable, "-c", TIMED]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(site.start_vpn("node", *command, **streams))
        assert processes[-1].stdout.readline() == "up\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    times = []
    for process in processes:
        with process:
            times.append([float(word) for word in process.stdout.readline().split()])
            assert process.wait(90) == 0
    return times


BURST = 0.05  # seconds of a rate


def test_the_limit_is_of_both_modes_together(site):
    rate = 10_000_000  # bytes a second
    times = timed_at_once(site, "--limit", str(rate * 8 / 1e6))
    assert max(map(max, times)) - min(map(min, times)) > 2 - BURST


def test_the_limit_per_pilot_is_of_each_alone(site):
    rate = 5_000_000
    for began, ended in timed_at_once(site, "--limit-per-pilot", str(rate * 8 / 1e6)):
        assert ended - began > 2 - BURST


def test_a_killed_data_plane_is_replaced_and_the_tunnel_stays(gateway, credential):
    script = f"""
import socket, sys, urllib.request
slow = socket.create_connection(("{WAN}", 80))
slow.sendall(b"GET /1000000000 HTTP/1.0\\r\\n\\r\\n")
assert slow.recv(1)
print("up", flush=True)
sys.stdin.readline()
try:
    while slow.recv(1 << 20):
        pass
except ConnectionResetError:
    print("reset", flush=True)
print(len(urllib.request.urlopen("http://{WAN}/1000", timeout=90).read()))
"""
    file = credential()
    process = gateway.start_vpn(
        "node", "run", "--credential", file, "--", sys.executable, "-c", script,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == b"up\n", process.stderr.read()
        victim = only(gateway, "vpn.gateway.plane import main")
        os.kill(victim, signal.SIGKILL)
        gateway.wait_gone([victim])
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.read() == b"reset\n1000\n"
        assert process.wait(90) == 0, process.stderr.read()
    assert [line["host"] for line in accesses(gateway, username(file))] == [WAN]


def test_with_a_data_plane_that_will_not_stay_the_server_is_started_anew(gateway, credential):
    for _ in range(6):
        victim = only(gateway, "vpn.gateway.plane import main")
        os.kill(victim, signal.SIGKILL)
        gateway.wait_gone([victim])
        status_of = gateway.vpn("login", "gateway", "status")  # it answers when it has noticed
    assert status_of.returncode == 0
    gateway.wait_for_line(state(gateway) / "log", "openconnect's server is running again")
    assert "the data plane ended 6 times" in (state(gateway) / "log").read_text()
    assert run(gateway, credential(), "true").returncode == 0


def test_a_session_lives_through_a_gateway_that_is_killed_and_started_again(gateway, credential):
    mine = list(gateway.extra())
    process = start_waiting(gateway, credential(), f"echo up; read line; exec curl -sS --max-time 60 http://{WAN}/1000")
    with process:
        os.kill(only(gateway, "vpn.gateway.daemon import main"), signal.SIGKILL)
        gateway.wait_gone(mine)
        assert gateway.vpn("login", "gateway", "start").returncode == 0
        gateway.wait_for_line(state(gateway) / "log", " connect ")
        output, error = process.communicate(b"go\n", timeout=90)
        assert (process.returncode, len(output)) == (0, 1000), error


def test_a_gateway_that_is_stopped_and_started_keeps_port_and_credentials(gateway, credential):
    unused, spent, revoked = credential("unused"), credential("spent"), credential("revoked")
    port, relay_port = status(gateway)["port"], status(gateway)["relay_port"]
    script = f"from vpn import GatewayClient; GatewayClient().revoke({username(revoked)!r})"
    assert gateway.run("login", sys.executable, "-c", script).returncode == 0
    process = start_waiting(gateway, spent)
    with process:
        assert gateway.vpn("login", "gateway", "stop").returncode == 0
        assert process.wait(90) == 5
        modes = {path.name: path.stat().st_mode & 0o777 for path in state(gateway).iterdir()}
        assert modes["credentials.json"] == 0o600
        started = gateway.vpn("login", "gateway", "start")
        assert started.returncode == 0, started.stderr
    assert (status(gateway)["port"], status(gateway)["relay_port"]) == (port, relay_port)
    states = {pilot["username"]: pilot["state"] for pilot in status(gateway)["pilots"]}
    assert states == {username(unused): "issued", username(spent): "restored"}
    for file in (unused, spent):
        done = run(gateway, file, "true")
        assert done.returncode == 0, done.stderr
        assert run(gateway, file, "true").returncode == 5  # good for one login
    assert run(gateway, revoked, "true").returncode == 5


def test_credentials_survive_a_damaged_file(gateway, credential):
    credential()
    assert gateway.vpn("login", "gateway", "stop").returncode == 0
    (state(gateway) / "credentials.json").write_bytes(b"\0" * 1000)
    assert gateway.vpn("login", "gateway", "start").returncode == 0
    assert status(gateway)["pilots"] == []
    assert run(gateway, credential("new"), "true").returncode == 0


def test_the_prototypes_recipe(site):
    assert site.vpn("login", "gateway", "start", "--uplink", "prototype").returncode == 0
    file = str(site.directory / "credential")
    assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
    done = run(site, file, sys.executable, "-c", GET, f"http://{WAN}/100000", options=("-v", "--mode", "prototype"))
    assert (done.returncode, done.stdout) == (0, "100000\n"), done.stderr
    assert ": TLS (" in done.stderr
    mtu = int(done.stderr.partition("MTU ")[2].partition(",")[0])
    assert 1400 < mtu <= 1472
