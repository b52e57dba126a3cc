"""A tunnel that breaks under running tasks, on the simulated site: work goes on, nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, descendants, ended, finished, until, written
from simulated_site import plan
from simulated_site.client import Site

CARRIERS = {"openconnect": b"--protocol=anyconnect", "relay": b"vpn.relay.plane"}
"""What carries a mode's bytes: part of its command line."""

PROGRAM = """
import sys, hpcq
url, marks = sys.argv[2:]
again = f"echo $$ >> {marks}/wan; test $(wc -l < {marks}/wan) -ge 2 || sleep 600; xrdcp -f {url} {marks}/read"
busy = f"echo $$ >> {marks}/any; while ! test -e {marks}/stop; do sleep 0.1; done"
with hpcq.Queue(name=sys.argv[1]) as queue:
    needs = queue.submit(hpcq.Task(again).set(network="wan", retries=0, tag="wan"))
    queue.submit(hpcq.Task(busy).set(retries=0, tag="any"))
    while not queue.empty():
        task = queue.wait()
        print(task.tag, task.outcome, task.attempts, task.message, flush=True)
"""


def carrier(cluster: Cluster, host: str, mode: str) -> int:
    """The process that carries the tunnel of the pilot on ``host``."""
    _, *below = descendants(cluster.pid_of_pilot(host))
    for pid in below:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # some are short: a task sleeps
            if CARRIERS[mode] in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    raise AssertionError(f"no {mode} on {host}")


@pytest.fixture(params=sorted(CARRIERS))
def mode(request: pytest.FixtureRequest) -> str:
    """A tunnel mode."""
    name: str = request.param
    return name


@pytest.fixture
def gateways() -> str:
    """Those that pilots may use."""
    return "default"


@pytest.fixture
def at_work(
    cluster: Cluster, gateway: None, mode: str, gateways: str
) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """A pilot with a task that needs the tunnel and one that does not; the program, the host, the marks."""
    marks = cluster.directory / "marks"
    marks.mkdir(mode=0o777)
    marks.chmod(0o777)
    cluster.submit("--vpn", mode, "--gateway", gateways, "--require", "root://xrootd.wan.test:1094")
    program = cluster.program(PROGRAM, cluster.site.xrootd_url + "uproot-Zmumu.root", str(marks))
    until(lambda: written(marks / "wan") and written(marks / "any"), "both tasks run")
    (row,) = cluster.pilots()
    yield program, row["hostname"], marks
    ended(program, signal.SIGINT)


def runs(marks: Path, name: str) -> int:
    return len((marks / name).read_text().splitlines())


def test_without_what_carries_the_tunnel_a_task_that_needs_none_goes_on(
    cluster: Cluster, at_work: tuple[subprocess.Popen[str], str, Path], mode: str
) -> None:
    program, host, marks = at_work
    os.kill(carrier(cluster, host, mode), signal.SIGKILL)
    until((marks / "read").exists, "the task that needs the tunnel ran again in a new one")
    (marks / "stop").touch()
    assert ends(program) == {"wan": ["success", "2"], "any": ["success", "1"]}
    assert (runs(marks, "wan"), runs(marks, "any")) == (2, 1)


FAILS = """
import sys, hpcq
url, marks = sys.argv[2:]
limits = "XRD_CONNECTIONWINDOW=5 XRD_CONNECTIONRETRY=1 XRD_REQUESTTIMEOUT=20 XRD_STREAMTIMEOUT=10"
read = f"echo $$ >> {marks}/tries; {limits} xrdcp -f {url} {marks}/read"
with hpcq.Queue(name=sys.argv[1]) as queue:
    queue.submit(hpcq.Task("false").set(network="wan", retries=0, tag="own"))
    first = queue.wait()
    queue.submit(hpcq.Task(f"until test -e {marks}/go; do sleep 0.1; done; {read}").set(network="wan", tag="wan"))
    for task in (first, queue.wait()):
        print(task.tag, task.outcome, task.attempts, task.message, flush=True)
"""


@pytest.mark.parametrize("mode", ["relay"], indirect=True)  # by openconnect xrdcp looks for names for minutes
def test_a_task_that_fails_since_the_tunnel_leads_nowhere_is_not_blamed(
    cluster: Cluster, gateway: None, mode: str
) -> None:
    marks = cluster.directory / "marks"
    marks.mkdir(mode=0o777)
    marks.chmod(0o777)
    cluster.submit("--vpn", mode, "--require", "root://xrootd.wan.test:1094")
    program = cluster.program(FAILS, cluster.site.xrootd_url + "uproot-Zmumu.root", str(marks))
    (row,) = until(lambda: [row for row in cluster.pilots() if row["tasks_done"] and row["cores_busy"]], "one is done")
    device = [
        "nsenter",
        "-t",
        str(inside(cluster, row["hostname"])),
        "-n",
        "ip",
        "link",
        "set",
        "tun0",
    ]
    subprocess.run([*device, "down"], check=True)  # the tunnel itself cannot notice this
    (marks / "go").touch()
    until((marks / "read").exists, "it ran again in a new tunnel")
    assert ends(program) == {"own": ["exit_code", "1"], "wan": ["success", "2"]}
    assert runs(marks, "tries") == 2


