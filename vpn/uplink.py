"""slirp4netns: a network stack in user space that gives a namespace the host's own way out (slirp4netns(1)).

It stands outside the namespace and joins it by the holder's pid. Ready when it writes to its ready descriptor; ended
by its exit descriptor when whoever started it dies.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from vpn.errors import TunnelError
from vpn.gateway.addresses import UPLINK
from vpn.namespace import Namespace
from vpn.process import Client, Process
from vpn.programs import environment, find_program

DEVICE = "tap0"
MTU = 65520
READY_DEADLINE = 20.0


class Uplink:
    """A running slirp4netns."""

    def __init__(self, process: Process, exit_fd: int) -> None:
        self.process = process
        self._exit_fd = exit_fd

    async def close(self) -> None:
        """End it."""
        os.close(self._exit_fd)
        await self.process.end()


async def start_uplink(
    keeper: Client, namespace: Namespace, options: Sequence[str], *, cwd: str | Path, log: int, mtu: int = MTU
) -> Uplink:
    """Attach ``tap0`` to the namespace; returns when it carries packets. Raises TunnelError."""
    program = find_program("slirp4netns")
    ready, ready_end = os.pipe()
    exit_end, exit_fd = os.pipe()
    argv = [
        program, "--configure", f"--mtu={mtu}", f"--cidr={UPLINK}", "--disable-host-loopback",
        "--ready-fd=3", "--exit-fd=4", *options, str(namespace.pid), DEVICE,
    ]  # fmt: skip
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        process = await keeper.spawn(
            argv, env=environment(), cwd=cwd, stdin=null, stdout=log, stderr=log, fds={3: ready_end, 4: exit_end}
        )
    except BaseException:
        os.close(ready)
        os.close(exit_fd)
        raise
    finally:
        for fd in (ready_end, exit_end, null):
            os.close(fd)
    uplink = Uplink(process, exit_fd)
    try:
        await _wait_ready(ready)
    except BaseException:
        await uplink.close()
        raise
    finally:
        os.close(ready)
    return uplink


async def _wait_ready(fd: int) -> None:
    """The descriptor becomes readable when slirp4netns is ready, and also when it died."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    os.set_blocking(fd, False)
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), READY_DEADLINE)
    except TimeoutError:
        raise TunnelError("tunnel", f"slirp4netns was not ready within {READY_DEADLINE:g} s") from None
    finally:
        loop.remove_reader(fd)
    if not os.read(fd, 1):
        raise TunnelError("tunnel", "slirp4netns ended before it was ready; its last words are in the log")
