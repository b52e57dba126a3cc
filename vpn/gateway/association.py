"""UDP of a pilot through the gateway: one association, which is one connection of the relay.

Its targets are ``Ways``. The association ends with its connection, or when nothing came from the pilot for ``IDLE``.
"""

from __future__ import annotations

import asyncio
import collections
from contextlib import suppress

from vpn.gateway.outside import Outside, OutsideError
from vpn.gateway.ways import Ways
from vpn.relay.socks5 import Datagram, Target, give_datagram, take_datagram
from vpn.relay.tls import TlsStream

IDLE = 300.0  # seconds
TARGETS = 64
UNSENT_LIMIT = 1 << 20  # bytes that may wait for the pilot; more is dropped, as UDP is
_HEADER = 300


class Association:
    """The datagrams of one inner port."""

    def __init__(self, stream: TlsStream, client: str, outside: Outside) -> None:
        self.stream = stream
        self._ways: Ways[Target] = Ways(outside, client, TARGETS, self._on_answer, self._refuse)
        self._back: collections.deque[bytes] = collections.deque()
        self._waiting = 0
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Until the pilot ends it, or is silent for long."""
        sender = asyncio.create_task(self._send_back())
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    datagram = await self.stream.receive(take_datagram, 65535 + _HEADER)
                await self._on_datagram(datagram)
        except (TimeoutError, OSError, ValueError):
            pass  # its end, or no datagrams: either way it is over
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
            self._ways.close()

    async def _on_datagram(self, datagram: Datagram) -> None:
        target = datagram.target
        if target not in self._ways:
            try:
                await self._ways.open(target, target.host, target.port)
            except OutsideError:
                self._refuse(target)
                return
        self._ways.send(target, datagram.data)

    def _on_answer(self, target: Target, data: bytes) -> None:
        self._give(Datagram(target, data))

    def _refuse(self, target: Target) -> None:
        self._give(Datagram(target, b"", True))

    def _give(self, datagram: Datagram) -> None:
        data = give_datagram(datagram)
        if self._waiting + len(data) > UNSENT_LIMIT:
            return
        self._waiting += len(data)
        self._back.append(data)
        self._wake.set()

    async def _send_back(self) -> None:
        with suppress(OSError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                data = b"".join(self._back)
                self._back.clear()
                await self.stream.send(data)
                self._waiting -= len(data)
