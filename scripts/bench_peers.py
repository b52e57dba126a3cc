"""hpcq and other systems on the same work, alternately, in one sitting: medians of several rounds as a table.

Each system gets a virtual environment of its own below the cache directory, made by name from the package index at the
first run. One that cannot be installed, or fails, is a row that says why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import PEERS

INSTALL_TIMEOUT = 900.0
PROGRAMS = Path(__file__).with_name("peers.py")

NEEDS = {
    "process_pool": "",
    "distributed": "distributed",
    "parsl": "parsl",
    "executorlib": "executorlib",
    "ray": "ray",
    "hyperqueue": "hyperqueue",
    "taskvine": "ndcctools",
    "work_queue": "ndcctools",
}
"""The distribution of each; empty: it comes with Python."""

SYSTEM_MODULES = {"taskvine": ("ndcctools.taskvine",), "work_queue": ("ndcctools.work_queue", "work_queue")}
"""Modules of the system's own Python that do as well: cctools are in Debian and conda-forge."""

DEBIAN = "coop-computing-tools python3-workqueue python3-cloudpickle python3-dill"
HINTS = {"work_queue": f"; Debian has it: apt-get install {DEBIAN}"}

COLUMNS = (
    ("python", "Python tasks/s", ",.0f"),
    ("executor", "as executor/s", ",.0f"),
    ("round_trip_ms", "round trip ms", ".2f"),
    ("shell", "shell tasks/s", ",.0f"),
)


class PeerError(Exception):
    """A system cannot be measured; says why, in one line."""


def environments() -> Path:
    """Where the systems' environments are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hpcq" / f"peers-{platform.python_version()}"


def python_for(peer: str) -> str:
    """A Python that has the system, installed now if need be.

    Raises:
        PeerError: it cannot be installed.
    """
    if not NEEDS[peer]:
        return sys.executable
    for module in SYSTEM_MODULES.get(peer, ()):
        found = subprocess.run(["/usr/bin/python3", "-c", f"import {module}"], capture_output=True, check=False)
        if found.returncode == 0:
            return "/usr/bin/python3"
    venv = environments() / NEEDS[peer]
    if not (venv / "complete").exists():
        try:
            install(NEEDS[peer], venv)
        except PeerError as error:
            raise PeerError(f"{error}{HINTS.get(peer, '')}") from None
    return str(venv / "bin" / "python")


def install(package: str, venv: Path) -> None:
    """Make the environment anew; the mark that it is complete comes last."""
    shutil.rmtree(venv, ignore_errors=True)
    venv.parent.mkdir(parents=True, exist_ok=True)
    print(f"installing {package} …", file=sys.stderr)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", package]
    for command in ([sys.executable, "-m", "venv", str(venv)], pip):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{package} was not installed within {INSTALL_TIMEOUT:.0f} s") from None
        if done.returncode:
            raise PeerError(f"{package} cannot be installed: {last_line(done.stderr)}")
    (venv / "complete").touch()


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["it says nothing"])[-1]


def run(argv: list[str], timeout: float) -> dict[str, Any]:
    """The figures that a program prints last; everything it started is ended with it."""
    directory = tempfile.mkdtemp(prefix="hpcq-peers-")
    path = f"{Path(argv[0]).parent}:{os.environ['PATH']}"
    if not Path(argv[0]).with_name("python").exists():  # Debian's own has no such name, which Work Queue calls
        Path(directory, "python").symlink_to(argv[0])
        path = f"{directory}:{path}"
    environment = {**os.environ, "PATH": path, "XDG_STATE_HOME": directory}
    process = subprocess.Popen(
        argv, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise PeerError(f"did not finish within {timeout:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        shutil.rmtree(directory, ignore_errors=True)
    if process.returncode:
        raise PeerError(f"ended with status {process.returncode}: {last_line(errors)}")
    figures: dict[str, Any] = json.loads(output[output.rindex("\n{") :] if "\n{" in output else output)
    return figures


def measure(name: str, count: int, workers: int, timeout: float) -> dict[str, float]:
    """One round of one system."""
    if name != "hpcq":
        return run([python_for(name), str(PROGRAMS), name, str(count), str(workers)], timeout)
    argv = [sys.executable, "-m", "hpcq", "bench", "tasks", "--cores", str(workers), "-n", str(count), "--repeat", "1"]
    told = run([*argv, "--json"], timeout)
    return {
        "python": told["python"]["per_second"],
        "executor": told["executor"]["per_second"],
        "round_trip_ms": told["round_trip"]["p50_ms"],
        "shell": told["shell"]["per_second"],
    }


def sitting(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rounds; for each system its medians, or why there are none."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for name in names:
            if name in failed:
                continue
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
            try:
                rounds[name].append(measure(name, options.count, options.workers, options.timeout))
            except PeerError as error:
                failed[name] = str(error)
    return {name: summary(rounds[name], failed.get(name, "")) for name in names}


def summary(rounds: list[dict[str, float]], failed: str) -> dict[str, Any]:
    """Medians of what was measured."""
    found: dict[str, Any] = {"rounds": len(rounds)}
    if failed:
        found["failed"] = failed
    for column, _, _ in COLUMNS:
        values = [one[column] for one in rounds if column in one]
        if values:
            found[column] = statistics.median(values)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = ["system        " + "".join(f"{head:>16}" for _, head, _ in COLUMNS)]
    for name, row in results.items():
        cells = [f"{row[column]:{form}}" if column in row else "-" for column, _, form in COLUMNS]
        lines.append(f"{name:<14}" + "".join(f"{cell:>16}" for cell in cells))
        if "failed" in row:
            lines.append(f"{'':14}  {row['failed']}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="scripts/bench-peers", description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--count", type=int, default=5000, help="Python tasks a round [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are told [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="workers of one core each [%(default)s]")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one system's round [%(default)s]")
    parser.add_argument("--only", action="append", choices=sorted(PEERS), help="these beside hpcq")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if min(options.count, options.rounds, options.workers) < 1:
        parser.error("--count, --rounds and --workers must be at least 1")
    results = sitting(["hpcq", *(options.only or PEERS)], options)
    about = {
        "hostname": platform.node(), "cpus": os.cpu_count(), "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"), "count": options.count, "rounds": options.rounds,
        "workers": options.workers,
    }  # fmt: skip
    head = " ".join(f"{key}={value}" for key, value in about.items())
    text = json.dumps({**about, "systems": results}, indent=2) if options.json else f"{head}\n{table(results)}"
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 1 if "failed" in results["hpcq"] else 0


if __name__ == "__main__":
    sys.exit(main())
