"""Tunnels in batch jobs: a second one beside the first, and both carry."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from simulated_site import plan

JOB = """
import asyncio, json, sys
from pathlib import Path
from vpn.config import Credential, TunnelConfig
from vpn.session import open_session

async def fetch(session, url):
    process = await session.spawn(["curl", "-sS", "-o", "/dev/null", url])
    return await process.wait()

async def main():
    found = {}
    for name, (mode, tls, url, credentials) in json.loads(Path(sys.argv[1]).read_text()).items():
        given = [Credential.from_bytes(each.encode()) for each in credentials] or [None, None]
        first, second = (TunnelConfig(mode, each, tls=tls) for each in given)
        async with open_session(first) as outer:
            before = await fetch(outer, url)
            async with open_session(second) as inner:
                together = await asyncio.gather(fetch(outer, url), fetch(inner, url))
            found[name] = [before, *together, await fetch(outer, url)]
    print(json.dumps(found))

asyncio.run(main())
"""
WAYS = {
    "relay": ("relay", True, "default"),
    "relay without TLS": ("relay", False, "default"),
    "openconnect": ("openconnect", True, "default"),
    "socks": ("socks", True, "default"),
    "auto": ("auto", True, "default"),
    "prototype": ("prototype", True, "prototype"),
    "slirp": ("slirp", True, ""),
}
"""Mode, whether with TLS, the gateway."""
INSIDE = f"{plan.LOGIN_INSIDE.rpartition('.')[0]}.0/{plan.PREFIX_LENGTH}"


@pytest.fixture
def prototype(cluster: Cluster, gateway: None) -> Iterator[None]:
    """A gateway of the kind that mode is compared with."""
    cluster.hpcq("vpn", "gateway", "start", "--name", "prototype", "--uplink", "prototype")
    yield
    cluster.hpcq("vpn", "gateway", "stop", "--name", "prototype")


@pytest.fixture
def way_out(cluster: Cluster) -> Iterator[None]:
    """The first compute node has outside access of its own, as mode slirp needs."""
    steps = [
        ("login", "echo 1 > /proc/sys/net/ipv4/ip_forward", "echo 0 > /proc/sys/net/ipv4/ip_forward"),
        ("wan", f"ip route add {INSIDE} via {plan.LOGIN_OUTSIDE}", f"ip route del {INSIDE}"),
        ("cn1", f"ip route add default via {plan.LOGIN_INSIDE}", "ip route del default"),
    ]
    with contextlib.ExitStack() as undo:
        for host, do, back in steps:
            undo.callback(cluster.site.run, host, ["sh", "-c", back], user=False)
            cluster.site.run(host, ["sh", "-c", do], user=False, check=True)
        yield


@pytest.mark.usefixtures("gateway", "prototype", "way_out")
def test_a_second_tunnel_in_a_job_of_each_mode(cluster: Cluster, shared_path: Path) -> None:
    site, wanted = cluster.site, shared_path / "wanted.json"
    wanted.write_text(json.dumps({name: _what(cluster, shared_path, name) for name in WAYS}))
    wanted.chmod(0o644)  # of credentials that this test alone has a gateway for
    argv = ["srun", "-n1", "-w", "cn1", site.description["python"], "-c", JOB, str(wanted)]
    done = site.run("login", argv, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {name: [0, 0, 0, 0] for name in WAYS}


def _what(cluster: Cluster, directory: Path, name: str) -> tuple[str, bool, str, list[str]]:
    """Mode, whether with TLS, what to fetch, and the credentials of both tunnels."""
    mode, tls, gateway = WAYS[name]
    url = str(cluster.site.description["http_url"])
    if not gateway:  # nor any name server that the node reaches
        return mode, tls, url.replace(plan.HTTP_NAME, plan.WAN_ADDRESS), []
    return mode, tls, url, [_credential(cluster, directory / f"{name}{n}", gateway) for n in (1, 2)]


def _credential(cluster: Cluster, file: Path, gateway: str) -> str:
    cluster.hpcq("vpn", "gateway", "credential", "--name", gateway, "--output", str(file))
    return file.read_text()