def inside(cluster: Cluster, host: str) -> int:
    """A process in the tunnel's namespace of the pilot on ``host``."""
    pilot = cluster.pid_of_pilot(host)
    for pid in descendants(pilot):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _net(pid) != _net(pilot):
                return pid
    raise AssertionError(f"nothing in a tunnel on {host}")


@pytest.fixture
def second_gateway(cluster: Cluster, gateway: None) -> Iterator[None]:
    cluster.hpcq("vpn", "gateway", "start", "--name", "second")
    yield
    cluster.site.run("login", ["hpcq", "vpn", "gateway", "stop", "--name", "second"])


@pytest.mark.parametrize("gateways", ["second,default"])
def test_of_two_gateways_one_is_killed_and_work_goes_on_through_the_other(
    cluster: Cluster, second_gateway: None, at_work: tuple[subprocess.Popen[str], str, Path]
) -> None:
    program, _, marks = at_work
    assert cluster.pilots()[0]["tunnel_gateway"] == "second"
    status = json.loads(cluster.hpcq("vpn", "gateway", "status", "--name", "second,default", "--json").stdout)
    connected = {one["name"]: sum(pilot["state"] == "connected" for pilot in one["pilots"]) for one in status}
    assert connected == {"second": 1, "default": 0}
    record = cluster.site.run("login", ["sh", "-c", "cat ~/.local/state/hpcq-gateway/second/gateway.json"], check=True)
    os.kill(json.loads(record.stdout)["pid"], signal.SIGKILL)
    killed = time.monotonic()
    until((marks / "read").exists, "the task that needs the tunnel ran again in a new one")
    print(f"work went on {time.monotonic() - killed:.1f} s after the gateway was killed")
    assert cluster.pilots()[0]["tunnel_gateway"] == "default"
    (marks / "stop").touch()
    assert ends(program) == {"wan": ["success", "2"], "any": ["success", "1"]}


def test_a_gateway_that_is_stopped_and_started_costs_tasks_that_need_it_an_attempt(
    cluster: Cluster, at_work: tuple[subprocess.Popen[str], str, Path]
) -> None:
    program, _, marks = at_work
    cluster.hpcq("vpn", "gateway", "stop")
    until(lambda: "tunnel is down" in cluster.pilots()[0]["message"], "the pilot says that its tunnel is down")
    assert cluster.pilots()[0]["state"] == "ready"
    cluster.hpcq("vpn", "gateway", "start")
    until((marks / "read").exists, "the task that needs the tunnel ran again in a new one")
    (marks / "stop").touch()
    assert ends(program) == {"wan": ["success", "2"], "any": ["success", "1"]}


CUT = """
table inet cut {{
    chain out {{ type filter hook output priority 0; tcp dport {{ {ports} }} drop; udp dport {{ {ports} }} drop; }}
    chain in {{ type filter hook input priority 0; tcp sport {{ {ports} }} drop; udp sport {{ {ports} }} drop; }}
}}
"""
READS = """
import sys, hpcq
url, marks = sys.argv[2:]
read = f"curl -sf --max-time 4 -o /dev/null {url} && echo yes >> {marks}/reads || echo no >> {marks}/reads"
with hpcq.Queue(name=sys.argv[1]) as queue:
    queue.submit(hpcq.Task(f"until test -e {marks}/stop; do {read}; sleep 0.2; done").set(network="wan", retries=0))
    while not queue.empty():
        task = queue.wait(80)
        if task is not None:
            print("wan", task.outcome, task.attempts, task.message, flush=True)
"""
DOWN = float(os.environ.get("HPCQ_LINK_DOWN", "0"))
"""Seconds the link is down: longer than until a read fails only to measure what that costs."""


def test_when_the_link_to_the_gateway_is_cut_work_goes_on_after_it(
    cluster: Cluster, gateway: None, mode: str, site: Site
) -> None:
    reads = cluster.directory / "reads"
    cluster.directory.chmod(0o777)
    cluster.submit("--vpn", mode)
    program = cluster.program(READS, plan.HTTP_URL + plan.ROOT_FILES[0], str(cluster.directory))

    def count(word: str) -> int:
        return reads.read_text().split().count(word) if reads.exists() else 0

    until(lambda: count("yes"), "a read succeeds")
    (row,) = cluster.pilots()
    told = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)
    rules = CUT.format(ports=f"{told['port']}, {told['relay_port']}")
    began = time.monotonic()
    site.run(row["hostname"], ["nft", "-f", "-"], user=False, check=True, stdin=rules)
    until(lambda: count("no"), "a read fails")
    time.sleep(max(0.0, DOWN - (time.monotonic() - began)))
    before = count("yes")
    site.run(row["hostname"], ["nft", "delete", "table", "inet", "cut"], user=False, check=True)
    ended = time.monotonic()
    until(lambda: count("yes") > before, "a read succeeds again")
    print(f"{mode}: down for {ended - began:.1f} s, work went on {time.monotonic() - ended:.1f} s later")
    (cluster.directory / "stop").touch()
    outcome = finished(program).split()
    assert outcome[:2] == ["wan", "success"]


