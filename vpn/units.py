"""Times and sizes as they are typed: the same that `hpcq` takes, whose errors and messages are its own.

Times are in seconds: ``90``, ``1.5``, ``10s``, ``1h30m``, ``H:MM:SS``, ``D-HH:MM:SS``. Sizes are in MB of 2**20 bytes:
``4000``, ``5GB``, ``512 MiB``. Pure.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import click

_PARTS = re.compile(r"(?=\d)(?:(\d+) *d)? *(?:(\d+) *h)? *(?:(\d+) *m(?:in)?)? *(?:(\d+) *s)?", re.ASCII | re.I)
_CLOCK = re.compile(r"(?:(\d+)-(?=0*(?:[01]?\d|2[0-3]):))?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:([KMGTP])(?:i?B)?|B)?", re.ASCII | re.I)
_POWERS = {"K": -1, "M": 0, "G": 1, "T": 2, "P": 3}
_LONGEST = 40
_MOST_SECONDS, _MOST_MB = 100 * 365 * 86400, 2**40


def seconds_of(text: str) -> float | None:
    """A time in seconds; None for what is none."""
    if len(text) > _LONGEST:
        return None
    if _NUMBER.fullmatch(text):
        seconds = float(text)
    elif found := _CLOCK.fullmatch(text) or _PARTS.fullmatch(text):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = float(86400 * days + 3600 * hours + 60 * minutes + rest)
    else:
        return None
    return seconds if seconds <= _MOST_SECONDS else None


def megabytes_of(text: str) -> int | None:
    """A size in MB, rounded up; None for what is none, or nothing."""
    found = _SIZE.fullmatch(text)
    if found is None or len(text) > _LONGEST:
        return None
    last = text[-1:].upper()
    power = _POWERS[found[2].upper()] if found[2] else -2 if last == "B" else 0
    size = math.ceil(Fraction(found[1]) * Fraction(1024) ** power)
    return size if 1 <= size <= _MOST_MB else None


def take_time(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A callback of click's: an option's time, more than nothing."""
    seconds = None if value is None else seconds_of(value.strip())
    if value is not None and not seconds:
        raise click.BadParameter(f"{value!r} is not a time: write it as 10s, 5m, H:MM:SS, or seconds", ctx, param)
    return seconds


def take_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A callback of click's: an option's size."""
    megabytes = None if value is None else megabytes_of(value.strip())
    if value is not None and megabytes is None:
        raise click.BadParameter(f"{value!r} is not a size: write it as 5GB, 512MiB or 4000 (MB)", ctx, param)
    return megabytes
