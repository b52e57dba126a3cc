"""The gateway's credentials on disk: one file of mode 0600, replaced as a whole.

``save`` returns when what it was called with, or something newer, is on disk. A disk that is full or gone is
reported once and ends nothing: what it costs is that these credentials do not outlive the gateway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from vpn.gateway.credentials import Saved
from vpn.gateway.state import write_private

log = logging.getLogger("vpn.gateway")


class Store:
    """The file, and the one writer it has at a time; ``contents`` says what is to be written when it is."""

    def __init__(self, path: Path, contents: Callable[[], list[Saved]]) -> None:
        self.path = path
        self._contents = contents
        self._writing = asyncio.Lock()
        self._wanted = 0
        self._written = 0
        self._failing = False

    def load(self) -> list[Saved]:
        """What was saved; nothing when there is no such file, or it is not one of ours."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=list[Saved])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s cannot be read, its credentials are lost: %s", self.path, error)
            return []

    async def save(self) -> None:
        """Write what is to be kept now; many that ask at once share one writing."""
        self._wanted += 1
        mine = self._wanted
        async with self._writing:
            if self._written < mine:
                self._written = self._wanted
                await self._write(msgspec.json.encode(self._contents()))

    async def _write(self, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, write_private, self.path, data)
        except OSError as error:
            if not self._failing:
                log.error("%s cannot be written, credentials will not outlive this gateway: %s", self.path, error)
            self._failing = True
        else:
            self._failing = False
