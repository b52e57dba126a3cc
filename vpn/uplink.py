"""slirp4netns, or pasta: a network stack in user space that gives a namespace the host's own way out (slirp4netns(1)).

It stands outside the namespace and joins it by the holder's pid. Ready when it writes to its ready descriptor;
slirp4netns is ended by its exit descriptor when whoever started it dies, pasta by its death signal (``vpn.pasta``).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vpn import pasta
from vpn.errors import TunnelError
from vpn.gateway.addresses import UPLINK
from vpn.namespace import Namespace
from vpn.process import Client, Process, first_of
from vpn.programs import environment, find_program

DEVICE = "tap0"
MTU = 65520
READY_DEADLINE = 20.0


class Uplink:
    """A running slirp4netns or pasta."""

    def __init__(self, process: Process, name: str, exit_fd: int = -1) -> None:
        self.process = process
        self.name = name
        self._exit_fd = exit_fd

    async def close(self) -> None:
        """End it."""
        if self._exit_fd >= 0:
            os.close(self._exit_fd)
        await self.process.end()


async def start_pasta(keeper: Client, namespace: Namespace, *, six: bool, log: int) -> Uplink:
    """Attach ``tap0`` by pasta; returns when it carries packets. Raises TunnelError."""
    room = tempfile.mkdtemp(prefix="pasta-")
    try:
        process, ready = await pasta.start(keeper, namespace, pasta.options(DEVICE, MTU, six=six), room, log)
        return await _started(Uplink(process, "pasta"), ready)
    finally:
        shutil.rmtree(room, ignore_errors=True)


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
    return await _started(Uplink(process, "slirp4netns", exit_fd), ready)


async def _started(uplink: Uplink, ready: int) -> Uplink:
    """Wait until it writes to the descriptor, which is closed; ended when it does not."""
    try:
        await _wait_ready(uplink, ready)
    except BaseException:
        await uplink.close()
        raise
    finally:
        os.close(ready)
    return uplink


async def _wait_ready(uplink: Uplink, fd: int) -> None:
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not readable.done():
            readable.set_result(None)

    os.set_blocking(fd, False)
    loop.add_reader(fd, on_readable)
    try:
        await first_of(readable, uplink.process.ended, deadline=READY_DEADLINE)
        if not readable.done() and uplink.process.returncode is None:
            raise TunnelError("tunnel", f"{uplink.name} was not ready within {READY_DEADLINE:g} s")
    finally:
        loop.remove_reader(fd)
    if not readable.done() or not os.read(fd, 1):
        raise TunnelError("tunnel", f"{uplink.name} ended before it was ready")
