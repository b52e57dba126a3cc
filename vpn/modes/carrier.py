"""The process of a data plane (``vpn.relay.plane``) as a mode has it.

It stands outside the namespace and serves what comes out by one device of it: a tun device whose routes say what that
is, whose TCP a rule of nat redirects to listeners. All of relay's traffic, or the networks of ``--direct`` alone. Its
end, for whatever reason, loses the tunnel.
"""

from __future__ import annotations

import asyncio
import collections
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec

from vpn.errors import TunnelError
from vpn.modes.base import BringUp
from vpn.namespace import Namespace
from vpn.pipes import filled, read_lines
from vpn.process import Process, first_of, python_argv
from vpn.programs import environment
from vpn.relay.plane import Report, Settings, Sockets

MTU = 65520
KEPT_LINES = 20
_CONTROL_FD = 3


class Carrier:
    """One data plane."""

    def __init__(self, up: BringUp) -> None:
        self._up = up
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, settings: Settings) -> None:
        """Start it; it is ended with the session."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._up.stack.callback(self._control.close)
        with theirs:
            self._process = await self._start(settings, theirs.fileno())

    async def report(self) -> Report:
        """Its first line; raises TunnelError with what it says when it cannot serve."""
        first = asyncio.ensure_future(self._reports.get())
        try:
            await first_of(first, self._process.ended)
            if not first.done():
                await asyncio.wait([first], timeout=1)  # its last words may still be in the pipe
            if not first.done():
                raise self._explain(self._process)
            report = first.result()
        finally:
            first.cancel()
        if report.layer:
            raise TunnelError(report.layer, report.message)  # type: ignore[arg-type]
        return report

    def serve(self, fds: Sequence[int], sockets: Sockets) -> None:
        """Give it the descriptors, which ``sockets`` tells apart; from now on it is watched."""
        socket.send_fds(self._control, [msgspec.json.encode(sockets)], fds)
        self._tasks.append(asyncio.create_task(self._watch(self._process)))

    async def _start(self, settings: Settings, control: int) -> Process:
        output, output_end = os.pipe()
        errors, errors_end = os.pipe()
        stdin = filled(msgspec.json.encode(settings))
        try:
            process = await self._up.keeper.spawn(
                python_argv("vpn.relay.plane", str(_CONTROL_FD)),
                env=environment(),
                cwd="/",
                stdin=stdin,
                stdout=output_end,
                stderr=errors_end,
                fds={_CONTROL_FD: control},
            )
        finally:
            for fd in (output_end, errors_end, stdin):
                os.close(fd)
            self._tasks += [
                asyncio.create_task(self._read_reports(output)),
                asyncio.create_task(self._read_errors(errors)),
            ]
            self._up.stack.push_async_callback(self._stop_reading)
        self._up.stack.push_async_callback(process.end)
        return process

    async def _watch(self, process: Process) -> None:
        last = Report()
        await process.wait()
        await asyncio.wait(self._tasks[:2], timeout=1)
        while not self._reports.empty():
            last = self._reports.get_nowait()
        if last.layer:
            self._up.lose(TunnelError(last.layer, last.message))  # type: ignore[arg-type]
        self._up.lose(self._explain(process))

    def _explain(self, process: Process) -> TunnelError:
        status = process.returncode
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        said = f": {self._lines[-1]}" if self._lines else ""
        return TunnelError("tunnel", f"the relay ended with {how}{said}")

    async def _read_reports(self, fd: int) -> None:
        async for line in read_lines(fd):
            self._reports.put_nowait(msgspec.json.decode(line, type=Report))

    async def _read_errors(self, fd: int) -> None:
        async for line in read_lines(fd):
            self._lines.append(line)

    async def _stop_reading(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def open_device(namespace: Namespace, device: str, address: str, routes: list[str], stack: ExitStack) -> int:
    """A tun device for it, up, with an address (CIDR) and routes: a descriptor that ``stack`` closes."""
    tun = await namespace.open_tun(device)
    stack.callback(os.close, tun)
    await namespace.configure(device, address, mtu=MTU, routes=routes)
    return tun


async def redirected(namespace: Namespace, device: str, stack: ExitStack) -> list[int]:
    """Listeners that TCP leaving by the device is redirected to, of IPv4 and, where it can be had, IPv6; ``stack``
    closes the descriptors.
    """
    fds = []
    for address, six in (("127.0.0.1", False), ("::1", True)):
        try:
            fd, port = await namespace.listen(address)
            stack.callback(os.close, fd)
            await namespace.redirect(device, port, six=six)
        except TunnelError:
            if not six:  # a kernel without IPv6, or without its nat, does without
                raise
        else:
            fds.append(fd)
    return fds
