"""Mode ``relay``: TCP ends here and goes on from the gateway, encrypted between the two; no packets, no VPN program.

Sequence:

1. the data plane (``vpn.relay.plane``) starts outside, in the host's network, and opens its session at the gateway:
   the credential on its standard input, the gateway's key pinned (where no TLS is asked for, logins have it all the
   same, and what programs send goes by splice(2));
2. meanwhile a namespace with a tun device as its default route, and in it: listeners, one rule of nat that redirects
   what TCP leaves by the device to them, and the sockets of a name server;
3. their descriptors go to the data plane: commands can run.

The data plane ending, for whatever reason, loses the tunnel. IPv6 is offered inside when the gateway has it.
"""

from __future__ import annotations

import asyncio
import collections
import os
import socket
from contextlib import ExitStack, suppress

import msgspec

from vpn.config import Credential, TunnelConfig
from vpn.errors import TunnelError
from vpn.modes.base import PLAIN, BringUp, TunnelInfo
from vpn.namespace import Namespace, open_namespace
from vpn.pipes import filled, read_lines
from vpn.process import Client, Process, first_of, python_argv
from vpn.programs import environment
from vpn.relay.plane import Report, Settings, Sockets

DEVICE = "tun0"
ADDRESS, ADDRESS6 = "198.18.0.1", "fd68:7063:71::1"  # nobody else's: the namespace is the only one to know them
MTU = 65520
KEPT_LINES = 20
_CONTROL_FD = 3


class RelayTunnel:
    """One data plane and its namespace."""

    def __init__(self, config: TunnelConfig, credential: Credential, up: BringUp) -> None:
        self.config = config
        self.credential = credential
        self.up = up
        self.report = Report()
        self.seconds = 0.0
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def client(self) -> Client:
        """The holder, which starts programs inside."""
        return self.namespace.client

    def info(self) -> TunnelInfo:
        """As it came up."""
        return TunnelInfo(
            mode="relay",
            kind="TLS" if self.config.tls else PLAIN,
            cipher=self.report.cipher if self.config.tls else "",
            bring_up_seconds=self.seconds,
            address=ADDRESS,
            mtu=MTU,
            server=f"{self.report.server}:{self.credential.relay_port}",
            dns=(ADDRESS,),
        )

    async def bring_up(self) -> None:
        """The sequence above."""
        self.up.step = ("program", "starting the relay")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.up.stack.callback(ours.close)
        with theirs:
            process = await self._start(theirs.fileno())
        self.up.step = ("user namespaces", "making a namespace")
        self.namespace: Namespace = await open_namespace(self.up.keeper, new_session=self.up.new_session)
        self.up.stack.push_async_callback(self.namespace.close)
        self.namespace.client.lost.add_done_callback(lambda future: self.up.lose(future.result()))
        with ExitStack() as stack:
            fds, sockets = await self._furnish(stack)
            self.up.step = ("gateway", f"opening a session at {', '.join(self.credential.addresses)}")
            self.report = await self._first_report(process)
            socket.send_fds(ours, [msgspec.json.encode(sockets)], fds)
        if self.report.has_ipv6:
            with suppress(TunnelError):  # a kernel that has IPv6 switched off does without
                await self.namespace.configure(DEVICE, f"{ADDRESS6}/128", routes=["::/0"])
        self._tasks.append(asyncio.create_task(self._watch(process)))
        self.seconds = self.up.keeper.loop.time() - self.up.started_at

    async def _start(self, control: int) -> Process:
        settings = Settings(
            self.credential.to_bytes(), self.config.reconnect_timeout, self.config.direct, self.config.tls
        )
        output, output_end = os.pipe()
        errors, errors_end = os.pipe()
        stdin = filled(msgspec.json.encode(settings))
        try:
            process = await self.up.keeper.spawn(
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
            self.up.stack.push_async_callback(self._stop_reading)
        self.up.stack.push_async_callback(process.end)
        return process

    async def _furnish(self, stack: ExitStack) -> tuple[list[int], Sockets]:
        """The namespace's device, listeners and rules; their descriptors, in the order ``Sockets`` says."""
        self.up.step = ("tunnel", "configuring the namespace")
        namespace = self.namespace
        tun = await namespace.open_tun(DEVICE)
        stack.callback(os.close, tun)
        await namespace.configure(DEVICE, f"{ADDRESS}/32", mtu=MTU, routes=["default"])
        tcp = await self._redirected(stack)
        dns = []
        for udp in (True, False):
            fd, _ = await namespace.listen(ADDRESS, 53, udp=udp)
            stack.callback(os.close, fd)
            dns.append(fd)
        await namespace.resolve_with(list(self.config.dns) or [ADDRESS], [])
        return [*tcp, *dns, tun], Sockets(tcp=len(tcp), dns_udp=1, dns_tcp=1, tun=1)

    async def _redirected(self, stack: ExitStack) -> list[int]:
        fds = []
        for address, six in (("127.0.0.1", False), ("::1", True)):
            try:
                fd, port = await self.namespace.listen(address)
                stack.callback(os.close, fd)
                await self.namespace.redirect(DEVICE, port, six=six)
            except TunnelError:
                if not six:  # a kernel without IPv6, or without its nat, does without
                    raise
            else:
                fds.append(fd)
        return fds

    async def _first_report(self, process: Process) -> Report:
        first = asyncio.ensure_future(self._reports.get())
        try:
            await first_of(first, process.ended)
            if not first.done():
                await asyncio.wait([first], timeout=1)  # its last words may still be in the pipe
            if not first.done():
                raise self._explain(process)
            report = first.result()
        finally:
            first.cancel()
        if report.layer:
            raise TunnelError(report.layer, report.message)  # type: ignore[arg-type]
        return report

    async def _watch(self, process: Process) -> None:
        last = Report()
        await process.wait()
        await asyncio.wait(self._tasks[:2], timeout=1)
        while not self._reports.empty():
            last = self._reports.get_nowait()
        if last.layer:
            self.up.lose(TunnelError(last.layer, last.message))  # type: ignore[arg-type]
        self.up.lose(self._explain(process))

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


async def bring_up(config: TunnelConfig, up: BringUp) -> RelayTunnel:
    """Bring a tunnel up; raises TunnelError naming the layer."""
    credential = config.credential
    if credential is None or not credential.relay_port:
        raise TunnelError("gateway", "this credential's gateway has no relay: start it again with this version of hpcq")
    tunnel = RelayTunnel(config, credential, up)
    await tunnel.bring_up()
    return tunnel
