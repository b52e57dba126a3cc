"""Whether anything of an ended site is still on the machine. Run outside the site.

A site is known by its identity (`scripts/site run --identity FILE`): the numbers of its namespaces, and what was
mounted before it. The kernel gives the numbers of dropped namespaces out again, so only processes started before
the site ended count.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from simulated_site import plan

GONE_DEADLINE = 60.0
ASK_INTERVAL = 0.05
STARTED_FIELD = 19  # of /proc/PID/stat, counted from the state behind the name


def remaining(identity: Path, deadline: float = GONE_DEADLINE) -> list[str]:
    """What is left of the site after at most `deadline` seconds (the kernel ends processes in its own time)."""
    known = json.loads(identity.read_text())
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    return _until_none(
        lambda: [*processes(known["namespaces"], ended), *mounts(known["mounts"]), *control_groups()], deadline
    )


def processes_naming(text: str, deadline: float = GONE_DEADLINE) -> list[str]:
    """Our processes that have `text` in their environment, after at most `deadline` seconds."""
    return _until_none(lambda: list(_naming(text.encode())), deadline)


def _naming(text: bytes) -> Iterator[str]:
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if directory.name != str(os.getpid()) and text in (directory / "environ").read_bytes():
                yield f"process {directory.name} ({(directory / 'comm').read_text().strip()})"


def _until_none(look: Callable[[], list[str]], deadline: float) -> list[str]:
    limit = time.monotonic() + deadline
    while (found := look()) and time.monotonic() < limit:
        select.select([], [], [], ASK_INTERVAL)
    return found


def processes(numbers: dict[str, int], ended: float) -> Iterator[str]:
    """Processes in one of the site's namespaces."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or belongs to somebody else
            kinds = [kind for kind, number in numbers.items() if (directory / "ns" / kind).stat().st_ino == number]
            if kinds and started(directory) < ended:
                yield f"process {directory.name} ({(directory / 'comm').read_text().strip()}) in its {kinds} namespaces"


def started(directory: Path) -> float:
    """Start of a process, in seconds since boot."""
    behind_name = (directory / "stat").read_text().rpartition(")")[2].split()
    return int(behind_name[STARTED_FIELD]) / os.sysconf("SC_CLK_TCK")


def mounts(before: list[str]) -> Iterator[str]:
    """Mounts of a site that reached our own table (in a site within a site there are some before)."""
    for point in mount_points():
        if point.startswith(str(plan.ROOT)) and point not in before:
            yield f"mount {point}"


def mount_points() -> list[str]:
    """Where something is mounted here."""
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def control_groups() -> Iterator[str]:
    """Groups a slurmd made; the machine's own Slurm, if any, makes them under system.slice."""
    for depth in ("*", "*/*"):
        for path in Path("/sys/fs/cgroup").glob(f"{depth}/slurm*"):
            if "system.slice" not in path.parts:
                yield f"control group {path}"
