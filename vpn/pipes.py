"""Pipes between processes, read without threads; and input that exists in memory only."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator


async def read_chunks(fd: int) -> AsyncIterator[bytes]:
    """Bytes of a pipe until its end; takes the descriptor over."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0))
    try:
        while chunk := await reader.read(65536):
            yield chunk
    finally:
        transport.close()


async def read_lines(fd: int) -> AsyncIterator[str]:
    """Lines of a pipe until its end; takes the descriptor over. A line longer than 64 KiB is cut."""
    rest = b""
    async for chunk in read_chunks(fd):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")
        rest = rest[:65536]
    if rest:
        yield rest.decode(errors="replace")


def filled(data: bytes) -> int:
    """A descriptor to read ``data`` from: memory only, never a file or an argv."""
    fd = os.memfd_create("stdin")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
