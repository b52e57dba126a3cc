"""The processes that serve a mounted repository, cvmfs2 or an image's squashfuse, watched: without them no file of it
can be read, and every task that comes fails.

They go to the background by themselves and are then nobody's children that we know: they are found by what they were
given, a configuration or a name that is of this session alone. A cvmfs2 is two, the client and its watchdog, and
neither outlives the other.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SETTLED = 0.5
"""Seconds in which a session that ends as a whole is known to do so: its cvmfs2 is then not the reason."""


def find(mark: str) -> list[int]:
    """Pids of our processes that have this text on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if os.fsencode(mark) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


class Watch:
    """Calls ``on_end`` when the last of these processes has ended; not after ``close``, and never if there are none."""

    def __init__(self, pids: list[int], on_end: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_end = on_end
        self._later: asyncio.TimerHandle | None = None
        self._alive: set[int] = set()
        for pid in pids:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                self._alive.add(descriptor)
                self._loop.add_reader(descriptor, self._ended, descriptor)

    def _ended(self, descriptor: int) -> None:
        self._forget(descriptor)
        if not self._alive:
            self._later = self._loop.call_later(SETTLED, self._on_end)

    def _forget(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        self._alive.discard(descriptor)
        os.close(descriptor)

    def close(self) -> None:
        """Look away."""
        for descriptor in list(self._alive):
            self._forget(descriptor)
        if self._later is not None:
            self._later.cancel()
