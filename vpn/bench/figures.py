"""From samples to figures. Pure."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Sequence

Samples = Sequence[Sequence[float]]
"""(time in s, bytes received until then), in order of time."""


def bytes_at(samples: Samples, when: float) -> float:
    """Bytes received until ``when``, between two samples in proportion."""
    after = bisect.bisect_left(samples, when, key=lambda sample: sample[0])
    if after == 0:
        return 0.0
    if after == len(samples):
        return samples[-1][1]
    (t0, b0), (t1, b1) = samples[after - 1], samples[after]
    return b0 + (b1 - b0) * (when - t0) / (t1 - t0)


def common_rates(workers: Sequence[Samples], warmup: float) -> list[float]:
    """Bits per second of each worker while all of them were past their first ``warmup`` seconds and at work.

    Raises:
        ValueError: there was no such time.
    """
    begin = max(samples[0][0] for samples in workers) + warmup
    end = min(samples[-1][0] for samples in workers)
    if end - begin <= 0:
        raise ValueError("the workers were not at work at the same time: the machine is overloaded")
    return [8 * (bytes_at(samples, end) - bytes_at(samples, begin)) / (end - begin) for samples in workers]


def fairness(rates: Sequence[float]) -> float:
    """Jain's index: 1 when all have the same, 1/n when one has all."""
    squares = sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / (len(rates) * squares) if squares else 0.0


def ratio(value: float | None, base: float | None) -> float | None:
    """``value / base``, None when one is missing or the base is nothing."""
    return value / base if value is not None and base else None


def median(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None
