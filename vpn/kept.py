"""What keeps processes running that a gateway or a tunnel consists of: a part that ended by itself is started again,
after a pause that grows.

::

    start --> runs --ended--> pause --> start anew --> runs …
                                |          +-- refused: pause again
                                +-- too often of late: given up, ``failed`` resolves with the reason

``Restarts`` is when to, pure: time is an argument. ``Kept`` does it with one part. ``Tally`` is what all parts of
something add to, for its status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vpn.errors import VpnError

log = logging.getLogger("vpn")

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each start of a part that ended, by how often it has of late: what broke it may need to go away."""

WITHIN = 60.0
"""Seconds: one end more than there are pauses in this time is a fault that starting again does not mend."""


@dataclass
class Tally:
    """How often anything was started again, and the last reason."""

    count: int = 0
    last: str = ""

    def add(self, reason: str) -> None:
        """Something ended by itself, for this reason, and is started again."""
        self.count, self.last = self.count + 1, reason


class Restarts:
    """Whether, and after which pause, to start again what has ended; times in seconds of any one clock."""

    def __init__(self, pauses: Sequence[float] = PAUSES, within: float = WITHIN) -> None:
        self.within = within
        self._pauses = tuple(pauses)
        self._ends: list[float] = []

    @property
    def ends(self) -> int:
        """How often it has ended, at the last end, within ``within``."""
        return len(self._ends)

    def after(self, now: float) -> float | None:
        """It has ended (or could not be started) now: the seconds to wait, None when it was too often."""
        self._ends = [end for end in self._ends if end > now - self.within] + [now]
        return self._pauses[self.ends - 1] if self.ends <= len(self._pauses) else None


class Kept:
    """One part. ``start`` brings it up anew and gives what resolves with the reason of its end; ``close`` undoes the
    last start, also one of a part that has ended, and does nothing when there was none.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[asyncio.Future[str]]],
        close: Callable[[], Awaitable[None]],
        tally: Tally,
        restarts: Restarts | None = None,
    ) -> None:
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.running = asyncio.Event()
        self._name = name
        self._start = start
        self._close = close
        self._tally = tally
        self._restarts = restarts or Restarts()
        self._keeping: asyncio.Task[None] | None = None
        self._ran = True  # since the last end: a start that was refused is no end

    async def start(self) -> None:
        """Bring it up, and keep it up from now on; what it raises at first is the caller's."""
        ended = await self._start()
        self.running.set()
        self._keeping = asyncio.create_task(self._keep(ended))

    async def close(self) -> None:
        """End it for good."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await self._close()

    async def _keep(self, ended: asyncio.Future[str]) -> None:
        try:
            while await self._again(await asyncio.shield(ended)):
                ended = await self._started_anew()
        except Exception as error:  # a fault of ours must not leave a gateway that waits for this part for ever
            log.exception("%s cannot be kept running", self._name)
            self._fail(f"{self._name} cannot be kept running: {error!r}")

    async def _again(self, reason: str) -> bool:
        """Make way for the next start; False when there is none."""
        self.running.clear()
        pause = self._restarts.after(asyncio.get_running_loop().time())
        if pause is None:
            self._fail(f"{self._name} ended {self._restarts.ends} times within {self._restarts.within:g} s: {reason}")
            return False
        log.error("%s: starting %s again in %g s", reason, self._name, pause)
        if self._ran:
            self._tally.add(reason)
        self._ran = False
        await self._close()
        await asyncio.sleep(pause)
        return True

    async def _started_anew(self) -> asyncio.Future[str]:
        try:
            ended = await self._start()
        except (VpnError, OSError) as error:
            ended = asyncio.get_running_loop().create_future()
            ended.set_result(f"it could not be started again: {error}")
        else:
            log.info("%s is running again", self._name)
            self._ran = True
            self.running.set()
        return ended

    def _fail(self, reason: str) -> None:
        if not self.failed.done():
            self.failed.set_result(reason)
