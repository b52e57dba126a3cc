"""Name resolution inside a namespace: what programs ask on port 53 (``DnsServer``) goes to the gateway.

All queries share one stream; their ids are replaced by ours, so that two programs with the same id do not meet. A
stream that breaks is opened again with the next query; what was asked on it fails, and programs ask again.
"""

from __future__ import annotations

import asyncio
import itertools

from vpn.relay import dns, socks5
from vpn.relay.link import Link
from vpn.relay.tls import TlsStream

ANSWER_DEADLINE = 12.0  # seconds; the gateway asks each of its servers for 3


class DnsClient:
    """Asks the gateway."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._stream: TlsStream | None = None
        self._reading: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._numbers = itertools.cycle(range(65536))
        self._waiting: dict[int, asyncio.Future[bytes]] = {}

    async def ask(self, query: bytes) -> bytes:
        """The answer; SERVFAIL when there is none; b"" for what is no query."""
        if len(query) < dns.SHORTEST or len(self._waiting) >= 60000:
            return b""
        number = next(number for number in self._numbers if number not in self._waiting)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            async with asyncio.timeout(ANSWER_DEADLINE):
                stream = await self._open()
                async with self._sending:
                    await stream.send(socks5.give_message(dns.with_id(query, number)))
                return dns.with_id(await answer, dns.id_of(query))
        except (OSError, TimeoutError, ValueError, asyncio.InvalidStateError):
            return dns.failure(query)
        finally:
            del self._waiting[number]

    async def _open(self) -> TlsStream:
        async with self._opening:
            if self._stream is None:
                self._stream = await self._link.resolve()
                self._reading = asyncio.create_task(self._read(self._stream))
            return self._stream

    async def _read(self, stream: TlsStream) -> None:
        try:
            while True:
                message = await stream.receive(socks5.take_message, 65537)
                waiting = self._waiting.get(dns.id_of(message)) if len(message) >= dns.SHORTEST else None
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        except (OSError, ValueError):
            pass
        finally:
            self._stream = None
            stream.close()
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(ConnectionError("the gateway's end is gone"))
