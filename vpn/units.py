"""Sizes and times as users write them, for `vpn` and `hpcq`, which differ in what they say of others.

Sizes are in MB of 2**20 bytes, as in Slurm and PBS: ``MB`` and ``MiB`` are two spellings of one unit. Times are in
seconds. Pure; imports next to nothing.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *(?:([KMGTP])(?:i?B)?|B)?", re.ASCII | re.I)
_POWERS = {"K": -1, "M": 0, "G": 1, "T": 2, "P": 3}
_SECONDS = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_CLOCK = re.compile(r"(?:(\d+)-(?=0*(?:[01]?\d|2[0-3]):))?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
_PARTS = re.compile(r"(?=\d)(?:(\d+) *d)? *(?:(\d+) *h)? *(?:(\d+) *m(?:in)?)? *(?:(\d+) *s)?", re.ASCII | re.I)
_LONGEST = 40

MAX_MEMORY_MB = 2**40
"""Above any machine; a larger value is a typing error and would overflow the batch systems' own fields."""
MAX_DURATION_S = 100 * 365 * 86400
"""Above any limit; the batch systems keep minutes in 32 bits."""


def megabytes_in(text: str) -> Fraction | None:
    """A size, exactly: ``4000``, ``5GB``, ``512 MiB``, ``1.5g``, ``10B``; None for what is none."""
    found = _SIZE.fullmatch(text)
    if found is None or len(text) > _LONGEST:
        return None
    power = _POWERS[found[2].upper()] if found[2] else -2 if text[-1:] in "bB" else 0
    return Fraction(found[1]) * Fraction(1024) ** power


def seconds_in(text: str) -> float | None:
    """A time: ``90``, ``1.5``, ``10s``, ``1h30m``, ``H:MM:SS``, ``D-HH:MM:SS``; None for what is none.

    ``8:00`` is none: Slurm and PBS take it for eight minutes, most people for eight hours.
    """
    if len(text) > _LONGEST:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    found = _CLOCK.fullmatch(text) or _PARTS.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds
