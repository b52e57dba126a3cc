"""A runner as the pilot holds it: the process, its sockets, its directory. Decides nothing; see `pool`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from hpcq.pilot.runner import read_bounded
from hpcq.protocol import FRAME_LIMIT, FrameReader


class Spawned(Protocol):
    """A process started in or outside the tunnel's namespace."""

    pid: int

    async def wait(self) -> int:
        """Its status, negative for a signal."""


Spawn = Callable[..., Awaitable[Spawned]]


class Runner:
    """One runner process and its sockets."""

    def __init__(self, lane: int, directory: Path) -> None:
        self.lane = lane
        self.directory = directory
        self.process: Spawned | None = None
        self.handle = -1
        self.kills: set[asyncio.Future[None]] = set()
        self.known: set[bytes] = set()
        self.unsent: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self.killed = False
        self.over = False
        self.cpus: tuple[int, ...] = ()
        self.held = 0.0
        self.spent = 0.0
        self.tasks, self.tasks_far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.results, self.results_far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (self.tasks, self.results):
            end.setblocking(False)
        self.frames = FrameReader(FRAME_LIMIT)
        self.output = self.errors = -1
        try:
            directory.mkdir(mode=0o700)
            (directory / "home").mkdir(mode=0o700)
            self.output = self._open("stdout")
            self.errors = self._open("stderr")
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self.directory / name, flags, 0o600)

    def started(self, process: Spawned) -> None:
        """It runs; what it got is no longer ours."""
        with contextlib.suppress(ProcessLookupError):  # it has ended already, and is found out by that
            self.handle = os.pidfd_open(process.pid)
        self.process = process
        self.results_far.close()

    def written(self) -> tuple[bytes, bytes]:
        """What the task at hand has written so far."""
        output, errors = (read_bounded(fd, os.fstat(fd).st_size) for fd in (self.output, self.errors))
        return output, errors

    def close(self) -> None:
        """Let go of everything but the process and its directory."""
        for end in (self.tasks, self.tasks_far, self.results, self.results_far):
            end.close()
        for descriptor in (self.output, self.errors, self.handle):
            if descriptor >= 0:
                os.close(descriptor)
        for _, attached in self.unsent:
            for descriptor in attached:
                os.close(descriptor)
