"""A pilot's own directory on node-local disk: removed at its end, or by the next pilot if it was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "hpcq-pilot-"


def scratch_base(wanted: Path | None) -> Path:
    """Where the pilot's directory will be."""
    return wanted or Path(os.environ.get("TMPDIR") or tempfile.gettempdir())


def remove_tree(path: str | Path) -> None:
    """Remove a directory, also what tasks made read-only in it, as package managers do."""
    shutil.rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        return
    _open_up(str(path))
    for directory, inner, _ in os.walk(path):  # from the top: each is opened up before it is looked into
        for name in inner:
            _open_up(f"{directory}/{name}")
    shutil.rmtree(path, ignore_errors=True)


def _open_up(directory: str) -> None:
    if not os.path.islink(directory):  # noqa: PTH114 - as os.walk names it
        with contextlib.suppress(OSError):
            os.chmod(directory, 0o700)  # noqa: PTH101


@contextlib.contextmanager
def scratch_directory(wanted: Path | None) -> Iterator[Path]:
    """A new private directory below ``wanted``; dead pilots' directories beside it are removed.

    Raises:
        OSError: it cannot be made there.
    """
    base = scratch_base(wanted)
    prefix = f"{_PREFIX}{os.getuid()}-"
    _remove_dead(base, prefix)
    own, lock = _make(base, prefix)
    try:
        yield own
    finally:
        remove_tree(own)
        os.close(lock)


def _make(base: Path, prefix: str) -> tuple[Path, int]:
    """A directory and its lock, held as long as we live: says that the directory is in use."""
    while True:
        own = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if own.exists():
                return own, lock
            os.close(lock)  # another pilot took it for a dead one's before we had the lock


def _remove_dead(base: Path, prefix: str) -> None:
    for path in base.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(path)
            finally:
                os.close(descriptor)
