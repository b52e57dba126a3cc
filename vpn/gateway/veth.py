"""The uplink of a privileged gateway: a veth pair between its namespace and the host, and NAT by the host's kernel.

It stands where slirp4netns does otherwise, with the same name inside (``tap0``) and the same network, so that the
filter and the addresses there are the same. The host's side is one device, one table of nftables, and forwarding
switched on. If that was off, the table keeps the host from forwarding for anybody else, who may count on that it does
not. The device goes with the namespace, whatever ends it. What SIGKILL leaves is the table, and with it forwarding for
nobody: the next gateway takes both away at its end.
"""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from pathlib import Path

from vpn import netlink
from vpn.errors import GatewayError, VpnError
from vpn.gateway.addresses import UPLINK, UPLINK_DEVICE, UPLINK_GUEST, UPLINK_HOST
from vpn.namespace import Namespace
from vpn.process import Client, run
from vpn.programs import environment
from vpn.uplink import DEVICE

log = logging.getLogger("vpn.gateway")

TABLE = "hpcq_gateway"
TOOL_DEADLINE = 20.0
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
WAS_OFF = Path("/run/hpcq-gateway.forwarding")
"""Stands as long as forwarding is on for us alone; /run lasts as long as the setting, until the next boot."""
_CLEAR = f"add table ip {TABLE}\ndelete table ip {TABLE}\n"  # there or not
_BITS = UPLINK.partition("/")[2]


def host_rules(*, closed: bool) -> str:
    """The host's table; ``closed``: nothing but ours is forwarded."""
    return f"""\
table ip {TABLE} {{
    chain leave {{
        type nat hook postrouting priority 100; policy accept;
        ip saddr {UPLINK_GUEST} oifname != "{UPLINK_DEVICE}" masquerade
    }}
    chain pass {{
        type filter hook forward priority -10; policy {"drop" if closed else "accept"};
        iifname "{UPLINK_DEVICE}" accept
        oifname "{UPLINK_DEVICE}" ct state established,related accept
        oifname "{UPLINK_DEVICE}" drop
    }}
}}
"""


class Veth:
    """The host's side, until it is closed."""

    def __init__(self, keeper: Client, nft: str) -> None:
        self._keeper = keeper
        self._nft = nft
        self._ours = False

    async def open(self, namespace: Namespace) -> None:
        """Connect the namespace; raises GatewayError."""
        try:
            netlink.perform(netlink.ROUTE, [netlink.veth_add(UPLINK_DEVICE, DEVICE, namespace.pid)])
            self._ours = True
            index = socket.if_nametoindex(UPLINK_DEVICE)
            address = netlink.address_add(index, f"{UPLINK_HOST}/{_BITS}")
            netlink.perform(netlink.ROUTE, [address, netlink.link_up(index)])
        except FileExistsError:
            raise GatewayError(
                f"another privileged gateway runs on this host: the device {UPLINK_DEVICE} or its address is there"
            ) from None
        except OSError as error:
            raise GatewayError(f"the device {UPLINK_DEVICE} cannot be made: {error.strerror}") from None
        await namespace.configure(DEVICE, f"{UPLINK_GUEST}/{_BITS}", routes=[f"default via {UPLINK_HOST}"])
        try:
            await self._load(_CLEAR + host_rules(closed=_note_forwarding()))
            forward(on=True)
        except OSError as error:
            raise GatewayError(f"forwarding cannot be switched on: {error}") from None

    async def close(self) -> None:
        """Take the table away, put forwarding back, and remove the device: it goes with the namespace too, but when
        the kernel comes to that, which may be after the next gateway has asked for one.
        """
        if not self._ours:
            return
        try:
            forward(on=False)
            await self._load(_CLEAR)
        except (VpnError, OSError) as error:
            log.error("the host's forwarding could not be put back: %s", error)
        with suppress(OSError):  # it has gone already
            netlink.perform(netlink.ROUTE, [netlink.link_delete(socket.if_nametoindex(UPLINK_DEVICE))])

    async def _load(self, text: str) -> None:
        try:
            status, said = await run(
                self._keeper, [self._nft, "-f", "-"], stdin=text.encode(), env=environment(), deadline=TOOL_DEADLINE
            )
        except (OSError, TimeoutError) as error:
            raise GatewayError(f"{self._nft} could not be run: {error or 'timeout'}") from None
        if status != 0:
            raise GatewayError(f"nft cannot set up the host's NAT: {said.strip().partition(chr(10))[0]}")


def _note_forwarding() -> bool:
    """Whether forwarding is off but for us; noted before it is switched on."""
    if FORWARDING.read_text().strip() == "0":
        WAS_OFF.touch(0o600)
    return WAS_OFF.exists()


def forward(*, on: bool) -> None:
    """Switch the host's forwarding on, or off if it was off before."""
    if on:
        FORWARDING.write_text("1")
    elif WAS_OFF.exists():
        FORWARDING.write_text("0")
        WAS_OFF.unlink()
