"""A namespace as a session sees it: the client of one holder.

``open_namespace`` starts the holder through a keeper and waits for its ``Ready``; the methods are the
requests of ``messages``. Closing it closes the socket, on which pid 1 exits and the kernel ends everything
inside.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import Literal

from vpn.channel import Packet, pair
from vpn.errors import TunnelError
from vpn.kernel import RESEND
from vpn.messages import Configure, Done, Listen, OpenTun, PrivateDirectory, Redirect, Report, Resolve, WriteFile
from vpn.process import REAP_DEADLINE, Client, Process, python_argv

Identity = Literal["user", "root", "privileged"]
Network = Literal["own", "host"]


class Namespace:
    """One namespace; ``client`` starts programs in it."""

    def __init__(self, client: Client, outer: Process) -> None:
        self.client = client
        self._outer = outer

    @property
    def pid(self) -> int:
        """The holder's pid 1 as seen from here: names the namespace for programs that join it."""
        return self.client.pid

    async def open_tun(self, name: str, *, headers: bool = False) -> int:
        """Make a tun device, one that takes several packets at once with ``headers``; a descriptor to be closed."""
        packet = await self.client.request(OpenTun(self.client.number(), name, headers))
        return packet.fds[0]

    async def listen(self, address: str, port: int = 0, *, udp: bool = False) -> tuple[int, int]:
        """A bound socket of the namespace, listening unless UDP: a descriptor the caller closes, and its port."""
        packet: Packet[Report] = await self.client.request(Listen(self.client.number(), address, port, udp))
        return packet.fds[0], int(packet.message.value) if isinstance(packet.message, Done) else port

    async def redirect(self, device: str, port: int, *, six: bool = False) -> None:
        """Send TCP that leaves through a device to this port of the namespace's loopback instead."""
        await self.client.request(Redirect(self.client.number(), device, port, six))

    async def configure(
        self, device: str, address: str, *, mtu: int = 0, routes: list[str] | None = None, queue: int = 0
    ) -> None:
        """Address (CIDR, "" for none), MTU in bytes and queue in packets (0: as it is), up, routes through it."""
        await self.client.request(Configure(self.client.number(), device, address, mtu, routes or [], queue))

    async def resolve_with(self, servers: list[str], search: list[str]) -> None:
        """Make these the name servers of every program inside."""
        await self.client.request(Resolve(self.client.number(), resolv_conf(servers, search)))

    async def write(self, path: str, text: str, mode: int = 0) -> None:
        """Write a setting such as /proc/sys/net/ipv4/ip_forward; with ``mode``, make a file."""
        await self.client.request(WriteFile(self.client.number(), path, text, mode))

    async def resume_soon(self) -> None:
        """Have TCP inside go on within `RESEND` seconds of an outage's end, where the kernel can (from 6.15)."""
        with suppress(TunnelError, OSError):
            await self.write("/proc/sys/net/ipv4/tcp_rto_max_ms", str(RESEND * 1000))

    async def private_directory(self) -> str:
        """A tmpfs only this namespace sees."""
        packet: Packet[Report] = await self.client.request(PrivateDirectory(self.client.number()))
        return packet.message.value if isinstance(packet.message, Done) else ""

    async def close(self) -> None:
        """End everything inside; returns when the kernel says it is gone."""
        self.client.close()
        await asyncio.wait([self._outer.ended], timeout=REAP_DEADLINE)


async def open_namespace(
    keeper: Client, identity: Identity = "user", network: Network = "own", *, new_session: bool = True
) -> Namespace:
    """Make a namespace; raises TunnelError naming what the node refuses."""
    ours, theirs = pair()
    client = Client(ours, "the namespace's holder")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        with theirs:
            outer = await keeper.spawn(
                python_argv("vpn.holder", "3", str(keeper.pid), identity, network),
                stdin=null,
                stdout=null,
                fds={3: theirs.fileno()},
                new_session=new_session,
            )
        namespace = Namespace(client, outer)
        await client.started()
    except BaseException:
        client.close()
        raise
    finally:
        os.close(null)
    return namespace


def resolv_conf(servers: list[str], search: list[str]) -> str:
    """The text of a resolv.conf (resolv.conf(5))."""
    lines = [f"nameserver {server}" for server in servers[:3]]
    if search:
        lines.append("search " + " ".join(search))
    return "\n".join([*lines, "options timeout:3 attempts:3", ""])
