"""The table of ``scripts/bench-peers``: medians, and a row for what cannot be measured."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        spec = importlib.util.spec_from_file_location("bench_peers", SCRIPTS / "bench_peers.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


OPTIONS = argparse.Namespace(rounds=3, count=10, workers=2, timeout=5.0)


def test_medians_and_reasons(bench, monkeypatch):
    asked = []

    def measure(name, count, workers, timeout):
        asked.append(name)
        if name == "ray":
            raise bench.PeerError("ray cannot be installed: no wheel")
        return {"python": 100.0 * len(asked), "round_trip_ms": 1.0}

    monkeypatch.setattr(bench, "measure", measure)
    results = bench.sitting(["hpcq", "ray", "parsl"], OPTIONS)
    assert asked == ["hpcq", "ray", "parsl", "hpcq", "parsl", "hpcq", "parsl"]  # in turns, a failure once
    assert results["hpcq"] == {"rounds": 3, "python": 400.0, "round_trip_ms": 1.0}
    assert results["ray"] == {"rounds": 0, "failed": "ray cannot be installed: no wheel"}
    table = bench.table(results)
    assert "400" in table
    assert "ray cannot be installed: no wheel" in table


def test_every_system_has_a_program_and_says_what_it_needs(bench):
    assert set(bench.NEEDS) == set(bench.PEERS)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('ERROR: it broke')", "ended with status 1: ERROR: it broke"),
        ("import time; time.sleep(600)", "did not finish within 1 s"),
    ],
)
def test_a_program_that_fails_or_hangs_is_a_reason(bench, code, reason):
    with pytest.raises(bench.PeerError, match=reason):
        bench.run([sys.executable, "-c", code], 1.0 if "sleep" in code else 30.0)


def test_figures_are_the_last_line(bench):
    assert bench.run([sys.executable, "-c", "print('noise {'); print('\\n{\"python\": 3}')"], 30.0) == {"python": 3}


def test_the_program_of_a_peer_runs(bench):
    done = subprocess.run(
        [sys.executable, SCRIPTS / "peers.py", "process_pool", "50", "2"], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["python"] > 0
    assert figures["round_trip_ms"] > 0
