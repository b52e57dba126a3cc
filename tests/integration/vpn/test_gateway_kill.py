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
PARTS = {
    "keeper": lambda site: only(site, "vpn.keeper import main"),
    "holder": lambda site: min(site.find("vpn.holder import main")),
    "pid 1": lambda site: max(site.find("vpn.holder import main")),
    "slirp4netns": lambda site: only(site, "slirp4netns --configure"),
    "ocserv": lambda site: min(site.find("ocserv --foreground") or site.find("ocserv-main")),
    "ocserv-sm": lambda site: next(pid for pid in site.extra() if comm(pid) == "ocserv-sm"),
    "relay": lambda site: only(site, "vpn.gateway.relay_process import main"),
    "data plane": lambda site: only(site, "vpn.gateway.plane import main"),
}

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
    return Path(f"/proc/{pid}/comm").read_text().strip()


def only(site, text):
    pids = [pid for pid in site.find(text) if "nsenter" not in site.extra().get(pid, "nsenter")]
    assert len(pids) == 1, (text, site.extra())
    return pids[0]


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


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_killed_is_started_again_and_sessions_go_on(gateway, credential, part):
    ports = [status(gateway)[name] for name in ("port", "relay_port", "pin")]
    sessions = [reader(gateway, mode, credential(mode)) for mode in ("relay", "openconnect")]
    unused = credential("unused")
    try:
        for process in sessions:
            reads(process)
        victim = PARTS[part](gateway)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        for process in sessions:
            reads(process)
        print(f"{part} killed: both sessions read again {time.monotonic() - killed:.1f} s later")
        report = wait_for_restarts(gateway, 1)
        assert [report[name] for name in ("port", "relay_port", "pin")] == ports
        assert re.search("ended", report["last_end"])
        for file in (unused, credential("fresh")):
            for expected in (0, 5):  # good for one login, as ever
                assert gateway.vpn("node", "run", "--credential", file, "--", "true").returncode == expected
    finally:
        for process in sessions:
            process.stdin.close()
            process.wait(90)
            process.stdout.close()
            process.stderr.close()
    assert gateway.vpn("login", "gateway", "stop").returncode == 0
    gateway.wait_empty()
