"""A node's cache of contents, shared by the pilots of one user on it.

::

    <scratch base>/hpcq-cache-<uid>/          0700
        lock                                   the sum of sizes; flock: whoever holds it changes that, or removes
        boot                                   id of the boot this cache was filled in
        objects/<digest>                       0444; complete, verified; atime: last use, mtime: a seal
        locks/<digest>                         flock: whoever holds it is fetching the content
        parts/<random>                         flock: contents on their way; unlocked ones are a dead pilot's

A content is written to a part, verified, and renamed; so an object is complete or not there. After a crash of a pilot
only parts are left, which the next one removes; after a crash of the node, when what was written may be lost though
its name is not, the boot id differs and the cache begins empty. Files are opened before they are used, so that another
pilot may remove an object at any time: whoever has it open still reads all of it.

The size is kept under the limit before each fetch: the objects used longest ago go first. An object whose shared lock
a pilot holds (an output kept for later tasks) stays. The sum of all sizes is noted in the file ``lock``, under that
lock, and may be more than there is: so objects are looked at when it is over the limit only, and then more of them go
than just has to, for a cache may have a hundred thousand.

A task never gets the object itself, unless the user asked for a link: it gets a clone (where the file system can), or
a copy. An object that was written to through a link does not have its mode and seal any more; it is dropped and
fetched again. Failure cases: a full disk or an unusable directory is an OSError that names it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FICLONE = 0x40049409
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DEFAULT_LIMIT = 10 * 2**30
KEPT_SHARE = 15 / 16
"""Of the limit, when something has to go."""

_SETTLED = 0o444
_SEAL = 1_000_000_000 * 10**9


def default_limit(base: Path) -> int:
    """Bytes: 10 GiB, or half of what is free there."""
    return min(DEFAULT_LIMIT, shutil.disk_usage(base).free // 2)


class Cache:
    """One node's cache as one pilot uses it; every method may block and may be called from any thread."""

    def __init__(self, base: Path, limit: int | None = None) -> None:
        self.root = _own_directory(base)
        self.limit = default_limit(base) if limit is None else limit
        self._objects, self._locks, self._parts = (self.root / name for name in ("objects", "locks", "parts"))
        self._pinned: dict[bytes, int] = {}
        with self._locked() as total:
            total.unknown()
            self._begin()

    def _begin(self) -> None:
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else "?"
        mark = self.root / "boot"
        if not mark.exists() or mark.read_text() != boot:
            for path in (self._objects, self._parts, self._locks):
                shutil.rmtree(path, ignore_errors=True)
            mark.write_text(boot)
        for path in (self._objects, self._parts, self._locks):
            path.mkdir(mode=0o700, exist_ok=True)
        for part in self._parts.iterdir():
            _remove_unlocked(part)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Total]:
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Total(descriptor)
        finally:
            os.close(descriptor)

    def _path(self, digest: bytes) -> Path:
        return self._objects / digest.hex()

    # --- looking ---

    def open(self, digest: bytes, size: int | None = None) -> int | None:
        """A descriptor of a content, which stays whole while it is open; None when it is not here."""
        path = self._path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        status = os.fstat(descriptor)
        if not _is_sound(status) or (size is not None and status.st_size != size):
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            return None
        os.utime(descriptor, ns=(time.time_ns(), _SEAL))
        return descriptor

    def digests(self) -> list[bytes]:
        """Everything that is here; what others put there is passed over."""
        found = []
        for path in self._objects.iterdir():
            with contextlib.suppress(ValueError):
                found.append(bytes.fromhex(path.name))
        return found

    def link(self, digest: bytes, target: Path) -> bool:
        """Let a task see the object itself; False when that cannot be done."""
        try:
            os.link(self._path(digest), target)
        except OSError:
            return False
        return True

    # --- adding ---

    def lock(self, digest: bytes) -> int:
        """Wait until nobody else on this node is fetching it; `unlock` what is returned."""
        path = self._locks / digest.hex()
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)  # its last holder has removed it meanwhile

    def unlock(self, digest: bytes, descriptor: int) -> None:
        """Let the next one look."""
        with contextlib.suppress(FileNotFoundError):
            (self._locks / digest.hex()).unlink()
        os.close(descriptor)

    def new_part(self) -> tuple[int, Path]:
        """An empty file to receive a content."""
        while True:
            descriptor, path = tempfile.mkstemp(dir=self._parts)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, Path(path)
            os.close(descriptor)  # another pilot took it for a dead one's before we had the lock

    def drop_part(self, descriptor: int, path: Path) -> None:
        """It is not wanted any more (or was adopted)."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)

    def adopt(self, digest: bytes, descriptor: int, part: Path) -> None:
        """A verified part becomes an object."""
        os.fchmod(descriptor, _SETTLED)
        os.utime(descriptor, ns=(time.time_ns(), _SEAL))
        part.rename(self._path(digest))

    def make_room(self, size: int, *, written: bool = False) -> bool:
        """Remove what was used longest ago until ``size`` more bytes fit; False when they never will.

        ``written``: they are in a part already.
        """
        if size > self.limit:
            return False
        with self._locked() as total:
            known = total.read()
            if known is None or known + size > self.limit:
                known = self._look_and_remove(0 if written else size) - (size if written else 0)
            fits = known + size <= self.limit
            total.write(known + size if fits else known)
        return fits

    def _look_and_remove(self, size: int) -> int:
        """What there is, after what has to go for ``size`` more bytes has gone."""
        held = [(status.st_atime_ns, status.st_size, path) for path, status in _files(self._objects)]
        total = sum(entry[1] for entry in held) + sum(status.st_size for _, status in _files(self._parts))
        if total + size <= self.limit:
            return total
        for _, freed, path in sorted(held):
            if total + size <= self.limit * KEPT_SHARE:
                break
            if _remove_unlocked(Path(path)):
                total -= freed
        return total

    # --- keeping ---

    def pin(self, digest: bytes) -> bool:
        """Keep it until we end; False when it is not here."""
        descriptor = self.open(digest)
        if descriptor is None:
            return False
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        previous = self._pinned.pop(digest, None)
        if previous is not None:
            os.close(previous)
        self._pinned[digest] = descriptor
        return self._path(digest).exists()

    def close(self) -> None:
        """Let go of what we kept."""
        while self._pinned:
            os.close(self._pinned.popitem()[1])


class _Total:
    """The sum of sizes, as it is noted in an open file whose lock we hold."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int | None:
        """What is noted; None when nothing is, or nothing that makes sense."""
        noted = os.pread(self._descriptor, 64, 0)
        return int(noted) if noted.isdigit() else None

    def write(self, total: int) -> None:
        """Note it."""
        os.pwrite(self._descriptor, b"%020d" % max(total, 0), 0)  # as long as any other: whole or not there

    def unknown(self) -> None:
        """Note nothing."""
        os.ftruncate(self._descriptor, 0)


def _files(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False)


def _is_sound(status: os.stat_result) -> bool:
    """Whether nobody has written to it: any write changes the time of modification that we set."""
    return stat.S_IMODE(status.st_mode) == _SETTLED and status.st_mtime_ns == _SEAL


def _remove_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _own_directory(base: Path) -> Path:
    """Our directory below ``base``, which others may write to as well: what is there must be ours alone.

    Raises:
        OSError: it is somebody else's, or cannot be made.
    """
    root = base / f"hpcq-cache-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise PermissionError(errno.EPERM, "is not a private directory of ours; remove it or use --scratch", str(root))
    return root


def copy(descriptor: int, target: Path, mode: int) -> None:
    """Give a task its own file with these contents: cloned where the file system can, else copied.

    Raises:
        OSError: it cannot be written; names the target.
    """
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            fcntl.ioctl(out, FICLONE, descriptor)
        except OSError:
            _copy_bytes(descriptor, out)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        os.close(out)


def _copy_bytes(source: int, target: int) -> None:
    left, offset = os.fstat(source).st_size, 0
    while left:
        try:
            done = os.copy_file_range(source, target, left, offset_src=offset)
        except OSError as error:
            if offset or error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                raise
            done = os.sendfile(target, source, offset, left)
        if not done:
            raise OSError(errno.EIO, "the cached file became shorter while it was copied")
        left -= done
        offset += done
