"""Pilots of nodes that do not see the connection file: what they need comes with their job, for its owner's eyes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, finished, until

PROGRAM = """
import sys, hpcq
with hpcq.Queue(name=sys.argv[1]) as queue:
    for host in ("cn1", "cn2"):
        queue.submit(hpcq.Task(sys.argv[2], features={f"host={host}"}))
    while not queue.empty():
        task = queue.wait()
        print(task.outcome, task.hostname, task.output.strip(), flush=True)
"""
LOOK = """
while [ ! -e {mark} ]; do sleep 0.2; done
ls -d {state}
find /tmp /dev/shm -path {clone} -prune -o -type f -exec grep -sl -e 'PRIVATE KEY' -e hpcq-connection-1 {{}} +
echo looked
"""
CLONE = Path(__file__).resolve().parents[2]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]


@pytest.fixture
def state(cluster: Cluster) -> Iterator[Path]:
    """A state directory that the login node alone sees."""
    path = cluster.site.run("login", ["mktemp", "-d"], check=True).stdout.strip()
    cluster.environment = {"XDG_STATE_HOME": path}
    yield Path(path)
    cluster.site.run("login", ["rm", "-rf", path])


def test_pilots_that_are_told_inline(cluster: Cluster, state: Path) -> None:
    mark = cluster.directory / "looked"
    program = cluster.program(PROGRAM, LOOK.format(state=state, mark=mark, clone=CLONE))
    file = state / "hpcq" / cluster.queue / "connection.json"
    until(lambda: cluster.site.run("login", ["test", "-e", str(file)]).returncode == 0, "the program listens")
    cluster.submit("--connection", "inline", "--nodes", "2", "--vpn", "none")
    rows = until(lambda: [row for row in cluster.pilots() if row["state"] == "ready"][1:], "both are ready")
    job = rows[0]["job_id"]
    assert cluster.site.run("login", ["scontrol", "write", "batch_script", job, "-"]).stdout.count("hpcq-connection-1:")
    own = ["sh", "-c", "cat /run/*/slurm/spool-*/job*/slurm_script"]
    assert "hpcq-connection-1:" in cluster.site.run("cn1", own).stdout + cluster.site.run("cn2", own).stdout
    for host, command in (("login", ["scontrol", "write", "batch_script", job, "-"]), ("cn1", own), ("cn2", own)):
        answer = cluster.site.run(host, [*NOBODY, *command], user=False)
        assert "hpcq-connection-1:" not in answer.stdout, (host, command)
    mark.touch()
    assert sorted(finished(program).splitlines()) == ["success cn1 looked", "success cn2 looked"]
    until(lambda: not cluster.jobs(), "the program's end ends its job")
    for host in ("cn1", "cn2"):
        until(lambda: not cluster.site.run(host, ["sh", "-c", "ls /tmp/hpcq-[0-9]*"]).stdout, "no output is left")  # noqa: B023
