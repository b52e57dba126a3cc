"""How runners end, in words."""

from __future__ import annotations

import signal

ENDED_FROM_OUTSIDE = (-signal.SIGTERM, -signal.SIGKILL)
"""Exit statuses of what a batch system ends with its job: it signals every process of it, tasks among them."""

CODES_FROM_OUTSIDE = frozenset({*ENDED_FROM_OUTSIDE, 128 + signal.SIGTERM, 128 + signal.SIGKILL})
"""Those of commands: also what a shell says when its child was ended."""

NEWS_TIMEOUT = 0.3
"""Seconds in which we hear that the job is being ended, when a task dies of that before our own signal has arrived."""

START_FAILURES = 3
"""Runners in a row that end before they are ready: then something is wrong with this host."""


def how_it_died(status: int) -> str:
    """A runner's end in words."""
    if status >= 0:
        return f"its process ended itself with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    hint = "; the kernel does this when memory runs out" if -status == signal.SIGKILL else ""
    return f"its process was killed by signal {-status} ({name}){hint}"


def start_failure(status: int, errors: bytes) -> str:
    """What to tell when runners never get ready; ``errors`` is what the last wrote."""
    lines = errors.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"{START_FAILURES} runners in a row ended before they were ready ({how_it_died(status)}{last})"
