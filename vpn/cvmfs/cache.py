"""Node-local directories of CVMFS: one of each session, and a cache that all sessions of a user on a node share.

    BASE/hpcq-cvmfs-UID/          0700, the user's
        cache/                    what cvmfs2 fetched, named by content; bounded by ``trim``
        session-…/                configuration and logs; locked while its session lives

Files are removed least recently used first. That is safe at any time: an open one stays readable, another is fetched
again. The size is looked at every ``TRIM_INTERVAL`` by each session, one at a time: in between the cache may grow over
its quota by what is fetched meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from vpn.cvmfs.client import Room
from vpn.errors import TunnelError

TRIM_INTERVAL = 120.0
TRIM_TO = 0.8
"""The part of the quota that is left after trimming: else it would be done for every file."""
STALE = 3600.0
"""Seconds after which a download that nothing was written of is that of a cvmfs2 which was killed."""
_PRIVATE = "hpcq-cvmfs-"
_SESSION = "session-"
_UNFINISHED = "txn"


@contextlib.contextmanager
def session_room(wanted: str) -> Iterator[Room]:
    """Directories for one session; its own is removed at the end, and those of killed ones at the next beginning.

    Raises:
        TunnelError: they cannot be made, or belong to somebody else.
    """
    base = Path(wanted or os.environ.get("TMPDIR") or tempfile.gettempdir(), f"{_PRIVATE}{os.getuid()}")
    try:
        base.mkdir(mode=0o700, parents=bool(wanted), exist_ok=True)
        found = base.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077 or not base.is_dir() or base.is_symlink():
            raise TunnelError("cvmfs", f"{base} is not a private directory of yours: remove it, or give --cvmfs-cache")
        (base / "cache").mkdir(mode=0o700, exist_ok=True)
        _remove_dead(base)
        own = Path(tempfile.mkdtemp(prefix=_SESSION, dir=base))
    except OSError as error:
        raise TunnelError("cvmfs", f"{base}: {error.strerror}; give --cvmfs-cache DIR on a disk of the node") from None
    lock = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held as long as we live: says that the directory is in use
        yield Room(str(own), str(base / "cache"))
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(lock)


def _remove_dead(base: Path) -> None:
    for path in base.glob(f"{_SESSION}*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if any(path.iterdir()):  # an empty one may be about to be locked
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def trim(cache: str, quota: int) -> int:
    """Remove what was not used for longest until at most ``TRIM_TO`` of ``quota`` bytes are left; bytes removed.

    Does nothing while another session is at it; when the cache is within its quota it removes only what killed
    sessions had begun to fetch, of which cvmfs2 itself leaves the files of a shared cache for ever.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(cache, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0
        _remove_unfinished(Path(cache, _UNFINISHED))
        files = sorted(_files(cache))
        total = sum(size for _, size, _ in files)
        if total <= quota:
            return 0
        removed = 0
        for _, size, path in files:
            if total - removed <= quota * TRIM_TO:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - a hundred thousand of them
                removed += size
        return removed


def _remove_unfinished(directory: Path) -> None:
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - path.lstat().st_mtime > STALE:
                    path.unlink()


def _files(cache: str) -> Iterator[tuple[float, int, str]]:
    """(last use, bytes on disk, path) of every file that is complete and named by its content.

    What lies beside their directories tells cvmfs2 of the cache, and which catalog to show when no server answers.
    Where the file system does not note accesses, the last use is when the file came.
    """
    for directory, inner, names in os.walk(cache):
        inner[:] = [name for name in inner if name != _UNFINISHED]
        for name in names if directory != cache else ():
            path = f"{directory}/{name}"
            with contextlib.suppress(OSError):
                status = os.stat(path, follow_symlinks=False)  # noqa: PTH116
                yield max(status.st_atime, status.st_mtime), status.st_blocks * 512, path
