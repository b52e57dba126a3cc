"""Mode ``relay``: TCP ends here and goes on from the gateway, encrypted between the two; no packets, no VPN program.

Sequence:

1. the data plane (``vpn.relay.plane``) starts outside, in the host's network, and opens its session at the gateway:
   the credential on its standard input, the gateway's key pinned (where no TLS is asked for, logins have it all the
   same, and what programs send goes by splice(2));
2. meanwhile a namespace with a tun device as its default route, and in it: listeners, one rule of nat that redirects
   what TCP leaves by the device to them, and the sockets of a name server;
3. their descriptors go to the data plane: commands can run.

The data plane ending, for whatever reason, loses the tunnel. IPv6 is offered inside when the gateway
has it; networks of ``direct`` always.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress

from vpn.config import Credential, TunnelConfig
from vpn.errors import TunnelError
from vpn.modes.base import PLAIN, BringUp, TunnelInfo
from vpn.modes.carrier import MTU, Carrier, open_device, redirected
from vpn.namespace import Namespace, open_namespace
from vpn.process import Client
from vpn.relay.plane import Report, Settings, Sockets

DEVICE = "tun0"
ADDRESS, ADDRESS6 = "198.18.0.1", "fd68:7063:71::1"  # nobody else's: the namespace is the only one to know them


class RelayTunnel:
    """One data plane and its namespace."""

    def __init__(self, config: TunnelConfig, credential: Credential, up: BringUp) -> None:
        self.config = config
        self.credential = credential
        self.up = up
        self.report = Report()
        self.seconds = 0.0

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
        carrier, config = Carrier(self.up), self.config
        await carrier.start(
            Settings(
                self.credential.to_bytes(), config.reconnect_timeout, config.direct, config.tls, config.probe_interval
            )
        )
        self.up.step = ("user namespaces", "making a namespace")
        self.namespace: Namespace = await open_namespace(self.up.keeper, new_session=self.up.new_session)
        self.up.stack.push_async_callback(self.namespace.close)
        self.namespace.client.lost.add_done_callback(lambda future: self.up.lose(future.result()))
        with ExitStack() as stack:
            fds, sockets = await self._furnish(stack)
            self.up.step = ("gateway", f"opening a session at {', '.join(self.credential.addresses)}")
            self.report = await carrier.report()
            carrier.serve(fds, sockets)
        routes = ["::/0"] if self.report.has_ipv6 else sorted({each for each in config.direct if ":" in each})
        if routes:
            with suppress(TunnelError):  # a kernel that has IPv6 switched off does without
                await self.namespace.configure(DEVICE, f"{ADDRESS6}/128", routes=routes)
        self.seconds = self.up.keeper.loop.time() - self.up.started_at

    async def _furnish(self, stack: ExitStack) -> tuple[list[int], Sockets]:
        """The namespace's device, listeners and rules; their descriptors, in the order ``Sockets`` says."""
        self.up.step = ("tunnel", "configuring the namespace")
        namespace = self.namespace
        tun = await open_device(namespace, DEVICE, f"{ADDRESS}/32", ["default"], stack)
        tcp = await redirected(namespace, DEVICE, stack)
        dns = []
        for udp in (True, False):
            fd, _ = await namespace.listen(ADDRESS, 53, udp=udp)
            stack.callback(os.close, fd)
            dns.append(fd)
        await namespace.resolve_with(list(self.config.dns) or [ADDRESS], [])
        return [*tcp, *dns, tun], Sockets(tcp=len(tcp), dns_udp=1, dns_tcp=1, tun=1)


async def bring_up(config: TunnelConfig, up: BringUp) -> RelayTunnel:
    """Bring a tunnel up; raises TunnelError naming the layer."""
    credential = config.credential
    if credential is None or not credential.relay_port:
        raise TunnelError("gateway", "this credential's gateway has no relay: start it again with this version of hpcq")
    tunnel = RelayTunnel(config, credential, up)
    await tunnel.bring_up()
    return tunnel
