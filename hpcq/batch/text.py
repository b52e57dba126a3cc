"""Which text may go into a script, a command line or a message. Pure.

A newline in a value would end a ``#SBATCH`` line or a command and start another; other control characters
hide what a script says from the one who reads it; lone surrogates (bytes of a file name that are not UTF-8)
cannot be written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping

from hpcq.errors import UsageError

_REFUSED = {
    "Cc": "a control character",
    "Cs": "a byte that is not UTF-8",
    "Zl": "a newline",
    "Zp": "a newline",
}


def unprintable(text: str) -> str | None:
    """Return what makes ``text`` unfit for a script ("a newline"), or None."""
    for character in text:
        kind = _REFUSED.get(unicodedata.category(character))
        if kind is not None:
            return "a newline" if character in "\n\r" else kind
    return None


def refuse_unprintable(name: str, value: object) -> None:
    """Refuse text, or text inside lists and mappings, that must not reach a script.

    Raises:
        UsageError: names the variable, with its index or key.
    """
    if isinstance(value, str):
        problem = unprintable(value)
        if problem is not None:
            shown = repr(value[:60])
            raise UsageError(f"{name} holds {problem}, which cannot go into a batch script: {shown}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_unprintable(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            refuse_unprintable(f"{name}[{index}]", item)


def last_lines(text: str, count: int) -> list[str]:
    """Return the last ``count`` non-blank lines of what a program printed, without control characters."""
    lines = [line.rstrip() for line in text.splitlines()]
    return [printable(line) for line in lines if line.strip()][-count:]


def printable(text: str) -> str:
    """Return ``text`` with control characters (a terminal's escapes too) replaced; tabs become spaces."""
    expanded = text.expandtabs()
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cs") else c for c in expanded)
