"""What one task takes of a pilot, as one value that compares and hashes."""

from __future__ import annotations

import math

import msgspec

from hpcq.scheduler.events import NO_FEATURES, NewTask


class Needs(msgspec.Struct, frozen=True, gc=False):
    """What one task takes of a pilot. ``whole``: all of one that has at least so much, with nothing beside it."""

    cores: int
    memory: int = 0
    network: str = "any"
    disk: int = 0
    gpus: int = 0
    features: frozenset[str] = NO_FEATURES
    walltime: float = 0.0
    whole: bool = False

    @classmethod
    def of(cls, task: NewTask) -> Needs:
        """A new task's own needs, its walltime rounded up to two figures so that few differ."""
        walltime = round_up(task.walltime) if task.walltime else 0.0
        return cls(task.cores, task.memory, task.network, task.disk, task.gpus, task.features, walltime)


def round_up(value: float) -> float:
    """Up to two significant figures: 5400 stays, 5401 becomes 5500."""
    if value <= 10:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit - 1e-9) * unit
