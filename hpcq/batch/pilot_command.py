"""The command line of a pilot: the same from ``hpcq submit-pilots`` and from ``Queue.submit_pilots``. Pure.

It holds no secret: the pilot reads keys from the connection file, which only its owner can read. The batch
job's id is not in it, since it is not known yet; a pilot finds it in its environment (``SLURM_…``, or
``HPCQ_JOB_ID`` that our own scripts set).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def pilot_argv(
    connection: Path | None,
    *,
    batch: str,
    cores: int | None = None,
    memory_mb: int | None = None,
    disk_mb: int | None = None,
    gpus: int | None = None,
    walltime_s: int | None = None,
    tunnel: Sequence[str] = (),
    gateway: str | None = None,
    cvmfs: str | None = None,
    require: Sequence[str] = (),
    scratch: Path | None = None,
    cache_mb: int | None = None,
    manager_timeout_s: float | None = None,
    drain_timeout_s: float | None = None,
    python: Sequence[str] = (sys.executable,),
) -> tuple[str, ...]:
    """Return the command that starts a pilot of the queue whose connection file is ``connection``; None: what would be
    in it comes on standard input.

    ``-P`` keeps the directory it starts in off its module path: a random.py there must not become ours.

    ``memory_mb``, ``disk_mb`` and ``cache_mb`` are in MB of 2**20 bytes, those that end in ``_s`` in seconds.
    ``tunnel`` is the tunnel's mode and settings, as arguments. What is None or empty is left out, and the pilot uses
    what it finds. Paths are made absolute: the job starts somewhere else.
    """
    source = "-" if connection is None else str(connection.absolute())
    argv = [*python, "-P", "-m", "hpcq.pilot", "--connection", source]
    for option, value in (
        ("--cores", cores),
        ("--memory", memory_mb),
        ("--disk", disk_mb),
        ("--gpus", gpus),
        ("--walltime", walltime_s),
        ("--cache-size", cache_mb),
    ):
        if value is not None:
            argv += [option, str(value)]
    argv += tunnel
    for option, text in (("--gateway", gateway), ("--cvmfs", cvmfs)):
        if text is not None:
            argv += [option, text]
    for target in require:
        argv += ["--require", target]
    if scratch is not None:
        argv += ["--scratch", str(scratch)]
    for option, seconds in (("--manager-timeout", manager_timeout_s), ("--drain-timeout", drain_timeout_s)):
        if seconds is not None:
            argv += [option, f"{seconds:g}"]
    return (*argv, "--batch", batch)
