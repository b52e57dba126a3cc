"""What is not TCP in mode openconnect: carried by the gateway's data plane, decided on, limited, counted and logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vpn.relay.bucket import QUANTUM

WAN = "203.0.113.1"
TRAFFIC = str(Path(__file__).with_name("traffic.py"))
PORT = 7000
PING_RANGE = "/proc/sys/net/ipv4/ping_group_range"


@pytest.fixture(scope="module")
def far(shared_gateway):
    """Echo servers outside, for the whole module; ping is allowed to the gateway's group."""
    process = shared_gateway._hold([*shared_gateway.enter("wan"), sys.executable, TRAFFIC, "serve", WAN])
    shared_gateway.children.append(process)
    shared_gateway.known = {**shared_gateway.known, **dict.fromkeys(shared_gateway.find(TRAFFIC), "")}
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
    """Larger ones than the tunnel takes in fragments; each target of a port has a line, its bytes are counted."""
    sizes = [1, 1472, 30_000, 65_507]
    script = f"for size in {' '.join(map(str, sizes))}; do {sys.executable} {TRAFFIC} udp {WAN} $size || exit; done"
    done, username = run(far, f"sizes {options}", "sh", "-c", script, options=options)
    assert done.returncode == 0, done.stderr
    pilot = figures(far, username)
    revoke(far, username)
    lines = accesses(far, username, len(sizes))
    for line, size in zip(sorted(lines, key=lambda line: line["down"]), sizes, strict=True):
        assert (line["host"], line["port"], line["protocol"], line["address"]) == (WAN, PORT, "udp", WAN)
        assert (line["outcome"], line["up"], line["down"]) == ("ok", 5 * size, 5 * size)
    assert pilot["up"] == pilot["down"] == 5 * sum(sizes)


def test_what_is_refused_is_refused_at_once_and_says_so(far):
    """As the kernel and mode relay do: by the gateway's rules, and by the target itself."""
    script = " && ".join(
        f"{sys.executable} {TRAFFIC} udp-errno {host} {port}" for host, port in ((WAN, 7001), ("10.1.2.3", 53))
    )
    done, username = run(far, "refused", "sh", "-c", script)
    assert done.stdout.split() == ["ECONNREFUSED", "ECONNREFUSED"], done.stderr
    revoke(far, username)
    lines = accesses(far, username, 2)
    outcomes = {line["host"]: line["outcome"] for line in lines}
    assert outcomes[WAN] == "ok"
    assert outcomes["10.1.2.3"].startswith("denied: 10.1.2.3 is a private address")


def test_ping_goes_through_where_the_gateways_host_lets_its_users_ping(far):
    script = f"ping -n -c 3 -s 20000 {WAN}; ping -n -c 1 -w 60 10.1.2.3"
    done, username = run(far, "ping", "sh", "-c", script)
    assert done.stdout.count(f"20008 bytes from {WAN}: icmp_seq=") == 3, done.stdout + done.stderr
    assert "Packet filtered" in done.stdout
    pilot = figures(far, username)
    assert pilot["up"] == pilot["down"] == 3 * 20008
    revoke(far, username)
    lines = accesses(far, username, 2)
    assert {(line["host"], line["protocol"], line["port"]) for line in lines} == {
        (WAN, "icmp", 0), ("10.1.2.3", "icmp", 0),
    }  # fmt: skip


def test_ping_is_refused_at_once_where_it_does_not(gateway):
    done, username = run(gateway, "no ping", "ping", "-n", "-c", "1", "-w", "60", WAN)
    assert "Packet filtered" in done.stdout
    (line,) = accesses(gateway, username)
    assert "net.ipv4.ping_group_range" in line["outcome"]


RAW = f"""
import socket, struct, sys
sys.path[:0] = [{str(Path(__file__).resolve().parents[3])!r}]
from vpn.relay.packets import Endpoint, build
mine, forged = (socket.inet_aton(address) for address in sys.argv[1:])
wan = Endpoint(socket.inet_aton("{WAN}"), {PORT})
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
    def send(packet):
        sock.sendto(packet, ("{WAN}", 0))
    for source in (forged, socket.inet_aton("198.19.1.1"), socket.inet_aton("192.0.2.11")):
        send(build(Endpoint(source, 5), wan, b"forged"))
    good = build(Endpoint(mine, 6), wan, b"x" * 100)
    send(good[:6] + b"\\x20\\0" + good[8:])  # a fragment without an end
    send(good[:6] + b"\\0\\7" + good[8:])  # … without a beginning
    send(good[:24] + b"\\xff\\xff" + good[26:])  # a length that is not true
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 132) as other:
        other.settimeout(60)
        other.connect(("{WAN}", 0))
        other.send(b"no sctp at all")
        try:
            other.recv(100)
        except OSError as error:
            print(error.strerror)
"""


def inside(site, process, *argv):
    """As root of a session's namespace, which its programs are not."""
    pid = only(site, process)
    enter = ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]
    done = subprocess.run([*enter, *argv], env=site.env(), text=True, capture_output=True, check=False, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def only(site, text):
    (pid,) = [pid for pid in site.find(text) if site.extra().get(pid, "").startswith(text)]
    return pid


def waiting(site, name):
    """A session that waits for two lines; itself, and the address and user it has."""
    file = site.credential(name)
    echo = f"{sys.executable} {TRAFFIC} udp {WAN} 1000"
    process = site.start_vpn(
        "node", "run", "--mode", "openconnect", "--credential", file, "--", "sh", "-c",
        f": {name}; ip -4 -o addr show tun0; read line; {echo}; echo done; read line; true",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address = process.stdout.readline().split()[3].partition("/")[0]
    return process, address, json.loads(Path(file).read_text())["username"]


def goes_on(process):
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n", process.stderr.read()


def test_nobody_sends_as_another_and_malformed_packets_harm_nobody(far):
    first, mine, username = waiting(far, "forger")
    second, others, other = waiting(far, "victim")
    with first, second:
        assert inside(far, "sh -c : forger", sys.executable, "-c", RAW, mine, others) == "No route to host\n"
        goes_on(first)  # what came before has passed now
        assert figures(far, other)["up"] == 0
        goes_on(second)
        assert figures(far, other)["up"] == figures(far, username)["up"] == 5000
        for process in (first, second):
            process.stdin.close()
            assert process.wait(90) == 0, process.stderr.read()


def test_a_killed_data_plane_is_replaced_and_datagrams_go_on(far):
    process, _, username = waiting(far, "survivor")
    with process:
        (victim,) = [
            pid for pid in far.find("vpn.gateway.plane import main") if "nsenter" not in far.extra().get(pid, "nsenter")
        ]
        os.kill(victim, signal.SIGKILL)
        far.wait_gone([victim])
        goes_on(process)
        process.stdin.close()
        assert process.wait(90) == 0, process.stderr.read()
    assert figures(far, username)["down"] == 5000


FLOODS = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for _ in range(2000):
        sock.sendto(bytes(1000), ("{WAN}", {PORT}))
"""


def test_the_limit_is_of_datagrams_too(site):
    rate = 10_000  # bytes a second
    site.start_gateway("--limit-per-pilot", str(rate * 8 / 1e6))
    began = time.monotonic()
    done, username = run(site, "flood", sys.executable, "-c", FLOODS)
    assert done.returncode == 0, done.stderr
    passed = figures(site, username)["up"]
    assert 0 < passed <= rate * (time.monotonic() - began) + QUANTUM + 1000
