"""What of this host is the pilot's own: which CPUs it may pin tasks to, which GPUs it was given, how much disk it has.

CPUs are pinned only when they are certainly ours: the batch system gave us a set with one CPU (or all hardware threads
of one core) for each core we have. Two pilots that both believed a node to be theirs would pin to the same CPUs.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger("hpcq.pilot")

Cpus = tuple[tuple[int, ...], ...]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS",
)  # fmt: skip


def own_cpus(cores: int, batch: str) -> Cpus:
    """The CPUs of each of the pilot's cores; nothing when they are not known to be its own, which is logged."""
    if batch == "local":
        return ()  # others share this host, pilots of ours among them
    allowed = sorted(os.sched_getaffinity(0))
    siblings = sorted({tuple(sorted(_siblings(cpu) & set(allowed))) for cpu in allowed})
    chosen = divide(cores, allowed, siblings)
    if not chosen:
        log.info("tasks are not pinned to CPUs: %d cores, but we may run on %d CPUs", cores, len(allowed))
    return chosen


def divide(cores: int, allowed: Sequence[int], siblings: Sequence[tuple[int, ...]]) -> Cpus:
    """One CPU for each core, or one group of ``siblings``; nothing when neither comes out even."""
    if len(allowed) == cores:
        return tuple((cpu,) for cpu in allowed)
    return tuple(siblings) if len(siblings) == cores else ()


def _siblings(cpu: int) -> set[int]:
    try:
        text = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except OSError:
        return {cpu}
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found | {cpu}


def own_gpus(count: int | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Devices by the names CUDA takes: those the batch system says, else numbers from 0; at most ``count``.

    Raises:
        ValueError: there are fewer than ``count``.
    """
    told = environment.get("CUDA_VISIBLE_DEVICES", environment.get("SLURM_JOB_GPUS"))
    if told is None:
        return tuple(map(str, range(count or 0)))
    devices = tuple(name.strip() for name in told.split(",") if name.strip() not in ("", "-1", "NoDevFiles"))
    if count is not None and count > len(devices):
        raise ValueError(f"{count} GPUs were asked for, but the job has {len(devices)} ({told!r})")
    return devices if count is None else devices[:count]


def free_disk(directory: Path) -> int:
    """MB free where tasks will write."""
    return shutil.disk_usage(directory).free // 2**20


def task_environment(cores: int, gpus: Sequence[str], manage_gpus: bool, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a runner: libraries start as many threads as it has cores, CUDA sees its own devices.

    What the user has set in ``base`` about threads stays.
    """
    environment = {**dict.fromkeys(THREAD_VARIABLES, str(cores)), **base}
    if manage_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment
