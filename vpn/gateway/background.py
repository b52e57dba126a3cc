"""What goes on beside the gateway's sequence: tasks that nobody waits for, and the lines its programs write.

A task's fault must not pass in silence: ``failed`` is called with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

from vpn.gateway import strangers
from vpn.pipes import read_lines


class Background:
    """Tasks and pipes of one server."""

    def __init__(self, failed: Callable[[str], None]) -> None:
        self.last_line = ""
        """That any program wrote, but for blank ones."""
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Have it run."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def log_lines(self, name: str, awaited: str = "", met: asyncio.Future[None] | None = None) -> int:
        """The write end of a pipe, the caller's, whose lines go to the log; one with ``awaited`` in it resolves
        ``met``.
        """
        reader, writer = os.pipe()
        self.start(self._log(name, reader, awaited, met))
        return writer

    def close(self) -> None:
        """End what is still going on."""
        for task in self._tasks:
            task.cancel()

    async def _log(self, name: str, fd: int, awaited: str, met: asyncio.Future[None] | None) -> None:
        async for line in read_lines(fd):
            strangers.log.info("%s: %s", name, line)
            self.last_line = line if line.strip() else self.last_line
            if met is not None and not met.done() and awaited in line:
                met.set_result(None)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(f"an error of its own: {error!r}")
