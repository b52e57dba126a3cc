"""A gateway that root runs: the same clients, and nothing of the host's network is changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import until
from simulated_site import plan
from simulated_site.client import Site

ASK = """
import socket, struct, urllib.request, sys
url, server = sys.argv[1:]
print(len(urllib.request.urlopen(url).read()))
question = struct.pack(">6H", 7, 256, 1, 0, 0, 0) + b"\\x06xrootd\\x03wan\\x04test\\0" + struct.pack(">HH", 1, 1)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(5)
    for _ in range(12):
        sock.sendto(question, (server, 53))
        try:
            print(len(sock.recv(999)) > len(question))
            break
        except TimeoutError:
            pass
"""


class Host:
    """The site's login node, as its root."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.site = site
        self.directory = directory

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        env = {"XDG_STATE_HOME": str(self.directory / "state")}
        answer = self.site.run("login", argv, user=False, env=env, timeout=100)
        assert answer.returncode == 0 or not check, f"{argv}: {answer.stdout}{answer.stderr}"
        return answer

    def gateway(self, *arguments: str, check: bool = True) -> str:
        return self.run("hpcq", "vpn", "gateway", *arguments, check=check).stdout

    def credential(self) -> str:
        file = self.directory / "one-login"
        self.gateway("credential", "--output", str(file))
        ids = self.site.description["user"]
        os.chown(file, ids["uid"], ids["gid"])
        return str(file)

    def network(self) -> tuple[str, ...]:
        """Forwarding, packet filter, devices."""
        asked = (["cat", "/proc/sys/net/ipv4/ip_forward"], ["nft", "list", "ruleset"], ["ip", "-br", "link"])
        return tuple(self.run(*argv).stdout for argv in asked)


@pytest.fixture
def host(site: Site, shared_path: Path) -> Iterator[Host]:
    if not site.description["root"]:
        pytest.skip("the root of this site is none outside it")
    shared_path.chmod(0o755)
    one = Host(site, shared_path)
    yield one
    one.gateway("stop", check=False)


def test_clients_are_served_as_by_any_gateway_and_nothing_is_left(host: Host, site: Site) -> None:
    before = host.network()
    record = json.loads(host.gateway("start", "--privileged", "--json"))
    assert host.network() == before
    size = (plan.STORE / plan.ROOT_FILES[0]).stat().st_size
    python = site.description["python"]
    for mode in ("relay", "openconnect"):
        ask = ["--", python, "-c", ASK, plan.HTTP_URL + plan.ROOT_FILES[0], plan.WAN_ADDRESS]
        argv = ["hpcq", "vpn", "run", "--mode", mode, "--credential", host.credential(), *ask]
        assert site.run("cn1", argv, check=True, timeout=100).stdout.split() == [str(size), "True"]
        denied = ["--", python, "-c", "import socket, sys; socket.create_connection((sys.argv[1], 22), 20).recv(1)"]
        argv = [
            "hpcq",
            "vpn",
            "run",
            "--mode",
            mode,
            "--credential",
            host.credential(),
            *denied,
            record["addresses"][0],
        ]
        assert site.run("cn1", argv, timeout=100).returncode == 1
    ps = host.run("ps", "-eo", "user=,args=").stdout.splitlines()
    owners = {name: line.split()[0] for line in ps for name in ("gateway.plane", "gateway.relay") if name in line}
    assert owners == dict.fromkeys(("gateway.plane", "gateway.relay"), "ocserv")
    log = host.directory / "state/hpcq-gateway/default/access/access.log"
    for user in (one["username"] for one in json.loads(host.gateway("status", "--json"))["pilots"]):
        host.run(python, "-c", f"from vpn import GatewayClient; GatewayClient().revoke({user!r})")

    def lines(protocol: str) -> list[tuple[str, int, str]]:
        found = [json.loads(line) for line in log.read_text().splitlines()]
        return [(one["host"], one["port"], one["outcome"]) for one in found if one["protocol"] == protocol]

    until(lambda: len(lines("udp")) == 2, "datagrams of both modes are logged")
    assert lines("udp") == [(plan.WAN_ADDRESS, 53, "ok")] * 2
    assert len(lines("tcp")) >= 4
    host.gateway("start", "--privileged", "--name", "second")  # beside it
    host.gateway("stop", "--name", "second")
    host.gateway("stop")
    assert host.network() == before


def test_one_that_is_killed_leaves_nothing_behind(host: Host) -> None:
    before = host.network()
    record = json.loads(host.gateway("start", "--privileged", "--json"))
    os.kill(record["pid"], signal.SIGKILL)
    host.gateway("start", "--privileged")
    host.gateway("stop")
    assert host.network() == before


def test_it_is_for_root(site: Site) -> None:
    answer = site.run("login", ["hpcq", "vpn", "gateway", "start", "--privileged"])
    assert answer.returncode == 2
    assert "--privileged is for root" in answer.stderr
