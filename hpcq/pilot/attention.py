"""How a runner waits for its next task: asleep, or watching for it when the next is likely to come at once.

To wake a process that sleeps on another CPU takes an interrupt to a CPU that has been halted: 50 to 150 us on virtual
machines, and most of that is spent by whoever wakes it, here the pilot, which everybody waits for. A program that waits
for each result before it submits the next task gives the runner one about every half millisecond. So:

- a wait shorter than `PATIENCE` makes the next one a *watch*: the runner asks again and again whether there is
  something, for at most `PATIENCE`, and only then sleeps;
- a wait that was longer makes the next one a sleep, and so does none at all: where tasks queue up, throughput counts,
  and others have a better use for the CPU.

So a runner that has nothing to do, or is given its tasks now and then, burns nothing, and each series of short tasks
costs one watch in vain. With a single CPU there is nobody to watch for: the pilot needs that very CPU.

May not live here: what is received.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

PATIENCE = 0.001
"""Seconds of a watch, at most: twice what a program takes from a result to its next task."""

NOTHING = object()
_NOT_TO_WAIT = int(socket.MSG_DONTWAIT)  # an enum takes longer to be joined to others than a task to be received


class Attention:
    """Calls ``receive`` (with flags for ``recvmsg``; BlockingIOError: nothing there) until there is something.

    ``cpus`` is how many CPUs this process may use. ``spent`` is told the CPU seconds of each watch: no task's.
    """

    def __init__(
        self,
        receive: Callable[[int], Any],
        cpus: int,
        spent: Callable[[float], None],
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._receive = receive
        self._alone = cpus < 2
        self._spent = spent
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._eager = False

    def wait(self) -> Any:
        """What comes next."""
        found = self._look()
        if found is not NOTHING:
            self._eager = False
            return found
        began = self._clock()
        if self._eager:
            found = self._watch(began)
        if found is NOTHING:
            found = self._receive(0)
        self._eager = not self._alone and self._clock() - began < PATIENCE
        return found

    def _watch(self, began: float) -> Any:
        found, before = NOTHING, self._cpu_clock()
        while found is NOTHING and self._clock() - began < PATIENCE:
            found = self._look()
        self._spent(self._cpu_clock() - before)
        return found

    def _look(self) -> Any:
        try:
            return self._receive(_NOT_TO_WAIT)
        except BlockingIOError:
            return NOTHING


def usable_cpus() -> int:
    """How many CPUs this process may use now."""
    return len(os.sched_getaffinity(0))
