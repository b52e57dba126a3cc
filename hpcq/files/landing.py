"""Where outputs arrive: temporaries beside their destinations, renamed together when the task has succeeded.

Everything of a task is complete and on disk before the first rename, so a destination is seen as it was, or whole. A
directory is unpacked beside its destination and takes its place by a rename. Blocking; called in threads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from pathlib import Path

from hpcq.files import pack


class Landing:
    """One output on its way. ``path`` is the temporary; it is there until `commit` or `drop`.

    It may be dropped while it is still being received: its task was cancelled, say. So who writes has a descriptor of
    his own (`writer`): the number of one that is closed may be another file's a moment later.
    """

    def __init__(self, destination: str, kind: str, executable: bool) -> None:
        self.destination = Path(destination)
        self._kind = kind
        self._executable = executable
        self.is_complete = False
        self.path = self.destination.parent / f".hpcq-{secrets.token_hex(8)}.part"
        self._ending = threading.Lock()
        self._descriptor = self._open()

    def _open(self) -> int:
        """Raises:
        OSError: the directory cannot be made or written to.
        """
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        if self._kind == "file" and self.destination.is_dir():
            raise IsADirectoryError(21, "is a directory, and the output a file", str(self.destination))
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def writer(self) -> int:
        """A descriptor to write to, the caller's to close.

        Raises:
            OSError: it was dropped; there is no descriptor left.
        """
        with self._ending:
            return os.dup(self._still_wanted())

    def complete(self) -> None:
        """All has been written: make sure of it, and unpack a directory.

        Raises:
            OSError: it was dropped, or cannot be written.
        """
        mask = _umask()
        with self._ending:
            descriptor = self._still_wanted()
            if self._kind == "dir":
                self._unpack(mask)
            else:
                os.fchmod(descriptor, (0o777 if self._executable else 0o666) & ~mask)
            os.fsync(descriptor)
            self._close()
            self.is_complete = True

    def _still_wanted(self) -> int:
        if self._descriptor < 0:
            raise OSError(errno.ECANCELED, "its task has ended", str(self.destination))
        return self._descriptor

    def _unpack(self, mask: int) -> None:
        directory = self.path.with_suffix(".dir")
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        try:
            with open(self._descriptor, "rb", closefd=False) as archive:
                pack.unpack(archive, directory)
            directory.chmod(0o777 & ~mask)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.path.unlink()
        self.path = directory

    def commit(self) -> None:
        """Put it in its place."""
        if self._kind == "dir" and os.path.lexists(self.destination):
            self._replace_directory()
        else:
            self.path.rename(self.destination)
        _sync_directory(self.destination.parent)

    def _replace_directory(self) -> None:
        """rename(2) does not replace a directory that has something in it: the old one steps aside."""
        aside = self.path.with_suffix(".old")
        self.destination.rename(aside)
        try:
            self.path.rename(self.destination)
        except BaseException:
            aside.rename(self.destination)
            raise
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink()

    def drop(self) -> None:
        """Leave no trace, unless it was committed."""
        with self._ending:
            self._close()
            if self.path.is_dir():
                shutil.rmtree(self.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    self.path.unlink()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """The process's umask, read without changing it for other threads."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077
