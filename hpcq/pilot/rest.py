"""When the pilot reads what its runners have sent: at once, or a little later and of all of them together.

Each result that is read, reported and sent on its own costs more than a short task: a turn of our loop, a record of
TLS, a turn of the manager's. So a runner that was given enough to be busy for a while may *rest*: for `REST` seconds
its results stay in its socket, then those of all resting runners are read in one turn of the loop and leave in one
message. A runner that may run out of work never rests, and so neither do long tasks nor a queue that is nearly empty:
their results are read the moment they come. (Network cards moderate their interrupts in the same way.)

May not live here: what is read, and how long a runner is busy (both are asked).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

REST = 0.005
"""Seconds that results may wait for others, at most."""


class Source(Hashable, Protocol):
    """Whoever sends results."""

    results: socket.socket


S = TypeVar("S", bound=Source)


class Readers(Generic[S]):
    """Calls ``read`` for each source that may have sent something; ``busy`` is the seconds it needs nothing of us."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, read: Callable[[S], object], busy: Callable[[S], float]
    ) -> None:
        self._loop = loop
        self._read = read
        self._busy = busy
        self._resting: dict[S, None] = {}
        self._alarm: asyncio.TimerHandle | None = None

    def watch(self, source: S) -> None:
        """Read what comes from now on."""
        self._loop.add_reader(source.results, self._ready, source)

    def leave(self, source: S) -> None:
        """It is read no more; to be called before its socket is closed."""
        if source in self._resting:
            del self._resting[source]
        else:
            self._loop.remove_reader(source.results)

    def catch_up(self) -> None:
        """Read now what those at rest have sent: before something is decided about their tasks."""
        for source in list(self._resting):
            if source in self._resting:
                self._read(source)

    def close(self) -> None:
        """Nothing is read later any more."""
        if self._alarm is not None:
            self._alarm.cancel()

    def _ready(self, source: S) -> None:
        self._read(source)
        if self._busy(source) >= REST:
            self._loop.remove_reader(source.results)
            self._resting[source] = None
            if self._alarm is None:
                self._alarm = self._loop.call_later(REST, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = None
        self.catch_up()
        for source in [source for source in self._resting if self._busy(source) < REST]:
            del self._resting[source]
            self.watch(source)
        if self._resting:
            self._alarm = self._loop.call_later(REST, self._on_alarm)
