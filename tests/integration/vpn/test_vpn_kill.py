"""SIGKILL of any one process of a tunnel or of a gateway leaves nothing of it behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

SESSION_PARTS = {
    "vpn run": lambda site: site.find_vpn("run"),
    "keeper": lambda site: only(site, "vpn.keeper import main"),
    "holder": lambda site: min(site.find("vpn.holder import main")),
    "pid 1": lambda site: max(site.find("vpn.holder import main")),
    "openconnect": lambda site: only(site, "openconnect --protocol"),
}


def only(site, text):
    pids = [pid for pid in site.find(text) if "nsenter" not in site.extra().get(pid, "nsenter")]
    assert len(pids) == 1, (text, site.extra())
    return pids[0]


@pytest.mark.parametrize("part", SESSION_PARTS)
def test_killing_a_part_of_a_session_leaves_nothing(gateway, credential, part):
    file = credential()
    before = set(gateway.extra())
    script = "sleep 1000 & setsid sleep 1000 & echo up; wait"
    process = gateway.start_vpn(
        "node",
        "run",
        "--credential",
        file,
        "--",
        "sh",
        "-c",
        script,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"up\n"
        known = gateway.known | dict.fromkeys(before, "")
        mine = [pid for pid in gateway.extra() if pid not in known]
        gateway.known, gateway_known = known, gateway.known
        victim = SESSION_PARTS[part](gateway)
        os.kill(victim, signal.SIGKILL)
        gateway.wait_gone(mine)
        status, error = process.wait(90), process.stderr.read().decode()
        gateway.known = gateway_known
    if part == "vpn run":
        assert status == 128 + signal.SIGKILL or status == -signal.SIGKILL
    else:
        assert status == 5, error
        assert len(error.splitlines()) == 1, error
        assert error.startswith("Error: ")
    assert gateway.vpn("login", "gateway", "status").returncode == 0


def test_killing_the_caller_of_mode_none_leaves_nothing(site):
    script = "sleep 1000 & setsid sleep 1000 & echo up; wait"
    process = site.start_vpn("node", "run", "--mode", "none", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"up\n"
        mine = list(site.extra())
        os.kill(site.find_vpn("run"), signal.SIGKILL)
        site.wait_gone(mine)


def test_killing_a_gateways_daemon_leaves_nothing_and_it_starts_again(gateway):
    mine = list(gateway.extra())
    os.kill(only(gateway, "vpn.gateway.daemon import main"), signal.SIGKILL)
    gateway.wait_gone(mine)
    status = gateway.vpn("login", "gateway", "status")
    assert status.returncode == 5
    assert "start" in status.stderr
    again = gateway.vpn("login", "gateway", "start")
    assert again.returncode == 0, again.stderr
    assert gateway.vpn("login", "gateway", "stop").returncode == 0
    gateway.wait_empty()


@pytest.mark.parametrize("plane", ["runs", "stands still"])
def test_the_gateway_ending_loses_the_tunnel(gateway, credential, plane):
    """Also with the data plane out of action: the last words go from ocserv's sockets, which are the host's."""
    process = gateway.start_vpn(
        "node",
        "run",
        "--credential",
        credential(),
        "--",
        "sh",
        "-c",
        "echo up; exec sleep 1000",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"up\n"
        if plane == "stands still":
            os.kill(only(gateway, "vpn.gateway.plane import main"), signal.SIGSTOP)
        assert gateway.vpn("login", "gateway", "stop").returncode == 0
        assert process.wait(180) == 5
        assert re.search(rb"ended the session|could not be reached|did not come back", process.stderr.read())
    gateway.wait_empty()


def test_a_program_that_dies_at_start_is_not_waited_for(site):
    script = (
        "import asyncio, sys\n"
        "from vpn.process import start_keeper\n"
        "async def main():\n"
        "    keeper = await start_keeper()\n"
        "    try:\n"
        "        await keeper.client.spawn(['/bin/sh', '-c', 'exit 1'], cwd='/no/such/directory')\n"
        "    except FileNotFoundError as error:\n"
        "        print(error)\n"
        "    await keeper.close()\n"
        "asyncio.run(main())\n"
    )
    assert "/no/such/directory" in site.check("node", sys.executable, "-c", script)
    site.wait_empty()
