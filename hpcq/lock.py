"""One program at a time serves a queue: an advisory lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from hpcq.errors import UsageError


class QueueLock:
    """Held from `take` to `release`, or to the end of the process. The file says by whom, for the error message."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, queue: str) -> None:
        """Take it.

        Raises:
            UsageError: another running program has it; says which.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another program"
            os.close(descriptor)
            raise UsageError(f"queue {queue!r} is already served by {owner}; end it or use another name") from error
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only the others cannot be told by whom
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; nothing happens when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
