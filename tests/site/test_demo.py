"""The demo runs to its end, and leaves its plot and nothing else. It builds a site of its own, within this one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from simulated_site.client import Site

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
DEMO_DEADLINE = 600


def environment(site: Site) -> dict[str, str]:
    return dict(os.environ) | {"HPCQ_PYTHON": site.description["python"]}


@pytest.mark.timeout(DEMO_DEADLINE)
@pytest.mark.parametrize("batch", ["slurm", "pbs"])
def test_the_demo_finds_the_z_boson(xrootd: Site, shared_path: Path, batch: str) -> None:
    command = [str(DEMO), f"--output={shared_path}/z.png", f"--batch={batch}"]
    answer = subprocess.run(command, env=environment(xrootd), capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Z peak at 90." in answer.stdout or "Z peak at 91." in answer.stdout
    assert "nothing is left of it" in answer.stdout
    assert (shared_path / "z.png").read_bytes().startswith(b"\x89PNG")
    for node in ("cn1", "cn2"):
        assert f"pilot on {node}: DTLS tunnel" in answer.stdout or f"pilot on {node}: TLS tunnel" in answer.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_told_to_end_leaves_nothing(xrootd: Site, shared_path: Path, number: signal.Signals) -> None:
    command = [str(DEMO), f"--output={shared_path}/z.png"]
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, env=environment(xrootd), **pipes) as demo:
        assert demo.stdout
        while not (line := demo.stdout.readline()).startswith("== 3"):
            assert line, "the demo ended too early"
        os.killpg(demo.pid, number)
        rest = demo.stdout.read()
        assert demo.wait(180) == 128 + number
    if number == signal.SIGINT:
        assert "nothing is left of it" in rest
