"""``--direct`` in a mode whose tunnel takes every packet: networks that are reached from the node itself.

They are routed to a device of their own, ``direct0``, instead of the tunnel's; a data plane without a gateway serves
it outside, as relay's does: TCP and UDP, by IPv4 and IPv6; anything else is refused by ICMP. The tunnel's own name
servers are asked through the tunnel, also where they are in such a network.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress

from vpn.errors import TunnelError
from vpn.modes.base import BringUp
from vpn.modes.carrier import Carrier, open_device, redirected
from vpn.namespace import Namespace
from vpn.relay.datagrams import Network
from vpn.relay.plane import Settings, Sockets

DEVICE = "direct0"
ADDRESS, ADDRESS6 = "198.19.255.1/32", "fd68:7063:71::2/128"  # RFC 2544's tests: no network of anybody's
_DEFAULT = "0.0.0.0/0"


class DirectNetworks:
    """The networks, the device and its data plane."""

    def __init__(self, networks: Sequence[str], up: BringUp) -> None:
        self.networks = [ipaddress.ip_network(text) for text in networks]
        self._carrier = Carrier(up)

    async def start(self) -> None:
        """Start the data plane, which takes a while; the namespace may be made meanwhile."""
        await self._carrier.start(Settings(b"", direct=tuple(map(str, self.networks))))

    async def serve(self, namespace: Namespace) -> None:
        """Make the device, before the tunnel's own routes; raises TunnelError."""
        routes = {six: list(self._routes(six=six)) for six in (False, True)}
        with ExitStack() as stack:
            tun = await open_device(namespace, DEVICE, ADDRESS, routes[False], stack)
            if routes[True]:
                with suppress(TunnelError):  # a kernel that has IPv6 switched off does without
                    await namespace.configure(DEVICE, ADDRESS6, routes=routes[True])
            tcp = await redirected(namespace, DEVICE, stack)
            await self._carrier.report()
            self._carrier.serve([*tcp, tun], Sockets(tcp=len(tcp), tun=1))

    def _routes(self, *, six: bool) -> Iterable[str]:
        kept = [network for network in self.networks if (network.version == 6) == six]
        return dict.fromkeys(map(str, kept))


def tunnelled(direct: Sequence[Network], routes: Iterable[str], servers: Iterable[str]) -> list[str]:
    """Of a tunnel's ``routes`` (CIDR or "default") those that no direct network covers, and one for each of its name
    ``servers`` that one covers, unless it is that address alone. Pure.
    """

    def is_covered(route: str) -> bool:
        network = ipaddress.ip_network(_DEFAULT if route == "default" else route)
        return any(network.version == each.version and network.subnet_of(each) for each in direct)  # type: ignore[arg-type]

    kept = [route for route in routes if not is_covered(route)]
    others = {*kept, *map(str, direct)}
    asked = [str(ipaddress.ip_network(server)) for server in dict.fromkeys(servers)]
    return [*kept, *(route for route in asked if is_covered(route) and route not in others)]
