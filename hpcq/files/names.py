"""Which names a task's files may have inside its sandbox. Pure.

A name is a relative path that stays below the sandbox whatever is there. The manager checks it when it is set, the
pilot again before it touches anything, since neither trusts what comes over the wire.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import PurePosixPath

from hpcq.errors import UsageError

COMPONENT_LIMIT = 255
"""Bytes of one component (NAME_MAX)."""

NAME_LIMIT = 3000
"""Bytes of a whole name: less than PATH_MAX by what a sandbox's own path may need."""


def checked(name: object) -> str:
    """``name`` as it will be used: without ``.`` and doubled slashes.

    Raises:
        UsageError: it is not a relative path below the sandbox; says why.
    """
    if not isinstance(name, str):
        raise UsageError(f"a file's name must be a string, not {name!r}")
    problem = _problem(name)
    if problem:
        raise UsageError(f"the name {name!r} cannot be used in a task's sandbox: {problem}")
    return str(PurePosixPath(name))


def _problem(name: str) -> str:  # noqa: PLR0911 - one line for each rule
    parts = name.split("/")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not name or all(part in ("", ".") for part in parts):
        return "it is empty" if not name.startswith("/") else "it is absolute"
    if name.startswith("/"):
        return "it is absolute"
    if ".." in parts:
        return "it has a '..'"
    if "\0" in name:
        return "it has a NUL"
    if name.endswith("/."):
        return "it ends in '/.'"
    if size > NAME_LIMIT or any(len(part.encode()) > COMPONENT_LIMIT for part in parts):
        return "it is too long"
    return ""


def disjoint(names: Iterable[str]) -> None:
    """Check that no name is another one, or lies inside another one.

    Raises:
        UsageError: two that collide, by name.
    """
    ordered = sorted(PurePosixPath(name).parts for name in names)
    for first, second in pairwise(ordered):
        if second[: len(first)] == first:
            raise UsageError(f"the names {'/'.join(first)!r} and {'/'.join(second)!r} cannot both be used")


def shown(path: object) -> str:
    """A path for a message: always printable and valid Unicode, whatever bytes it has."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")
