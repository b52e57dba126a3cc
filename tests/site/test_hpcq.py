"""The main path on the simulated site: pilots through Slurm, tunnels to a gateway on login, tasks, and what fails."""

from __future__ import annotations

import json
import os
import signal

import pytest
from cluster import WAIT, Cluster, alive, descendants, ended, finished, until, wrapping_template, written

READ = """
import sys, hpcq
def entries(url):
    import uproot
    with uproot.open(url) as file:
        return file["events"].num_entries
with hpcq.Queue(name=sys.argv[1]) as queue:
    for _ in range(4):
        queue.submit(hpcq.PythonTask(entries, sys.argv[2]).set(network="wan"))
    while not queue.empty():
        task = queue.wait()
        print(task.outcome, task.output, task.hostname, task.message, flush=True)
"""


XROOTD = ("--vpn", "openconnect", "--require", "root://xrootd.wan.test:1094")


@pytest.mark.usefixtures("gateway")
def test_tasks_read_root_files_through_the_tunnel_on_both_nodes(cluster: Cluster) -> None:
    cluster.submit("-n", "2", "--option=--exclusive", *XROOTD)
    program = cluster.program(READ, cluster.site.xrootd_url + "uproot-Zmumu.root")
    lines = finished(program).splitlines()
    assert [line.split()[:2] for line in lines] == [["success", "2304"]] * 4
    assert {line.split()[2] for line in lines} <= {"cn1", "cn2"}
    until(lambda: not cluster.jobs(), "the program's end ends its jobs")


OF_TUNNEL = """
import sys, hpcq
mode, url = sys.argv[2:]
def entries(url):
    import uproot
    with uproot.open(url) as file:
        return file["events"].num_entries
with hpcq.Queue(name=sys.argv[1]) as queue:
    of_mode = {"network": "wan", "features": {f"tunnel={mode}"}}
    queue.submit(hpcq.PythonTask(entries, url).set(**of_mode))
    queue.submit(hpcq.Task(f"xrdcp -sf {url} got && wc -c < got").set(**of_mode))
    while not queue.empty():
        task = queue.wait()
        print(type(task).__name__, task.outcome, str(task.output).strip(), task.message, flush=True)
"""


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(("vpn", "mode"), [("auto", "relay"), ("socks", "socks")])
def test_tasks_that_ask_for_a_tunnel_mode_read_through_it(cluster: Cluster, vpn: str, mode: str) -> None:
    before = credentials(cluster)  # a gateway remembers those of pilots that were killed
    cluster.submit("--vpn", vpn)
    lines = finished(cluster.program(OF_TUNNEL, mode, cluster.site.xrootd_url + "uproot-Zmumu.root")).splitlines()
    found = {kind: told for kind, *told in map(str.split, lines)}
    assert found["PythonTask"] == ["success", "2304"]
    outcome, size = found["Task"]
    assert outcome == "success"
    assert int(size) > 100_000
    until(lambda: credentials(cluster) <= before, "the pilot's credential is revoked at its end")


def credentials(cluster: Cluster) -> set[str]:
    """Those the gateway knows."""
    report = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)
    return {pilot["username"] for pilot in report["pilots"]}


FETCH = """
import socket, sys, threading, hpcq
def greet(server):
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b"near")
near = socket.create_server(("192.0.2.1", 0))
threading.Thread(target=greet, args=(near,), daemon=True).start()
with hpcq.Queue(sys.argv[1]) as queue:
    asked = f"bash -c 'cat < /dev/tcp/192.0.2.1/{near.getsockname()[1]}'"
    queue.submit(hpcq.Task(asked, network="wan"))
    print(queue.wait().output)
    inputs = {"got.root": hpcq.URL(sys.argv[2]), "kept.root": hpcq.URL(sys.argv[2], cache=True)}
    command = "cmp got.root kept.root && head -c 4 got.root && wc -c < got.root"
    missing = {"a": hpcq.URL(sys.argv[2] + ".not")}
    for wanted in (inputs, inputs, missing):
        queue.submit(hpcq.Task(command, inputs=wanted))
        done = queue.wait()
        print(done.outcome, (done.output + done.message).replace("\\n", " "))
"""


@pytest.mark.usefixtures("gateway")
def test_inputs_come_from_xrootd_through_the_tunnel_beside_a_direct_network(cluster: Cluster) -> None:
    cluster.submit("-n", "1", *XROOTD, "--direct", "192.0.2.0/24")
    url = cluster.site.xrootd_url + "uproot-Zmumu.root"
    near, first, again, missing = finished(cluster.program(FETCH, url)).splitlines()
    assert near == "near"  # no gateway leads to its own host
    assert first == again
    assert first.startswith("success root")
    assert int(first.removeprefix("success root")) > 100_000
    assert missing.startswith(f"files input 'a' ({url}.not) cannot be had")


@pytest.mark.usefixtures("gateway")
def test_pilots_shows_tunnel_and_work(cluster: Cluster) -> None:
    program = cluster.program(WAIT, "sleep 600")
    served = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)
    where = f"{served['addresses'][0]}:{served['port']}"
    cluster.submit(*XROOTD, "--gateway", where)
    (row,) = until(lambda: [row for row in cluster.pilots() if row["state"] == "ready"], "the pilot is ready")
    assert row["tunnel_kind"] in ("DTLS", "TLS")
    assert row["tunnel_gateway"] == where
    status = json.loads(cluster.hpcq("status", "--name", cluster.queue, "--json").stdout)
    assert status["pilots"]["ready"] == 1
    ended(program, signal.SIGINT)
    until(lambda: not cluster.jobs(), "Ctrl-C in the program cancels its jobs")


