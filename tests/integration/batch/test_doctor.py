"""``hpcq doctor`` with pilots on this host: what it says, its exit status, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DEADLINE = 120.0
SLEEP = ("--environment-setup", "sleep 600")


class Doctor:
    """Runs it with a state directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "XDG_STATE_HOME": str(home)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpcq", "doctor", "--batch", "local", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *arguments: str, status: int = 0) -> str:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == status, output + errors
        return output

    def started(self, *arguments: str) -> subprocess.Popen[str]:
        """One whose pilot never comes, with its job submitted."""
        process = self.start(*SLEEP, *arguments)
        assert process.stderr is not None
        lines: list[str] = []
        while not (lines and "is submitted" in lines[-1]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        return process

    def left(self) -> list[str]:
        """What is in the directories of queues and gateways."""
        return [str(path) for path in self.home.glob("*/*")]


@pytest.fixture
def doctor(tmp_path: Path) -> Iterator[Doctor]:
    one = Doctor(tmp_path / "state")
    yield one
    assert one.left() == []


def test_it_brings_tunnels_up_and_leaves_nothing(doctor: Doctor) -> None:
    report = json.loads(doctor.run("--json"))
    modes = {mode["mode"]: mode for mode in report["modes"]}
    assert list(modes) == ["relay", "openconnect", "socks", "slirp", "none"]
    assert modes["socks"]["verdict"] == "works"
    assert modes["socks"]["seconds"] > 0
    assert [mode for mode in modes.values() if mode["verdict"] == "fails" and not mode["reasons"]] == []
    assert {"state directory", "gateway"} <= {check["name"] for check in report["login"]["capabilities"]["checks"]}
    assert report["node"]["hostname"] == report["login"]["hostname"]
    assert report["works"] is True


def test_a_target_must_answer_through_the_mode(doctor: Doctor) -> None:
    output = doctor.run("--vpn", "none", "--require", "http://127.0.0.1:1/", status=5)
    assert "none         does not work, because it comes up, but 127.0.0.1 port 1: connection refused" in output


def test_one_mode_that_is_not_tried_is_not_called_working(doctor: Doctor) -> None:
    output = doctor.run("--vpn", "none", status=5)
    assert output.splitlines()[-1] == "no mode works; the lines above say what to ask the site for"


def test_without_a_pilot_nothing_is_submitted(doctor: Doctor) -> None:
    output = doctor.run("--no-pilot")
    assert "compute node" not in output.replace("only a compute node can tell", "")
    assert "may work: nothing on this host forbids it" in output


def test_a_pilot_that_cannot_start_is_told_with_its_output(doctor: Doctor) -> None:
    setup = ("--environment-setup", "echo the node is on fire", "--environment-setup", "exit 7")
    output = doctor.run("--vpn", "none", *setup, status=5)
    assert "compute node: not seen, because" in output
    assert "the node is on fire" in output


def test_a_host_without_the_programs_is_told_what_it_lacks(doctor: Doctor) -> None:
    doctor.environment["PATH"] = str(doctor.home / "empty")
    output = doctor.run("--batch", "slurm", "--vpn", "none", status=5)
    assert "  NO   sbatch           sbatch was not found on PATH: this is no host to submit to slurm from" in output
    assert "  NO   slirp4netns      slirp4netns was not found on PATH: install slirp4netns" in output
    assert "compute node: not seen, because" in output


def test_a_job_that_does_not_start_in_time_is_told(doctor: Doctor) -> None:
    output = doctor.run("--vpn", "none", *SLEEP, "--timeout", "2", status=5)
    assert "is still running, and no pilot has come from it; wait longer with --timeout" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_leaves_nothing(doctor: Doctor, number: signal.Signals) -> None:
    process = doctor.started()
    process.send_signal(number)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number


def test_its_gateway_ends_even_when_it_is_killed(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path / "state")
    process = doctor.started()
    (record,) = doctor.home.glob("hpcq-gateway/*/gateway.json")
    gateway = os.pidfd_open(json.loads(record.read_text())["pid"])
    try:
        process.kill()
        process.communicate(timeout=DEADLINE)
        assert select.select([gateway], [], [], DEADLINE)[0]
    finally:
        os.close(gateway)
        (queue,) = (doctor.home / "hpcq").iterdir()
        cancel = [sys.executable, "-m", "hpcq", "cancel-pilots", "--name", queue.name, "--all"]
        subprocess.run(cancel, env=doctor.environment, check=True, capture_output=True, timeout=DEADLINE)
