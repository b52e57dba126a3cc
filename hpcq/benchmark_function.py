"""The functions that benchmarks have called, alone: the interpreters that call them import nothing else for it."""

from __future__ import annotations

import time


def inc(x: int) -> int:
    """The smallest function worth calling."""
    return x + 1


def work(seconds: float) -> float:
    """Takes so long."""
    time.sleep(seconds)
    return seconds
