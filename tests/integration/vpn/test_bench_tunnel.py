"""The harness for real: workers, an agent on each host, a gateway of its own, tunnels side by side."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import VPN, WAN

TRAFFIC = [sys.executable, "-I", str(VPN / "bench" / "traffic.py")]
SHORT = ["--workers", "1,3", "--rounds", "1", "--seconds", "0.4", "--warmup", "0.2"]


@pytest.fixture
def far(site):
    """HOST:PORT of a server outside."""
    with site.start("wan", *TRAFFIC, "serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        yield f"{WAN}:{json.loads(server.stdout.readline())['port']}"
        server.stdin.close()
        assert server.wait(90) == 0


def node_of(site):
    """How to run a command on the compute node, from the login node."""
    inner = site.inner_pid(site.hosts["node"])
    return f"nsenter -t {inner} -n --"


def bench(site, far, *options, **more):
    return site.vpn("login", "bench", "--server", far, "--node", node_of(site), *SHORT, *options, **more)


def test_modes_side_by_side(site, far):
    before, path = set(site.extra()), site.directory / "report.json"
    done = bench(site, far, "--mode", "openconnect", "--mode", "relay", "--json", "--output", str(path))
    assert done.returncode in (0, 1), done.stderr
    assert "about" in done.stderr.splitlines()[0]
    report = json.loads(done.stdout)
    assert report == json.loads(path.read_text())
    assert [row["label"] for row in report["rows"]] == ["native", "openconnect", "relay"]
    for row in report["rows"]:
        assert not row["problem"], row
        assert row["round_trips"][0] > 0
        assert [(p["workers"], p["direction"]) for p in row["points"]] == [
            (1, "up"), (1, "down"), (3, "up"), (3, "down"),
        ]  # fmt: skip
        assert all(point["bits_per_second"][0] > 0 and not point["problem"] for point in row["points"]), row
    for row in report["rows"][1:]:
        assert row["bring_up"] > 0
        assert sum(point["cpu_node"][0] for point in row["points"]) > 0, row
        assert sum(point["cpu_gateway"][0] for point in row["points"]) > 0, row
    assert any(goal["goal"].startswith("relay, bring-up") for goal in report["goals"])
    site.wait_gone(set(site.extra()) - before)


def test_a_mode_that_does_not_come_up_is_a_line_of_the_table(site, far):
    options = ("--mode", "relay", "--mode", "openconnect:nonsense=3", "--workers", "1", "--direction", "down")
    done = bench(site, far, *options)
    assert done.returncode in (0, 1), done.stderr
    assert "nonsense" in done.stdout
    assert any(line.split()[:3] == ["relay", "down", "1"] for line in done.stdout.splitlines()), done.stdout


def test_no_far_side_is_said_in_one_line(site):
    done = bench(site, f"{WAN}:9")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("Error: tunnel: the far side, 203.0.113.1:9, does not answer")
    site.wait_empty()


def test_a_prefix_that_is_no_program(site, far):
    done = site.vpn("login", "bench", "--server", far, "--node", "/no/such/program x", *SHORT)
    assert done.returncode == 2
    assert "/no/such/program" in done.stderr


def test_killed_it_leaves_nothing(site, far):
    before = set(site.extra())
    argv = ("bench", "--server", far, "--node", node_of(site), "--mode", "relay", "--rounds", "50", "--seconds", "2")
    with site.start_vpn("login", *argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert any("bringing up relay" in line for line in process.stderr)
            deadline = time.monotonic() + 90
            while not site.find("vpn.holder"):
                assert process.poll() is None
                assert time.monotonic() < deadline
            like_us = f"{sys.executable} -m vpn bench "  # as what it has forked is called until it executes another
            own = min(pid for pid, line in site.extra().items() if line.startswith(like_us))
            os.kill(own, signal.SIGKILL)
            site.wait_gone(set(site.extra()) - before)
        finally:
            process.kill()


def test_strangers_do_not_hurt_the_far_side(site, far):
    port = far.rpartition(":")[2]
    garbage = f"""
import os, socket
for data in (b"", b"GET / HTTP/1.1\\r\\n\\r\\n", os.urandom(5000), b'{{"kind":"up","seconds":1e9}}\\n'):
    with socket.create_connection(("{WAN}", {port})) as sock:
        sock.sendall(data)
"""
    site.check("login", sys.executable, "-c", garbage)
    job = {"server": [WAN, int(port)], "workers": 2, "kind": "down", "warmup": 0.1, "seconds": 0.2}
    answer = json.loads(site.check("login", *TRAFFIC, "work", input=json.dumps(job) + "\n"))
    assert all(worker["samples"][-1][1] > 0 for worker in answer), answer


def test_a_worker_that_cannot_connect_says_so(site):
    job = {"server": [WAN, 9], "workers": 2, "kind": "up", "seconds": 0.2}
    answer = json.loads(site.check("login", *TRAFFIC, "work", input=json.dumps(job) + "\n"))
    assert [worker["error"] for worker in answer] == [f"{WAN} port 9: [Errno 111] Connection refused"] * 2


def test_prefixes_are_words(site, far):
    done = site.vpn(
        "login", "bench", "--server", far, "--home", shlex.join(["env", "A=b c"]), *SHORT, "--mode", "relay"
    )
    assert "native" in done.stdout, done.stderr


def test_the_far_side_by_hand_needs_no_standard_input(site):
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with site.start_vpn("wan", "bench", "--serve", **streams) as server:
        try:
            port = json.loads(server.stdout.readline())["port"]
            job = {"server": [WAN, port], "workers": 1, "kind": "echo", "trips": 5}
            answer = json.loads(site.check("login", *TRAFFIC, "work", input=json.dumps(job) + "\n"))
            assert len(answer[0]["trips"]) == 5, answer
            assert server.poll() is None
        finally:
            for pid in site.find("bench --serve"):
                os.kill(pid, signal.SIGKILL)
