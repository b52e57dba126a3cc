"""The directory a task with files runs in: how it is filled. Blocking; called in threads."""

from __future__ import annotations

from pathlib import Path

from hpcq.files import pack
from hpcq.files.names import shown


def make_parents(sandbox: Path, target: Path) -> None:
    """Make the directory ``target`` will be in. Unpacked directories may hold links: none leads outside.

    Raises:
        OSError: it cannot be made, or would lie outside.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(sandbox.resolve()):
        raise OSError(f"{shown(target)} would lie outside the sandbox")


def unpack(descriptor: int, target: Path) -> None:
    """Make the directory ``target`` from an open archive; see `pack.unpack`."""
    with open(f"/proc/self/fd/{descriptor}", "rb") as archive:
        pack.unpack(archive, target)
