"""The function that `hpcq.benchmark` has called, alone: the interpreters that call it import nothing else for it."""

from __future__ import annotations


def inc(x: int) -> int:
    """The smallest function worth calling."""
    return x + 1
