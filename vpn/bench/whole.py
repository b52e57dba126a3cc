"""Every goal there is, on the simulated site: one run of the harness for each link, and one table of all.

Each run is a process of its own, in a site of its own with that link; what one cannot measure is said, and the next
goes on.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vpn.bench.plan import Link, Plan, Way
from vpn.bench.report import Report

SITE_SECONDS = 6.0
"""Seconds a site takes to be built and to end."""
GOAL_MISSED = 1


@dataclass(frozen=True)
class Part:
    """One run: what the goals of a link need."""

    link: str
    ways: tuple[str, ...]
    workers: int = 1
    rounds: int = 3
    seconds: float = 2.0
    copies: bool = False

    def plan(self) -> Plan:
        """What it does."""
        ways, link = tuple(map(Way.parse, self.ways)), Link.parse(self.link)
        return Plan(
            ways, (self.workers,), rounds=self.rounds, seconds=self.seconds, round_trip=link.round_trip,
            copies=self.copies,
        )  # fmt: skip

    def arguments(self, output: str) -> list[str]:
        """Of ``vpn bench``."""
        modes = [word for way in self.ways for word in ("--mode", way)]
        figures = ["--workers", str(self.workers), "--rounds", str(self.rounds), "--seconds", str(self.seconds)]
        copies = [] if self.copies else ["--no-xrdcp"]
        return ["--site", "--link", self.link, *modes, *figures, *copies, "--output", output]


PARTS = (
    Part("1gbit,20ms", ("relay", "openconnect", "socks", "plain", "prototype"), seconds=1.5, copies=True),
    Part("200mbit,20ms", ("relay", "openconnect", "socks"), workers=20, seconds=1.5),
    Part("100mbit,150ms", ("relay", "openconnect"), rounds=2),
    Part("unshaped", ("relay:tls=no", "relay", "openconnect"), seconds=1.5),
)


class Whole(msgspec.Struct):
    """What all of them found; ``problems`` of those that found nothing."""

    reports: list[Report]
    problems: list[str] = []

    @property
    def missed(self) -> bool:
        """Whether a goal was missed, or a run."""
        return bool(self.problems) or any(goal.ok is False for report in self.reports for goal in report.goals)


def duration(parts: Sequence[Part] = PARTS) -> float:
    """Seconds it takes, about."""
    return sum(SITE_SECONDS + part.plan().duration() for part in parts)


def measure(say: Callable[[str], None], parts: Sequence[Part] = PARTS) -> Whole:
    """Do all of them, one after the other."""
    whole = Whole([])
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        for number, part in enumerate(parts, 1):
            say(f"link {part.link}, {number} of {len(parts)}")
            output = Path(directory, f"{number}.json")
            argv = [sys.executable, "-P", "-m", "vpn", "bench", *part.arguments(str(output))]
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
            if done.returncode in (0, GOAL_MISSED) and output.exists():
                whole.reports.append(msgspec.json.decode(output.read_bytes(), type=Report))
            else:
                whole.problems.append(f"link {part.link}: nothing measured (status {done.returncode}; see above)")
                say(whole.problems[-1])
    return whole
