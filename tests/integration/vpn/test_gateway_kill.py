"""SIGKILL of any one process of a gateway, but its daemon: it is started again, and clients of both modes go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAN = "203.0.113.1"
READS = f"""
import sys, urllib.request
print("up", flush=True)
for _ in sys.stdin:
    while True:
        try:
            answer = urllib.request.urlopen("http://{WAN}/1000", timeout=5).read()
            break
        except OSError as error:
            print(error, file=sys.stderr)
    print(len(answer), flush=True)
"""
"""For each line it is sent, a program asks until it has an answer."""


def comm(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def only(site, text):
    pids = [pid for pid in site.find(text) if "nsenter" not in site.extra().get(pid, "nsenter")]
    assert len(pids) == 1, (text, site.extra())
    return pids[0]


def below_daemon(site, text):
    """A child of the daemon's."""
    daemon = only(site, "vpn.gateway.daemon import main")
    children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    (pid,) = [pid for pid in site.find(text) if str(pid) in children]
    return pid


def pid_1(site):
    """The holder of the gateway's namespace: the one below the gateway's keeper."""
    keeper = below_daemon(site, "vpn.keeper import main")
    below = {int(pid) for pid in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()}
    (outer,) = below & set(site.find("vpn.holder import main"))
    return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())


PARTS = {  # the first while there is no pause yet: with it ocserv tells its clients that it ends
    "ocserv-sm": lambda site: next(pid for pid in site.extra() if comm(pid) == "ocserv-sm"),
    "relay": lambda site: below_daemon(site, "vpn.gateway.relay_process import main"),
    "data plane": lambda site: only(site, "vpn.gateway.plane import main"),
    "keeper": lambda site: below_daemon(site, "vpn.keeper import main"),
    "ocserv": lambda site: min(site.find("ocserv --foreground") or site.find("ocserv-main")),
    "pid 1": pid_1,
}


def status(site):
    return json.loads(site.check("login", sys.executable, "-m", "vpn", "gateway", "status", "--json"))


def wait_for_restarts(site, count):
    """A status, when the gateway has noticed and mended so many ends."""
    end = time.monotonic() + 90
    while True:
        report = status(site)
        if report["restarts"] >= count:
            return report
        assert time.monotonic() < end, report


def reader(site, mode, file):
    """A `vpn run` that reads on demand."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = ("run", "--mode", mode, "--credential", file, "--", sys.executable, "-c", READS)
    process = site.start_vpn("node", *command, **pipes)
    assert process.stdout.readline() == "up\n", process.stderr.read()
    return process


def reads(process):
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "1000\n", process.communicate(timeout=90)[1]


@pytest.fixture(scope="module")
def sessions(shared_gateway):
    """A session of each mode, which live through everything here."""
    started = {}
    try:
        for mode in ("relay", "openconnect"):
            started[mode] = reader(shared_gateway, mode, shared_gateway.credential(mode))
        yield started
    finally:
        for process in started.values():
            with process:  # which closes its standard input, on which it ends
                pass


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_killed_is_started_again_and_sessions_go_on(shared_gateway, sessions, part):
    before = status(shared_gateway)
    for process in sessions.values():
        reads(process)
    unused = shared_gateway.credential(f"unused at {part}")
    os.kill(PARTS[part](shared_gateway), signal.SIGKILL)
    killed = time.monotonic()
    for process in sessions.values():
        reads(process)
    print(f"{part} killed: both sessions read again {time.monotonic() - killed:.1f} s later")
    after = wait_for_restarts(shared_gateway, before["restarts"] + 1)
    assert "ended" in after["last_end"]
    assert [after[name] for name in ("port", "relay_port", "pin")] == [
        before[name] for name in ("port", "relay_port", "pin")
    ]
    mode = "relay" if part == "relay" else "openconnect"
    for expected in (0, 5):  # good for one login, as ever
        done = shared_gateway.vpn("node", "run", "--mode", mode, "--credential", unused, "--", "true")
        assert done.returncode == expected, done.stderr


def test_slirp4netns_is_started_again_where_it_carries_everything(site):
    site.start_gateway("--uplink", "slirp4netns")
    process = reader(site, "openconnect", site.credential("session"))
    with process:
        reads(process)
        os.kill(only(site, "slirp4netns --configure"), signal.SIGKILL)
        wait_for_restarts(site, 1)
        reads(process)
        process.stdin.close()
        assert process.wait(90) == 0, process.stderr.read()


def test_afterwards_it_is_told_and_ends_with_nothing_left(shared_gateway, sessions):
    told = shared_gateway.vpn("login", "gateway", "status").stdout
    assert re.search(r"processes started again since then: \d+, the last after .* ended", told), told
    states = {one["label"]: one["state"] for one in status(shared_gateway)["pilots"]}
    assert [states[mode] for mode in sessions] == ["connected"] * 2
    for process in sessions.values():
        process.stdin.close()
        assert process.wait(90) == 0
    assert shared_gateway.vpn("login", "gateway", "stop").returncode == 0
    shared_gateway.wait_empty()