REFUSE = """
table inet refuse {{
    chain out {{ type filter hook output priority 0; tcp dport {port} reject with tcp reset; }}
}}
"""


def test_auto_goes_on_in_the_next_mode_where_the_one_it_had_does_not_come_back(
    cluster: Cluster, gateway: None, site: Site
) -> None:
    reads = cluster.directory / "reads"
    cluster.directory.chmod(0o777)
    cluster.submit("--vpn", "auto")
    program = cluster.program(READS, plan.HTTP_URL + plan.ROOT_FILES[0], str(cluster.directory))

    def count() -> int:
        return reads.read_text().split().count("yes") if reads.exists() else 0

    until(count, "a read succeeds")
    (row,) = cluster.pilots()
    assert (row["tunnel_mode"], row["tunnel_passed_over"]) == ("relay", [])
    port = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)["relay_port"]
    rules = REFUSE.format(port=port)
    site.run(row["hostname"], ["nft", "-f", "-"], user=False, check=True, stdin=rules)
    try:
        os.kill(carrier(cluster, row["hostname"], "relay"), signal.SIGKILL)
        until(lambda: cluster.pilots()[0]["tunnel_mode"] == "openconnect", "the tunnel is up in the next mode")
        before = count()
        until(lambda: count() > before, "reads succeed again")
        (row,) = cluster.pilots()
        (line,) = row["tunnel_passed_over"]
        assert line.startswith("relay passed over: ")
        assert line in cluster.hpcq("pilots", "show", row["job_id"], "--name", cluster.queue).stdout
    finally:
        site.run(row["hostname"], ["nft", "delete", "table", "inet", "refuse"], user=False, check=True)
    (cluster.directory / "stop").touch()
    assert finished(program).split()[:2] == ["wan", "success"]


def of_gateway(cluster: Cluster, mode: str) -> int:
    """The gateway's process that serves a mode's logins."""
    record = cluster.site.run("login", ["sh", "-c", "cat ~/.local/state/hpcq-gateway/default/gateway.json"], check=True)
    served_by = {"relay": b"vpn.gateway.relay_process", "openconnect": b"ocserv"}[mode]
    return next(
        pid
        for pid in descendants(json.loads(record.stdout)["pid"])
        if served_by in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def test_when_the_gateways_server_is_killed_the_gateway_starts_another_and_work_goes_on(
    cluster: Cluster, gateway: None, mode: str
) -> None:
    reads = cluster.directory / "reads"
    cluster.directory.chmod(0o777)
    cluster.submit("--vpn", mode)
    program = cluster.program(READS, plan.HTTP_URL + plan.ROOT_FILES[0], str(cluster.directory))

    def count() -> int:
        return reads.read_text().split().count("yes") if reads.exists() else 0

    until(count, "a read succeeds")
    before = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)["restarts"]
    os.kill(of_gateway(cluster, mode), signal.SIGKILL)
    killed, seen = time.monotonic(), count() + 1  # one may have been on its way
    until(lambda: count() > seen, "reads succeed again")
    print(f"{mode}: reads went on {time.monotonic() - killed:.1f} s after the gateway's server was killed")
    until(
        lambda: json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)["restarts"] > before,
        "the gateway tells that it has started another",
    )
    (cluster.directory / "stop").touch()
    assert finished(program).split()[:2] == ["wan", "success"]


@pytest.mark.parametrize("mode", ["relay"], indirect=True)
def test_with_its_namespace_everything_inside_is_gone_but_the_pilot_stays(
    cluster: Cluster, at_work: tuple[subprocess.Popen[str], str, Path], site: Site
) -> None:
    program, host, marks = at_work
    pilot = cluster.pid_of_pilot(host)
    shell = int((marks / "any").read_text().split()[0])
    assert shell
    os.kill(inside(cluster, host), signal.SIGKILL)
    until((marks / "read").exists, "the task that needs the tunnel ran again in a new one")
    until(lambda: runs(marks, "any") == 2, "so did the other")
    assert cluster.pid_of_pilot(host) == pilot
    (marks / "stop").touch()
    assert ends(program) == {"wan": ["success", "2"], "any": ["success", "2"]}


def ends(program: subprocess.Popen[str]) -> dict[str, list[str]]:
    """Outcome and attempts of each task."""
    words = [line.split() for line in finished(program).splitlines()]
    return {first: rest[:2] for first, *rest in words if first in ("wan", "any", "own")}


def _net(pid: int) -> Path:
    return Path(f"/proc/{pid}/ns/net").readlink()
