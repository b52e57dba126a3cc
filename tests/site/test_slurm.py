"""Slurm of the site is the real one and runs jobs of the ordinary user on both nodes."""

from __future__ import annotations

from pathlib import Path

from cluster import DEADLINE
from simulated_site.client import Site


def test_both_nodes_are_there_in_both_partitions(slurm: Site) -> None:
    lines = slurm.run("login", ["sinfo", "--noheader", "--Node", "--format=%N %P"], check=True).stdout.split("\n")
    assert {"cn1 normal*", "cn2 normal*", "cn1 debug", "cn2 debug"} <= {line.strip() for line in lines}


def test_a_job_runs_as_the_user_on_each_node(slurm: Site) -> None:
    command = ["srun", "--nodes=2", "--ntasks=2", "sh", "-c", "echo $(hostname) $(id -un) $(pwd)"]
    output = slurm.run("login", command, check=True, timeout=DEADLINE).stdout
    assert sorted(output.splitlines()) == [f"{host} {slurm.user} {slurm.home}" for host in ("cn1", "cn2")]


def test_a_job_can_make_user_namespaces(slurm: Site) -> None:
    script = "test -w /dev/net/tun && unshare --user --map-root-user --net --mount id -u"
    command = ["srun", "sh", "-c", script]
    assert slurm.run("login", command, check=True, timeout=DEADLINE).stdout == "0\n"


def test_a_batch_job_writes_to_the_shared_home(slurm: Site, shared_path: Path) -> None:
    script = '#!/bin/bash\nhostname\ntest -n "$SLURM_JOB_ID"\n'
    output = shared_path / "job.out"
    command = ["sbatch", "--parsable", "--wait", "--partition=debug", f"--output={output}"]
    slurm.run("login", command, stdin=script, check=True, timeout=DEADLINE)
    assert output.read_text().strip() in {"cn1", "cn2"}


def test_a_cancelled_job_is_gone(slurm: Site) -> None:
    job = slurm.run("login", ["sbatch", "--parsable", "--wrap", "sleep 600"], check=True).stdout.strip()
    slurm.run("login", ["scancel", job], check=True)
    state = slurm.run("login", ["scontrol", "show", "job", job], check=True).stdout
    assert "JobState=CANCELLED" in state or "JobState=COMPLETING" in state


def test_more_than_a_node_has_is_refused(slurm: Site) -> None:
    answer = slurm.run("login", ["sbatch", "--cpus-per-task=5", "--wrap", "true"])
    assert answer.returncode != 0
    assert "cannot be satisfied" in answer.stderr + answer.stdout or "not available" in answer.stderr
