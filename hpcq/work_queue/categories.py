"""Categories as Work Queue has them, and what of them hpcq's scheduler is told.

Cores and GPUs of a category are added to its tasks when they are submitted; memory and disk are the scheduler's, which
learns them where the mode says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcq.work_queue import constants as c
from hpcq.work_queue.constants import unsupported

MODES = {
    c.WORK_QUEUE_ALLOCATION_MODE_FIXED: "fixed",
    c.WORK_QUEUE_ALLOCATION_MODE_MAX: "max",
    c.WORK_QUEUE_ALLOCATION_MODE_MAX_THROUGHPUT: "max_throughput",
}
"""Modes of Work Queue as those of `hpcq.Queue.category`."""

RESOURCES = ("cores", "memory", "disk", "gpus")


class Category:
    """One category: what was specified for it and how many of its tasks are out."""

    def __init__(self, name: str, mode: int) -> None:
        self.name = name
        self.mode = mode
        self.max: dict[str, int] = {}
        self.min: dict[str, int] = {}
        self.guess: dict[str, int] = {}
        self.max_concurrent = -1
        self.out = self.submitted = self.done = self.failed = self.cancelled = 0

    @property
    def learns(self) -> bool:
        """Whether what its tasks get follows what others used."""
        return self.mode != c.WORK_QUEUE_ALLOCATION_MODE_FIXED

    @property
    def is_full(self) -> bool:
        """Whether no more of its tasks may be out."""
        return 0 <= self.max_concurrent <= self.out

    def added(self) -> dict[str, int]:
        """What its tasks get that they do not ask for themselves, as far as it is known at ``submit``."""
        names = ("cores", "gpus") if self.learns else RESOURCES
        added = {name: max(self.max.get(name, 0), self.min.get(name, 0)) for name in names}
        return {name: amount for name, amount in added.items() if amount}

    def learned(self) -> dict[str, Any]:
        """The arguments of `hpcq.Queue.category` for a category that learns.

        Raises:
            NotImplementedError: a minimum of memory or disk in a category that learns them.
        """
        for name in ("memory", "disk"):
            if self.learns and self.min.get(name):
                unsupported(f"a minimum of {name} in a category that learns", "give it a first allocation guess")
        guess = {name: self.guess.get(name, self.max.get(name, 0)) for name in ("memory", "disk")}
        limits = {f"max_{name}": self.max.get(name, 0) for name in ("memory", "disk")}
        return {"mode": MODES[self.mode], **guess, **limits}


def check_mode(mode: int) -> int:
    """A mode that can be honoured.

    Raises:
        NotImplementedError: Work Queue has it and hpcq does not.
        ValueError: there is no such mode.
    """
    if mode in MODES:
        return mode
    if c.WORK_QUEUE_ALLOCATION_MODE_FIXED <= mode <= c.WORK_QUEUE_ALLOCATION_MODE_QUANTIZED_BUCKETING:
        unsupported(f"allocation mode {mode}", "use WORK_QUEUE_ALLOCATION_MODE_MAX_THROUGHPUT or …_MAX")
    raise ValueError(f"{mode!r} is not an allocation mode")


def check_resources(what: str, given: Mapping[str, Any], allowed: tuple[str, ...] = RESOURCES) -> dict[str, int]:
    """Resources by name as whole numbers, without those that are negative (not set).

    Raises:
        NotImplementedError: a resource that cannot be set there.
    """
    for name in given:
        if name not in allowed:
            unsupported(f"{name!r} in {what}", f"it takes {', '.join(allowed)}")
    return {name: int(amount) for name, amount in given.items() if amount >= 0}
