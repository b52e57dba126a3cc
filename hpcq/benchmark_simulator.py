"""Many pilots in one process, for ``hpcq bench pilots``: real connections, protocol and calls, but no interpreters.

Run as ``python -m hpcq.benchmark_simulator CONNECTION FIRST COUNT``: prepares, prints ``ready``, connects all its
pilots at once when a line comes on standard input, prints ``serving`` when each was welcomed, and ends at end of file.
Each is a `ManagerLink`, as in a pilot; tasks are called in this process, one after the other.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import Any

from hpcq import messages as m
from hpcq import serialize
from hpcq.outcome import Outcome
from hpcq.pilot.link import ManagerLink
from hpcq.versions import versions

CONNECT_TIMEOUT = 120.0
"""Seconds a simulated pilot tries to reach the manager."""


class SimulatedPilot:
    """One pilot with one core."""

    def __init__(self, connection: Path, name: str) -> None:
        self.name = name
        self._functions: dict[bytes, Any] = {}
        self._link = ManagerLink(connection, self._hello, self._on_message)

    def _hello(self) -> m.PilotHello:
        return m.PilotHello(
            m.PROTOCOL_VERSION, self.name, "", "", 0, socket.gethostname(), os.getpid(), 1, 1000, 0.0, "none", "",
            versions(),
        )  # fmt: skip

    async def serve(self) -> None:
        """Connect and say that tasks may come."""
        await self._link.connect(CONNECT_TIMEOUT)
        self._link.send(m.Ready("none", "", 0.0, "", []))

    async def leave(self) -> None:
        """Hang up."""
        await self._link.close("the benchmark is over")

    def _on_message(self, message: Any) -> None:
        if isinstance(message, m.Run):
            self._functions.update((body.key, serialize.load_function(body.body)) for body in message.functions)
            self._link.send(m.Update([], [self._call(task) for task in message.tasks]))
        elif isinstance(message, m.Retract | m.Cancel):
            self._link.send(m.Returned([]))

    def _call(self, task: m.TaskSpec) -> m.TaskResult:
        args, kwargs = serialize.load_arguments(task.payload)
        value = self._functions[task.function](*args, **kwargs)
        payload = serialize.dump_value(value)
        assert isinstance(payload, bytes), "the benchmark's values are small"
        return m.TaskResult(task.id, Outcome.SUCCESS.value, payload)


async def simulate(connection: Path, first: int, count: int) -> None:
    """The whole program."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    pilots = [SimulatedPilot(connection, f"simulated-{number}") for number in range(first, first + count)]
    _say("ready")
    if not await reader.readline():
        return
    await asyncio.gather(*(pilot.serve() for pilot in pilots))
    _say("serving")
    await reader.read()
    await asyncio.gather(*(pilot.leave() for pilot in pilots))


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(simulate(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
