"""How tasks end, and what is kept of it: names and plain values, shared by all that handle tasks.

Every runner of every pilot imports this, so it imports next to nothing.
May not live here: what follows from an outcome.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes of standard output, and as many of standard error, that are kept whole for a task."""


class Outcome(enum.StrEnum):
    """How a task ended."""

    SUCCESS = "success"
    EXCEPTION = "exception"
    EXIT_CODE = "exit_code"
    WALLTIME = "walltime"
    RESOURCES = "resources"
    LOST = "lost"
    CRASH = "crash"
    NETWORK = "network"
    CANCELLED = "cancelled"
    UNSERIALIZABLE = "unserializable"
    FILES = "files"


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """What the queue knows of a finished task; times are wall-clock seconds since the epoch, by the pilot's clock.

    ``load`` is a large value or exception (`hpcq.parcels.Load`); ``payload`` is empty then. ``sent`` and ``received``
    are bytes through the tunnel, None where they were not counted.
    """

    outcome: Outcome
    message: str = ""
    payload: bytes = b""
    exit_code: int | None = None
    std_output: bytes = b""
    std_error: bytes = b""
    left_out: int = 0
    pilot: str | None = None
    hostname: str | None = None
    attempts: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    memory: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0
    load: Any = None
    sent: int | None = None
    received: int | None = None
