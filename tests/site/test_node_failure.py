"""A node that fails as nodes do: all that ran on it is gone at once, slurmd too, and Slurm has to notice.

`crash` ends the processes of one compute node of the site, each by its pid; `repair` starts slurmd there again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster import Cluster, finished, until
from simulated_site import plan
from simulated_site.client import Site

NOTICED_AFTER = 10
"""Seconds without a word from slurmd after which Slurm calls its node down."""

PROGRAM = """
import json, sys, hpcq
name, command = sys.argv[1:]
with hpcq.Queue(name=name) as queue:
    queue.submit(hpcq.Task(command))
    first = queue.wait()
    print(json.dumps([first.outcome, first.attempts, first.hostname]), flush=True)
    sys.stdin.readline()
    for host in ("cn1", "cn2"):
        for number in range(4):
            queue.submit(hpcq.Task(f"echo {host}.{number}", features={f"host={host}"}))
    print(json.dumps([[task.outcome, task.output.strip(), task.pilot] for task in iter(queue.wait, None)]), flush=True)
"""


def processes(site: Site, host: str) -> list[int]:
    """All that run on a host of the site, but for the one that holds its namespaces."""
    holder = int(site.hosts[host]["pid"])
    here, found = Path(f"/proc/{holder}/ns/uts").readlink(), []
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int(one.name) != holder and (one / "ns/uts").readlink() == here:
                found.append(int(one.name))
    return found


def crash(site: Site, host: str) -> None:
    """What runs there is gone, and nobody is told.

    All is stopped before any of it is ended: slurmstepd must not live to report that its script was killed.
    """
    stopped: set[int] = set()
    while new := set(processes(site, host)) - stopped:
        signal_all(new, signal.SIGSTOP)
        stopped |= new
    while pids := processes(site, host):
        signal_all(pids, signal.SIGKILL)


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def slurm_state(site: Site, host: str) -> str:
    told = site.run("login", ["scontrol", "show", "node", host], check=True).stdout
    return next(word for word in told.split() if word.startswith("State="))[6:]


def repair(site: Site, host: str) -> None:
    command = ["slurmd", "-D", "-N", host, "-f", str(plan.SLURM_CONF)]
    with (plan.LOGS / f"slurmd-{host}.again.log").open("ab") as log:
        slurmd = site.popen(host, command, user=False, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    slurmd.returncode = 0  # it ends with the site, not with us
    until(lambda: resumed(site, host), f"{host} is back")


def resumed(site: Site, host: str) -> bool:
    site.run("login", ["scontrol", "update", f"NodeName={host}", "State=RESUME"], user=False)
    return not any(word in slurm_state(site, host) for word in ("DOWN", "DRAIN", "*"))


@contextlib.contextmanager
def attentive(site: Site) -> Iterator[None]:
    """Slurm notices soon that a node is gone. Only meanwhile: it takes one that is slow for one that is gone."""

    def wait(seconds: int) -> None:
        lines = plan.SLURM_CONF.read_text().splitlines()
        lines = [f"SlurmdTimeout={seconds}" if line.startswith("SlurmdTimeout=") else line for line in lines]
        plan.SLURM_CONF.write_text("\n".join(lines) + "\n")
        site.run("login", ["scontrol", "reconfigure"], user=False, check=True)

    wait(NOTICED_AFTER)
    try:
        yield
    finally:
        wait(60)


def row_of(cluster: Cluster, job: str) -> dict[str, Any]:
    return next(row for row in cluster.pilots() if row["job_id"] == job)


def serves_again(cluster: Cluster, job: str) -> bool:
    row = row_of(cluster, job)
    print(f"{row['state']} {row['reason']}: {row['message']}")
    assert row["state"] != "failed", cluster.story()
    if row["state"] == "pending":
        cluster.start_requeued(job, "now")
    return row["state"] == "ready"


def test_a_node_that_crashes(cluster: Cluster) -> None:
    """Its task runs again elsewhere, `hpcq pilots` tells, and its job's next pilot is another one under the same id."""
    marks = cluster.directory / "marks"
    program = cluster.program(PROGRAM, f"hostname >> {marks}; test $(wc -l < {marks}) -ge 2 || sleep 600")
    assert program.stdin
    assert program.stdout
    cluster.submit("-n", "2", "--cores", "4", "--vpn", "none")
    until(lambda: len([row for row in cluster.pilots() if row["state"] == "ready"]) == 2, "both are ready")
    failed = until(lambda: marks.exists() and marks.read_text().strip(), "the task runs")
    job = next(row["job_id"] for row in cluster.pilots() if row["hostname"] == failed)
    crash(cluster.site, failed)
    try:
        outcome, attempts, hostname = json.loads(program.stdout.readline())
        assert (outcome, attempts) == ("success", 2)
        assert hostname != failed
        with attentive(cluster.site):
            until(lambda: slurm_state(cluster.site, failed).startswith("DOWN"), "Slurm has noticed")
        waiting = until(lambda: (row := row_of(cluster, job))["state"] == "pending" and row, "it is requeued")
        assert waiting["message"].startswith(f"requeued; its pilot on {failed} has ended: ")
    finally:
        repair(cluster.site, failed)
    until(lambda: serves_again(cluster, job), "its next pilot serves")
    program.stdin.write("go on\n")
    program.stdin.flush()
    results = json.loads(finished(program))
    assert sorted(line for _, line, _ in results) == sorted(f"{host}.{n}" for host in ("cn1", "cn2") for n in range(4))
    assert {outcome for outcome, _, _ in results} == {"success"}
    assert {pilot for _, line, pilot in results if line.startswith(failed)} == {f"slurm-{job}.1@{failed}"}
