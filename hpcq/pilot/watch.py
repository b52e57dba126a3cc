"""The connections of one session: what the kernel tells of them, when asked and by itself.

Where the session has a namespace the sockets are of it, and keep it alive until they are closed. May not live here:
whose a connection is (`account`), when to look (`traffic`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from hpcq.pilot import sockdiag
from hpcq.pilot.account import Account, Table
from hpcq.pilot.processes import descendants
from hpcq.pilot.sockdiag import Flow
from vpn import Diagnosis

log = logging.getLogger("hpcq.pilot")


class Place(NamedTuple):
    """A runner inside the tunnel: its lane, its task (0: none) and since when, its first process."""

    lane: int
    task: int
    since: float
    pid: int


class Seen(NamedTuple):
    """What one look found: its sockets, the lane of each inode that was looked for; CPU seconds."""

    flows: list[Flow]
    owners: dict[int, int]
    cost: float


class Watch:
    """The connections of one session; ``news`` is called at the first end that was not looked at."""

    def __init__(self, diagnosis: Diagnosis, account: Account, news: Callable[[], None]) -> None:
        sockets, self._gates = diagnosis
        self._sockets = sockets
        self._news = news
        self._told = sockets[1] if len(sockets) > 1 else None
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self.table = Table(account)
        self.ended: list[tuple[float, Flow]] = []
        self.closed = self._lossy = False
        if self._told is not None:
            self._loop.add_reader(self._told, self.listen)

    def listen(self) -> None:
        """Take what the kernel has told."""
        if self._told is None or self.closed:
            return
        now, had = self._loop.time(), len(self.ended)
        try:
            self.ended.extend((now, flow) for flow in sockdiag.ends(self._told, self._gates))
        except OSError as error:
            if not self._lossy:
                log.warning("connections end faster than they can be counted, the bytes of some are lost: %s", error)
            self._lossy = True
        if self.ended and not had:
            self._news()

    def look(self, places: Sequence[Place]) -> Seen:
        """See what is there; in a thread, while nobody changes the table. Raises OSError."""
        began = time.thread_time()
        with self._lock:
            flows = [] if self.closed else sockdiag.dump(self._sockets[0], self._gates)
        wanted = self.table.wanted(flows)
        owners = sockdiag.owners(wanted, ((place.lane, _tree(place.pid)) for place in places)) if wanted else {}
        return Seen(flows, owners, time.thread_time() - began)

    def close(self) -> None:
        """Let go of the namespace."""
        if self._told is not None and not self.closed:
            self._loop.remove_reader(self._told)
        with self._lock:
            self.closed = True
            for one in self._sockets:
                one.close()


def _tree(pid: int) -> Iterator[int]:
    yield pid
    yield from descendants(pid)
