"""Mode ``slirp``: a namespace whose only way out is slirp4netns, over the node's own outside access.

For nodes that can reach outside, but where tasks are to have a network of their own: nothing of the host's loopback,
no ports of other jobs. Sequence: the namespace → slirp4netns attached, with IPv6 where the node has a route for it →
name servers: its own forwarder, which asks the node's. There is no gateway, so no credential. Its end loses the tunnel.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

from vpn.config import TunnelConfig
from vpn.errors import TunnelError
from vpn.gateway.addresses import UPLINK_DNS, UPLINK_GUEST
from vpn.modes.base import BringUp, TunnelInfo
from vpn.namespace import Namespace, open_namespace
from vpn.pipes import read_lines
from vpn.process import Client
from vpn.programs import find_program
from vpn.uplink import MTU, start_uplink

_ANYWHERE = "0" * 32 + " 00"  # destination and prefix length of a default route in /proc/net/ipv6_route


class SlirpTunnel:
    """The namespace and its slirp4netns."""

    def __init__(self, namespace: Namespace, info: TunnelInfo) -> None:
        self._namespace = namespace
        self._info = info

    @property
    def client(self) -> Client:
        """The holder, which starts programs inside."""
        return self._namespace.client

    def info(self) -> TunnelInfo:
        """As it came up."""
        return self._info


async def bring_up(config: TunnelConfig, up: BringUp) -> SlirpTunnel:
    """Bring it up; raises TunnelError naming the layer."""
    find_program("slirp4netns")
    up.step = ("user namespaces", "making a namespace")
    namespace = await open_namespace(up.keeper, new_session=up.new_session)
    up.stack.push_async_callback(namespace.close)
    namespace.client.lost.add_done_callback(lambda future: up.lose(future.result()))
    up.step = ("tun", "trying /dev/net/tun")
    os.close(await namespace.open_tun("probe"))  # refused, this says why; slirp4netns would not
    up.step = ("tunnel", "starting slirp4netns")
    await _attach(namespace, config, up)
    servers = list(config.dns) or [UPLINK_DNS]
    await namespace.resolve_with(servers, search_domains())
    seconds = up.keeper.loop.time() - up.started_at
    return SlirpTunnel(
        namespace, TunnelInfo("slirp", "slirp4netns", "", seconds, UPLINK_GUEST, MTU, dns=tuple(servers))
    )


async def _attach(namespace: Namespace, config: TunnelConfig, up: BringUp) -> None:
    output, output_end = os.pipe()
    reading = asyncio.create_task(_pass_on(output))
    up.stack.callback(reading.cancel)
    options = [*(["--enable-ipv6"] if has_ipv6_route() else []), *(["--disable-dns"] if config.dns else [])]
    try:
        uplink = await start_uplink(up.keeper, namespace, options, cwd="/", log=output_end)
    except TunnelError:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(reading), 1)
        raise
    finally:
        os.close(output_end)
    up.stack.push_async_callback(uplink.close)
    uplink.process.ended.add_done_callback(
        lambda ended: up.lose(TunnelError("tunnel", f"slirp4netns ended (status {ended.result()})"))
    )


async def _pass_on(output: int) -> None:
    """What it says when all is well is nobody's business; what it complains about is for standard error."""
    async for line in read_lines(output):
        if "ERROR" in line.upper() or "fail" in line or "cannot" in line.lower():
            sys.stderr.write(f"slirp4netns: {line}\n")


def has_ipv6_route(routes: Path = Path("/proc/net/ipv6_route")) -> bool:
    """Whether this node has a default route for IPv6 over a device other than lo."""
    try:
        lines = routes.read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith(_ANYWHERE) and line.split()[-1] != "lo" for line in lines)


def search_domains(file: Path = Path("/etc/resolv.conf")) -> list[str]:
    """The node's own search list (resolv.conf(5): the last one counts)."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return []
    lists = [line.split()[1:] for line in lines if line.split()[:1] in (["search"], ["domain"])]
    return lists[-1] if lists else []
