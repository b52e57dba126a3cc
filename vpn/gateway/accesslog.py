"""The gateway's access log: who connected where, when, and how many bytes went each way.

One JSON object a line, in a file of mode 0600 that is rotated by size (``access.log``, ``access.log.1``, …).
Several processes may write it (a gateway's relay and its data plane): a line is written, and the file rotated, under
a lock on the file (flock(2)), which the kernel lets go of when its holder dies.
A thread writes: neither a slow file system nor a full one holds up or ends the gateway. Lines that cannot be
written, or that come faster than they can be, are counted, and the next line that can be written says how many
are missing.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import queue
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

LIMIT = 10_000_000  # bytes of one file
KEEP = 5  # rotated files besides the current one
WAITING = 10_000  # lines that may wait for the disk
CLOSE_DEADLINE = 5.0


class Access(msgspec.Struct, frozen=True):
    """One connection, or one that was refused: ``outcome`` is "ok" or the reason.

    ``host`` is what was asked for, ``address`` where it went ("" when nowhere); ``up`` and ``down`` are bytes to
    and from there; ``at`` is its begin (RFC 3339, UTC).
    """

    at: str
    client: str
    host: str
    port: int
    address: str
    outcome: str
    up: int = 0
    down: int = 0
    seconds: float = 0.0
    protocol: str = "tcp"


class AccessLog:
    """An access log; ``record`` never blocks and never raises."""

    def __init__(self, path: Path, *, limit: int = LIMIT, keep: int = KEEP) -> None:
        self.path = path
        self._dropped = 0  # counted by who records; the other two by the thread: no lock is needed
        self._failed = 0
        self._told = 0
        self._limit = limit
        self._keep = keep
        self._lines: queue.Queue[Access | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="access log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Lines missing that the log does not say are missing."""
        return self._dropped + self._failed - self._told

    def record(self, access: Access) -> None:
        """Have a line written."""
        try:
            self._lines.put_nowait(access)
        except queue.Full:
            self._dropped += 1

    def flush(self) -> None:
        """Return when what was recorded is written or lost."""
        self._lines.join()

    def close(self) -> None:
        """Write what waits, for ``CLOSE_DEADLINE`` seconds at most."""
        try:
            self._lines.put(None, timeout=CLOSE_DEADLINE)
        except queue.Full:
            return
        self._thread.join(CLOSE_DEADLINE)

    def _write_all(self) -> None:
        while (access := self._lines.get()) is not None:
            self._write_line(access)
            self._lines.task_done()

    def _write_line(self, access: Access) -> None:
        lost = self.lost
        line = msgspec.json.encode(access)
        if lost:
            line = msgspec.json.encode({"at": now_text(), "lost_lines": lost}) + b"\n" + line
        try:
            self._write(line + b"\n")
        except OSError:
            self._failed += 1
        else:
            self._told += lost

    def _write(self, data: bytes) -> None:
        fd = self._open()
        try:
            size = os.fstat(fd).st_size
            written = os.write(fd, data)
            if written < len(data):  # a disk that fills up: no half line may stay
                os.ftruncate(fd, size)
                raise OSError("short write")
            if size + len(data) > self._limit:
                self._rotate()
        finally:
            os.close(fd)

    def _open(self) -> int:
        """The current file, locked: not one that was rotated while we waited."""
        while True:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                with suppress(OSError):  # a file system without locks: lines are still whole, by O_APPEND
                    fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(fd), os.stat(self.path, follow_symlinks=False)):  # noqa: PTH116
                    return fd
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _rotate(self) -> None:
        for number in range(self._keep, 0, -1):
            older = self.path.with_name(f"{self.path.name}.{number}")
            newer = self.path if number == 1 else self.path.with_name(f"{self.path.name}.{number - 1}")
            if newer.exists():
                newer.replace(older)


def now_text() -> str:
    """The time as the log has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
