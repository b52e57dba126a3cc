"""Connecting to a host that gave several addresses, of which perhaps one can be reached from here.

All are tried, each `STAGGER` seconds after the one before unless that has failed already (the idea of RFC 8305), so an
address that swallows packets costs a moment, not its whole time limit. Whoever answers may still be somebody else, as a
private address means another host on another network: the caller looks, and goes on if so.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

STAGGER = 0.25
"""Seconds an address is given before the next is tried beside it."""

Reached = tuple[str, socket.socket | str]
"""An address with its connected socket, or with the reason why there is none."""


@asynccontextmanager
async def reach(addresses: Sequence[str], port: int, timeout: float) -> AsyncIterator[AsyncIterator[Reached]]:
    """What becomes of each address, as it becomes known; ``timeout`` seconds for each.

    A socket that was handed out is the caller's; at the end of the block all other attempts are given up.
    """
    async with aclosing(_outcomes(addresses, port, timeout)) as outcomes:
        yield outcomes


async def _outcomes(addresses: Sequence[str], port: int, timeout: float) -> AsyncGenerator[Reached]:
    waiting = list(addresses)
    trying: dict[asyncio.Task[socket.socket], str] = {}
    try:
        while waiting or trying:
            if waiting:
                address = waiting.pop(0)
                trying[asyncio.create_task(_connect(address, port, timeout))] = address
            done, _ = await asyncio.wait(
                trying, timeout=STAGGER if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                address = trying.pop(task)
                error = task.exception()
                yield address, task.result() if error is None else _reason(error, timeout)
    finally:
        for task in trying:
            task.cancel()
        for result in await asyncio.gather(*trying, return_exceptions=True):
            if isinstance(result, socket.socket):
                result.close()


async def _connect(address: str, port: int, timeout: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(timeout):
        family, kind, protocol, _, where = (
            await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, where)
        except BaseException:
            sock.close()
            raise
    return sock


def _reason(error: BaseException, timeout: float) -> str:
    if isinstance(error, TimeoutError) and not getattr(error, "errno", None):
        return f"no answer within {timeout:.0f} s"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
