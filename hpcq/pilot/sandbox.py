"""The directory a task with files runs in: filled before, removed afterwards. Blocking; called in threads."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcq.files import pack
from hpcq.files.names import shown

log = logging.getLogger("hpcq.pilot")


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


def remove_tree(path: Path) -> None:
    """Also when a task took away its own right to write there."""

    def allow(function: Callable[[str], Any], name: str, _error: Any) -> None:
        try:
            os.chmod(os.path.dirname(name), 0o700)
            if os.path.isdir(name) and not os.path.islink(name):
                os.chmod(name, 0o700)
                shutil.rmtree(name, ignore_errors=True)
            else:
                os.unlink(name)
        except OSError:
            log.warning("%s cannot be removed", shown(name))

    if path.exists():
        shutil.rmtree(path, onerror=allow)
