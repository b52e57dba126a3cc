"""One way of a pump, in any of its kinds: read when there is something, write, wait for the slower side.

States: *reading* → (the target takes no more) *writing* → *reading*; (the budget is spent) *pausing* → *reading*;
(the source has ended, and all of it is written) *ended*. What differs between kinds is in ``take_in``, ``put_out``
and ``finish``. Everything runs in callbacks of an event loop; an error is told to the owner, who ends both ways.
What a source that was reset had sent before goes on to the target as far as that takes it at once, as a last answer
would without a relay; when there is more, it is an error.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from contextlib import suppress
from typing import Protocol

from vpn.relay.bucket import Budget
from vpn.relay.loop import watch


class Owner(Protocol):
    """Who made two directions, and ends them together."""

    loop: asyncio.AbstractEventLoop

    def on_ended(self) -> None:
        """A direction has carried everything."""

    def fail(self, error: Exception) -> None:
        """A socket broke."""


class Direction:
    """The part that all kinds share; ``carried`` counts the program's bytes.

    What lies between ``_on_readable`` and the last ``send`` is kept short (``vpn.relay.loop`` says why): no limit that
    does not bind is asked, and what does not change is looked up before.
    """

    chunk: int
    """Bytes to read at once."""

    def __init__(self, source: socket.socket, target: socket.socket, budget: Budget, owner: Owner) -> None:
        self.carried = 0
        self.ended = False
        self.source = source
        self.target = target
        self.source_ended = False
        self._is_held_up = False  # writing or pausing
        self._was_reset = False
        self._budget = budget if budget else None
        self._owner = owner
        self._loop = owner.loop
        self._timer: asyncio.TimerHandle | None = None

    def take_in(self, limit: int) -> int:
        """Read at most ``limit`` bytes; how many came, 0 at the end. Raises OSError."""
        raise NotImplementedError

    def put_out(self) -> None:
        """Write what is held; raises BlockingIOError while some is left, OSError."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back what is held."""

    def finish(self) -> None:
        """Tell the target that nothing more comes."""
        with suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)

    def start(self) -> None:
        """Begin to wait for bytes."""
        self._is_held_up = False
        watch(self._loop, self.source, self._on_readable)

    def stop(self) -> None:
        """Release everything; called once, always."""
        self._loop.remove_reader(self.source)
        self._loop.remove_writer(self.target)
        if self._timer is not None:
            self._timer.cancel()
        self.release()

    def on_reset(self) -> None:
        """The source has broken; if it is being read, a read will say so, after what came before."""
        self._was_reset = True
        if self._is_held_up or self.ended:
            self._break_off()

    def _break_off(self) -> None:
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.ECONNRESET
        self._owner.fail(OSError(code, os.strerror(code)))

    def _hold_up(self) -> None:
        """No more is read for now."""
        self._loop.remove_reader(self.source)
        self._is_held_up = True
        if self._was_reset:
            self._break_off()

    def _on_readable(self) -> None:
        budget, granted, came = self._budget, self.chunk, 0
        if budget is not None:
            granted = budget.take(granted, self._loop.time())
            if not granted:
                self._pause(budget)
                return
        try:
            came = self.take_in(granted)
        except (BlockingIOError, InterruptedError):
            self.release()
            return
        except OSError as error:
            self._owner.fail(error)
            return
        finally:
            if budget is not None and came < granted:
                budget.give_back(granted - came)
        if not came:
            self.source_ended = True
        self.flush(waiting=False)

    def _pause(self, budget: Budget) -> None:
        self._hold_up()
        wait = budget.wait(self.chunk, self._loop.time())
        self._timer = self._loop.call_later(wait, self.start)

    def _on_writable(self) -> None:
        self.flush(waiting=True)

    def flush(self, *, waiting: bool) -> None:
        """Write what is held and go on; ``waiting``: for the target, not the source."""
        try:
            self.put_out()
        except (BlockingIOError, InterruptedError):
            if not waiting:
                self._hold_up()
                self._loop.add_writer(self.target, self._on_writable)
            return
        except OSError as error:
            self._owner.fail(error)
            return
        self.release()
        if waiting:
            self._loop.remove_writer(self.target)
        if self.source_ended:
            self._loop.remove_reader(self.source)
            self.ended = True
            self.finish()
            self._owner.on_ended()
        elif waiting:
            self.start()
