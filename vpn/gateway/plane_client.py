"""The daemon's end of the data plane: starts the process, tells it who has which address, asks for figures.

The process can be replaced: a data plane that ended by itself takes its connections with it, but no tunnel. The
next one gets the same sockets, and is told of every client again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec

from vpn.errors import VpnError
from vpn.gateway.plane_messages import (
    CONTROL_FD,
    Arrived,
    Ask,
    Figure,
    Figures,
    Left,
    Settings,
    decode_figures,
    encode,
)
from vpn.kept import Restarts, Tally
from vpn.process import Client, Process, python_argv
from vpn.programs import environment

log = logging.getLogger("vpn.gateway")

FIGURES_DEADLINE = 3.0
LINE_LIMIT = 64 << 20  # bytes: figures of every client in one line
AT_ONCE = (0.0,) * 5  # seconds before it is started again, as `Restarts` takes them


class DataPlane:
    """A data plane that is kept running; ``failed`` is called with the reason when it cannot be."""

    def __init__(
        self,
        keeper: Client,
        sockets: Mapping[int, int],
        settings: Settings,
        open_log: Callable[[], int],
        failed: Callable[[str], None],
        *,
        tally: Tally,
    ) -> None:
        self._keeper = keeper
        self._sockets = dict(sockets)  # where the process finds it → descriptor, ours to close
        self._settings = settings
        self._open_log = open_log
        self._failed = failed
        self._tally = tally
        self._clients: dict[str, str] = {}  # address → client
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Figure]]] = {}
        self._restarts = Restarts(AT_ONCE)
        self._writer: asyncio.StreamWriter | None = None
        self._process: Process | None = None
        self._keeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process, and keep one running from now on."""
        reader = await self._start_process()
        self._keeping = asyncio.create_task(self._keep(reader))

    async def close(self) -> None:
        """End it, and its sockets."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await self._process.end()
        for fd in self._sockets.values():
            os.close(fd)

    def arrived(self, address: str, client: str) -> None:
        """This tunnel address is this client's now."""
        self._clients[address] = client
        self._tell(Arrived(address, client))

    def left(self, client: str) -> None:
        """This client is gone for good: cut what it has open."""
        self._clients = {address: owner for address, owner in self._clients.items() if owner != client}
        self._tell(Left(client))

    async def figures(self) -> dict[str, Figure]:
        """What each client has moved; empty when the data plane does not answer."""
        number = next(self._numbers)
        future: asyncio.Future[dict[str, Figure]] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            self._tell(Ask(number))
            return await asyncio.wait_for(future, FIGURES_DEADLINE)
        except TimeoutError:
            log.warning("the data plane did not answer within %g s", FIGURES_DEADLINE)
            return {}
        finally:
            del self._asked[number]

    def _tell(self, message: msgspec.Struct) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    async def _start_process(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        null, output = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), self._open_log()
        try:
            self._process = await self._keeper.spawn(
                python_argv("vpn.gateway.plane", msgspec.json.encode(self._settings).decode()),
                env=environment(),
                cwd="/",
                stdin=null,
                stdout=null,
                stderr=output,
                fds={CONTROL_FD: theirs.fileno(), **self._sockets},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(null)
            os.close(output)
        if self._writer is not None:
            self._writer.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=LINE_LIMIT)
        for address, client in self._clients.items():
            self._tell(Arrived(address, client))
        return reader

    async def _keep(self, reader: asyncio.StreamReader) -> None:
        while True:
            assert self._process is not None
            try:
                await self._read(reader)
            except ValueError as error:  # nothing that a data plane says: this one is of no use
                log.error("the data plane is not understood: %s", error)
                self._process.send_signal(signal.SIGKILL)
            status = await self._process.wait()
            if self._restarts.after(asyncio.get_running_loop().time()) is None:
                self._failed(f"the data plane ended {self._restarts.ends} times within {self._restarts.within:g} s")
                return
            log.error("the data plane ended with status %d; its connections are lost, starting another", status)
            try:
                reader = await self._start_process()
            except (VpnError, OSError) as error:
                self._failed(f"the data plane cannot be started again: {error}")
                return
            self._tally.add(f"the data plane ended with status {status}")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while line := await reader.readline():
                answer: Figures = decode_figures(line)
                future = self._asked.get(answer.number)
                if future is not None and not future.done():
                    future.set_result(answer.clients)
