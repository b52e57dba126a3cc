"""One program at a time serves a queue: an advisory lock that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from pathlib import Path

from hpcq import state_dir as places
from hpcq.errors import UsageError

_HOLDER = re.compile(r"process (\d+) on (\S+)", re.ASCII)


def may_be_taken(path: Path) -> bool:
    """Whether its holder may still be there, by what it wrote: of another host one cannot tell. Never takes it itself,
    not even for a moment, in which a program that starts would be refused.
    """
    try:
        held = _HOLDER.fullmatch(path.read_text(errors="replace"))
    except OSError:
        return False
    return held is not None and (held[2] != socket.gethostname() or Path(f"/proc/{held[1]}").exists())


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


class Place:
    """The directory of a queue that this program serves: locked, and found by the queue's name, until `leave`."""

    def __init__(self, queue: str, given: object) -> None:
        """Raises UsageError when another running program serves it; ``given``: where all queues' directories are."""
        root = None if given is None else places.absolute(given)
        self._queue = queue
        self._lock = QueueLock(places.lock_in(places.ensure_queue_dir(queue, root or places.state_root())))
        self._lock.take(queue)
        try:
            places.place(queue, root)
        except BaseException:
            self._lock.release()
            raise

    def leave(self) -> None:
        """Let another program have it; the files stay."""
        places.leave(self._queue)
        self._lock.release()
