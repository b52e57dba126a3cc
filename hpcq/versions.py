"""Which versions must agree between a program and its pilots, and what to say when they do not."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

from hpcq import messages as m


@functools.cache  # each look costs a millisecond, and every pilot that comes asks
def versions() -> m.Versions:
    """What must agree between this program and its pilots."""
    python = platform.python_version_tuple()
    return m.Versions(f"{python[0]}.{python[1]}", version("cloudpickle"), minor(version("msgspec")), _hpcq())


def minor(text: str) -> str:
    """A version without its last part: fixes do not change what goes over the wire."""
    return ".".join(text.split(".")[:2])


def _hpcq() -> str:
    try:
        return version("hpcq")
    except PackageNotFoundError:  # run from its source: the pilots are, too
        return "source"


def mismatch(ours: m.Versions, theirs: m.Versions) -> str:
    """Why functions pickled on one side may not load on the other; empty when they will."""
    for what in ("python", "cloudpickle", "msgspec", "hpcq"):
        own, other = getattr(ours, what), getattr(theirs, what)
        if own != other:
            return f"the pilot runs {what} {other}, the program {what} {own}; start both from the same environment"
    return ""
