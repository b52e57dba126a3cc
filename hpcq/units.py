"""Sizes and times as users write them, and back.

Memory is in whole MB and, as in Slurm and PBS, 1 GB = 1024 MB and 1 MB = 2**20 bytes: ``MB`` and ``MiB`` are
two spellings of one unit, so ``--memory 32GB`` asks the batch system for what ``#SBATCH --mem=32GB`` would.
Times are in seconds. What is a size or a time is `vpn`'s to say, which takes the same on its own command line; every
refusal here is a ``UsageError`` that names the value. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from hpcq.errors import UsageError
from vpn import MAX_DURATION_S, MAX_MEMORY_MB, megabytes_in, seconds_in

_DAY, _HOUR, _MINUTE = 86400, 3600, 60


def parse_memory(value: str | int | float, *, name: str = "memory") -> int:
    """Return ``value`` in MB (2**20 bytes), rounded up to a whole one.

    A number is in MB; text may carry K, M, G, T or P, with ``B`` or ``iB`` after it ("32GB", "512 MiB",
    "1.5g"). ``name`` is what the error calls the value.

    Raises:
        UsageError: not a size, not positive, or beyond ``MAX_MEMORY_MB``.
    """
    megabytes = math.ceil(_memory_fraction(value, name))
    if not 1 <= megabytes <= MAX_MEMORY_MB:
        raise UsageError(f"{name} {_shown(value)} is out of range: it must be at least 1 MB and below 1 EB")
    return megabytes


def _memory_fraction(value: str | int | float, name: str) -> Fraction:
    if not isinstance(value, str):
        return Fraction(_finite_number(value, name, "a size such as 32GB, 512MiB or 2048 (MB)"))
    exact = megabytes_in(value.strip())
    if exact is None:
        raise UsageError(f"{name} {_shown(value)} is not a size; write it as 32GB, 512MiB or 2048 (MB)")
    return exact


def parse_duration(value: str | int | float, *, name: str = "time") -> float:
    """Return ``value`` in seconds (zero or more; a whole number of seconds comes back as an int).

    A number is in seconds; text may be seconds, ``H:MM:SS``, ``D-HH:MM:SS``, or parts such as ``90m`` and
    ``1h30m``. ``8:00`` is refused: Slurm and PBS take it for eight minutes, most people for eight hours.

    Raises:
        UsageError: not a time, negative, or beyond ``MAX_DURATION_S``.
    """
    seconds = _duration(value, name)
    if not 0 <= seconds <= MAX_DURATION_S:
        raise UsageError(f"{name} {_shown(value)} is out of range: it must be between 0 and 100 years")
    return int(seconds) if seconds == int(seconds) else seconds


def _duration(value: str | int | float, name: str) -> float:
    if not isinstance(value, str):
        return _finite_number(value, name, "a time such as 8:00:00 or 28800 (seconds)")
    seconds = seconds_in(value.strip())
    if seconds is None:
        raise UsageError(
            f"{name} {_shown(value)} is not a time; write it as H:MM:SS (8:00:00), 90m, or seconds (28800)"
        )
    return seconds


def format_duration(seconds: float) -> str:
    """Write seconds as ``H:MM:SS``, rounded up to a whole one: 28800 → "8:00:00". Read back by
    ``parse_duration``.
    """
    whole = math.ceil(seconds)
    return f"{whole // _HOUR}:{whole % _HOUR // _MINUTE:02}:{whole % _MINUTE:02}"


def format_bytes(count: int) -> str:
    """Write a number of bytes for people, in powers of 1000: 34567890 → "34.6 MB"."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["kB", "MB", "GB", "TB", "PB", "EB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.1f} {units[0]}"


def sum_known(counts: Iterable[int | None]) -> int | None:
    """Add up what was counted; None if nothing was."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def format_slurm_time(seconds: float) -> str:
    """Write seconds as Slurm's ``D-HH:MM:SS`` (see ``--time`` in sbatch(1)): 100000 → "1-03:46:40"."""
    whole = math.ceil(seconds)
    days, rest = divmod(whole, _DAY)
    return f"{days}-{rest // _HOUR:02}:{rest % _HOUR // _MINUTE:02}:{rest % _MINUTE:02}"


def _finite_number(value: object, name: str, wanted: str) -> float:
    """Refuse what only looks like a number: True, NaN, infinity, None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} {_shown(value)} is not {wanted}")
    return value


def _shown(value: object) -> str:
    """Quote a value for a one-line message, however long or odd it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
