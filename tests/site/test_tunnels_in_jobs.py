"""Tunnels in batch jobs: a second one beside the first, and both carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cluster import Cluster

JOB = """
import asyncio, json, sys
from pathlib import Path
from vpn.config import Credential, TunnelConfig
from vpn.session import open_session

async def fetch(session):
    process = await session.spawn(["curl", "-sS", "-o", "/dev/null", sys.argv[2]])
    return await process.wait()

async def main():
    found = {}
    for mode, (one, other) in json.loads(Path(sys.argv[1]).read_text()).items():
        first, second = (TunnelConfig(mode, Credential.from_bytes(each.encode())) for each in (one, other))
        async with open_session(first) as outer:
            before = await fetch(outer)
            async with open_session(second) as inner:
                together = await asyncio.gather(fetch(outer), fetch(inner))
            found[mode] = [before, *together, await fetch(outer)]
    print(json.dumps(found))

asyncio.run(main())
"""
MODES = ("relay", "openconnect", "socks", "auto")


@pytest.mark.usefixtures("gateway")
def test_a_second_tunnel_in_a_job_of_each_mode(cluster: Cluster, shared_path: Path) -> None:
    site = cluster.site
    credentials = {mode: [_credential(cluster, shared_path, f"{mode}{n}") for n in (1, 2)] for mode in MODES}
    wanted = shared_path / "credentials.json"
    wanted.write_text(json.dumps(credentials))
    wanted.chmod(0o644)  # of credentials that this test alone has a gateway for
    argv = ["srun", "-n1", site.description["python"], "-c", JOB, str(wanted), site.description["http_url"]]
    done = site.run("login", argv, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {mode: [0, 0, 0, 0] for mode in MODES}


def _credential(cluster: Cluster, directory: Path, name: str) -> str:
    file = directory / name
    cluster.hpcq("vpn", "gateway", "credential", "--label", name, "--output", str(file))
    return file.read_text()
