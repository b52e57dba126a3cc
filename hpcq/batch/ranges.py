"""Numbers as batch systems write them: 0, 1, 2, 5 → "0-2", "5". Pure."""

from __future__ import annotations

from collections.abc import Iterable


def ranges(indexes: Iterable[int]) -> list[str]:
    """Return the runs of consecutive numbers among ``indexes``, in order, repeated ones once."""
    runs: list[list[int]] = []
    for index in sorted(set(indexes)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]