def failed_layer(cluster: Cluster, *options: str) -> tuple[str, str]:
    """Submit one pilot that cannot serve; the layer and the message that `hpcq pilots` shows."""
    program = cluster.program(WAIT, "true")
    try:
        cluster.submit(*options)
        (row,) = until(lambda: [row for row in cluster.pilots() if row["state"] == "failed"], "the pilot has failed")
    finally:
        ended(program, signal.SIGINT)
    return row["failed_layer"], row["message"]


def test_without_a_gateway_the_pilot_says_so(cluster: Cluster) -> None:
    layer, message = failed_layer(cluster, *XROOTD)
    assert layer == "gateway"
    assert "hpcq vpn gateway start" in message


@pytest.mark.usefixtures("gateway")
@pytest.mark.parametrize(
    ("target", "layer"),
    [
        ("root://nowhere.wan.test:1094", "dns"),
        ("root://xrootd.wan.test:1095", "xrootd"),
        ("http://xrootd.wan.test:1095/", "http"),
        ("cvmfs:cms.cern.ch", "cvmfs"),
    ],
)
def test_a_probe_that_fails_names_its_layer(cluster: Cluster, target: str, layer: str) -> None:
    failed, message = failed_layer(cluster, "--vpn", "openconnect", "--require", target)
    assert failed == layer
    assert target in message


@pytest.mark.usefixtures("gateway")
def test_forbidden_user_namespaces_are_named(cluster: Cluster) -> None:
    prelude = "exec unshare -Ur sh -c 'echo 0 > /proc/sys/user/max_user_namespaces; exec \"$@\"' sh"
    layer, message = failed_layer(cluster, "--template", wrapping_template(cluster, prelude), *XROOTD)
    assert layer == "user namespaces"
    assert "max_user_namespaces" in message


@pytest.mark.usefixtures("gateway")
def test_a_missing_tun_device_is_named(cluster: Cluster) -> None:
    prelude = "exec unshare -Urm sh -c 'mount -t tmpfs none /dev/net; exec \"$@\"' sh"
    layer, message = failed_layer(cluster, "--template", wrapping_template(cluster, prelude), *XROOTD)
    assert layer == "tun"
    assert "/dev/net/tun" in message


def test_a_pilot_killed_in_the_middle_of_a_task_costs_one_more_attempt(cluster: Cluster) -> None:
    marks = cluster.directory / "marks"
    command = f"echo $$ >> {marks}; test $(wc -l < {marks}) -ge 2 || sleep 600"
    cluster.submit("-n", "2", "--option=--exclusive", "--vpn", "none")
    program = cluster.program(WAIT, command)
    until(lambda: written(marks), "the task runs")
    (host,) = [row["hosts"] if "hosts" in row else row["hostname"] for row in cluster.pilots() if row["cores_busy"]]
    os.kill(until(lambda: cluster.pid_of_pilot(host), "the pilot is found"), signal.SIGKILL)
    output = finished(program)
    assert output.startswith("done success 2 "), output
    assert len(marks.read_text().splitlines()) == 2


def test_a_pilot_that_never_reports_is_shown_with_the_end_of_its_output(cluster: Cluster) -> None:
    template = wrapping_template(cluster, "echo the node is on fire; exit 7;")
    cluster.submit("--template", template, "--vpn", "none")
    until(lambda: not cluster.jobs(), "the job has ended")
    answer = cluster.hpcq("pilots", "--name", cluster.queue)
    assert "the node is on fire" in answer.stdout
    assert "script.sh" in answer.stdout


def test_cancel_pilots_waits_until_they_are_gone(cluster: Cluster) -> None:
    cluster.submit("-n", "2", "--vpn", "none")
    assert len(cluster.jobs()) == 2
    cluster.hpcq("cancel-pilots", "--name", cluster.queue, "--all")
    assert not [job for job in cluster.jobs() if "COMPLETING" not in job]


def test_slurms_refusal_is_shown(cluster: Cluster) -> None:
    answer = cluster.submit("--partition", "nope", status=3)
    assert "invalid partition" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_an_unknown_queue_is_named(cluster: Cluster) -> None:
    answer = cluster.hpcq("status", "--name", "nobody", status=4)
    assert "nobody" in answer.stderr


def test_dry_run_shows_script_and_command_and_submits_nothing(cluster: Cluster) -> None:
    answer = cluster.submit("--dry-run", "--partition", "a b; rm -rf /")
    assert "#SBATCH --partition='a b; rm -rf /'" in answer.stdout
    assert "sbatch" in answer.stdout
    assert not cluster.jobs()


@pytest.mark.usefixtures("gateway")
def test_a_killed_pilot_leaves_nothing_on_its_node(cluster: Cluster) -> None:
    program = cluster.program(WAIT, "sleep 600")
    cluster.submit(*XROOTD)
    (row,) = until(lambda: [row for row in cluster.pilots() if row["cores_busy"]], "the task runs")
    pid = until(lambda: cluster.pid_of_pilot(row["hostname"]), "the pilot is found")
    tree = descendants(pid)
    assert len(tree) > 2
    os.kill(pid, signal.SIGKILL)
    until(lambda: not [one for one in tree if alive(one)], "all its processes are gone")
    ended(program, signal.SIGINT)
