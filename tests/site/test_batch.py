"""Batch systems as they are: Slurm of the site, and its qsub, qstat and qdel in Torque's dialect."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cluster import WAIT, Cluster, alive, ended, finished, until, written

MANY = """
import sys, hpcq
with hpcq.Queue(name=sys.argv[1]) as queue:
    for _ in range(int(sys.argv[3])):
        queue.submit(hpcq.Task(sys.argv[2]))
    while not queue.empty():
        task = queue.wait()
        print(task.outcome, task.attempts, task.hostname, task.output.strip(), flush=True)
"""


def ready(cluster: Cluster, count: int = 1) -> list[dict[str, Any]]:
    def look() -> list[dict[str, Any]]:
        rows = [row for row in cluster.pilots() if row["state"] == "ready"]
        return rows if len(rows) >= count else []

    return until(look, f"{count} pilots are ready")


def busy(cluster: Cluster) -> dict[str, Any]:
    (row,) = until(lambda: [row for row in cluster.pilots() if row["cores_busy"]], "the task runs")
    return row


def test_torques_dialect_through_slurms_own_qsub(cluster: Cluster) -> None:
    pilots = ("-n", "2", "--cores", "4")  # a whole node each: the second comes to the other, if that takes a while
    options = (*pilots, "--batch", "torque", "--partition", "debug", "--walltime", "0:20:00", "--vpn", "none")
    answer = cluster.submit(*options)
    assert answer.stdout.startswith(f"submitted 2 pilots for queue {cluster.queue} to torque: ")
    both = cluster.directory / "both"  # the program must not end, and its jobs with it, before the second has come
    program = cluster.program(MANY, f"until test -e {both}; do sleep 0.1; done; hostname", "8")
    rows = ready(cluster, 2)
    both.touch()
    assert {row["hostname"] for row in rows} == {"cn1", "cn2"}
    assert all(0 < row["time_left"] <= 1200 for row in rows)
    lines = finished(program).splitlines()
    assert {line.split()[0] for line in lines} == {"success"}
    until(lambda: not cluster.jobs(), "the program's end ends its jobs")


def test_torques_jobs_wait_and_are_cancelled(cluster: Cluster) -> None:
    cluster.submit("-n", "3", "--batch", "torque", "--cores", "4", "--vpn", "none")
    rows = until(lambda: three_of(cluster), "two run and one waits")
    cluster.hpcq("cancel-pilots", "--name", cluster.queue, "--pending")
    assert sorted(row["state"] for row in cluster.pilots())[0] == "cancelled"
    shown = cluster.hpcq("pilots", "show", rows[0]["job_id"], "--name", cluster.queue).stdout
    assert "| #PBS -l nodes=1:ppn=4\n" in shown
    cluster.hpcq("cancel-pilots", "--name", cluster.queue, "--all")
    assert {row["state"] for row in cluster.pilots()} == {"cancelled"}


def three_of(cluster: Cluster) -> list[dict[str, Any]]:
    rows = cluster.pilots()
    return rows if sorted(row["state"] for row in rows) == ["pending", "running", "running"] else []


@pytest.mark.parametrize("batch", ["slurm", "torque"])
def test_what_a_task_leaves_in_a_session_of_its_own_ends_with_the_job(cluster: Cluster, batch: str) -> None:
    mark = cluster.directory / "pid"
    program = cluster.program(
        WAIT, f"setsid sh -c 'cut -d\" \" -f4 /proc/self/stat; exec sleep 617' & touch {mark}; sleep 617"
    )
    cluster.submit("--batch", batch, "--vpn", "none")
    row = busy(cluster)
    until(mark.exists, "its child runs")
    sleepers = until(lambda: both(pid for pid in pids() if words(pid) == ["sleep", "617"]), "both sleep")
    cluster.hpcq("cancel-pilots", row["job_id"], "--name", cluster.queue)
    until(lambda: not [pid for pid in sleepers if alive(pid)], "both are gone")
    ended(program, signal.SIGINT)


def both(found: Iterable[int]) -> list[int]:
    """Two, or none."""
    some = list(found)
    return some if len(some) == 2 else []


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def test_a_thousand_pilots_are_one_array(cluster: Cluster) -> None:
    answer = cluster.submit("-n", "1000", "--walltime", "1:00:00", "--option=--hold", "--vpn", "none")
    assert "submitted 1000 pilots" in answer.stdout
    assert len({job.partition("_")[0] for job in cluster.jobs()}) == 1
    rows = cluster.pilots()
    assert {(row["state"], row["reason"]) for row in rows} == {("held", "JobHeldUser")}
    assert len(rows) == 1000
    cluster.hpcq("cancel-pilots", "--name", cluster.queue, "--all")


def test_a_requeued_job_is_another_incarnation(cluster: Cluster) -> None:
    marks = cluster.directory / "marks"
    program = cluster.program(WAIT, f"echo $$ >> {marks}; test $(wc -l < {marks}) -ge 2 || sleep 600")
    cluster.submit("--vpn", "none")
    row = busy(cluster)
    until(lambda: written(marks), "the task runs")
    cluster.site.run("login", ["scontrol", "requeue", row["job_id"]], check=True)
    state = ["squeue", "-h", "-j", row["job_id"], "-o", "%T"]
    until(lambda: cluster.site.run("login", state).stdout.strip() == "PENDING", "it waits again", story=cluster.story)
    # If it begins in the second in which the first was ended, it counts as killed.
    until(lambda: cluster.start_requeued(row["job_id"], "now+3"), "it is told when to begin", story=cluster.story)
    until(lambda: len(marks.read_text().splitlines()) > 1, "it has begun again", story=cluster.story)
    output = finished(program)
    assert "done success 2 " in output
    assert len(marks.read_text().splitlines()) == 2


def test_several_nodes_are_one_job_with_a_pilot_on_each(cluster: Cluster) -> None:
    both = cluster.directory / "both"
    program = cluster.program(MANY, f"until test -e {both}; do sleep 0.1; done; hostname", "8")
    cluster.submit("--nodes", "2", "--vpn", "none", "--epilogue", "echo over on $(hostname)")
    rows = ready(cluster, 2)
    both.touch()
    assert {row["hostname"] for row in rows} == {"cn1", "cn2"}
    assert len({row["job_id"] for row in rows}) == 1
    assert {line.split()[0] for line in finished(program).splitlines()} == {"success"}
    until(lambda: not cluster.jobs(), "the program's end ends its job")
    shown = cluster.hpcq("pilots", "show", rows[0]["job_id"], "--name", cluster.queue).stdout
    assert "over on cn" in shown


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("epilogue", [(), ("--epilogue", "echo over")])
def test_tasks_of_a_cancelled_job_run_again_elsewhere(cluster: Cluster, nodes: str, epilogue: tuple[str, ...]) -> None:
    """Slurm signals every process of a job: that tasks die of it is no fault of theirs."""
    mark = cluster.directory / "mark"
    program = cluster.program(WAIT, f"test -e {mark} || {{ touch {mark}; sleep 600; }}")
    cluster.submit("--nodes", nodes, "--vpn", "none", *epilogue)
    row = busy(cluster)
    until(mark.exists, "the task runs")
    cluster.hpcq("cancel-pilots", row["job_id"], "--name", cluster.queue)
    cluster.submit("--vpn", "none")
    # A third time where the pilot of its job's other node was given it before Slurm's signal came there too.
    assert finished(program).startswith(("done success 2 ", "done success 3 ")[: int(nodes)])


def test_the_end_of_the_walltime_loses_no_result(cluster: Cluster) -> None:
    cluster.submit("--walltime", "60", "--cores", "2", "--vpn", "none")
    program = cluster.program(MANY, "sleep 1; echo $HPCQ_TASK_ID", "100")
    until(lambda: not cluster.jobs(), "its walltime has ended")
    assert [row for row in cluster.pilots() if row["tasks_done"]], "its pilot has worked"
    cluster.submit("-n", "2", "--cores", "4", "--vpn", "none")
    lines = [line.split() for line in finished(program).splitlines()]
    assert [line[:2] for line in lines] == [["success", "1"]] * 100
    assert len({line[3] for line in lines}) == 100


def test_settings_of_a_site(cluster: Cluster) -> None:
    home = Path(cluster.site.home)
    file = home / ".config/hpcq/config.toml"
    text = '[site.here]\nbatch = "slurm"\npartition = "debug"\ncores = 3\nwalltime = "0:10:00"\n'
    script = f"mkdir -p {file.parent}; cat > {file}"
    subprocess.run(
        cluster.site.command("login", ["sh", "-c", script]),
        input=text,
        text=True,
        check=True,
        env=cluster.site.environment(True),
    )
    try:
        answer = cluster.hpcq("submit-pilots", "--name", cluster.queue, "--create", "--site", "here", "--dry-run")
        assert "#SBATCH --partition=debug" in answer.stdout
        assert "#SBATCH --cpus-per-task=3" in answer.stdout
        told = json.loads(cluster.hpcq("config", "--site", "here", "--json").stdout)
        assert told["settings"]["cores"] == {"value": 3, "origin": f"{file} [site.here]"}
    finally:
        file.unlink()
