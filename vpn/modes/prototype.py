"""Mode ``prototype``: openconnect as a prototype had it, to be compared with, and for nothing else.

Source: the CHEP paper on user-level VPNs for HPC jobs (userlevel-vpn-tun-tap). Its tunnel was TLS alone, with an MTU
of 1472, and on the gateway slirp4netns forwarded both what is encrypted and what is not, with an MTU of 1500: a
gateway started with ``--uplink prototype`` does so. Its copying of packets between openconnect and the namespace is
left out: the comparison is kind to it.
"""

from __future__ import annotations

from dataclasses import replace

from vpn.config import TunnelConfig
from vpn.gateway.ocserv import PROTOTYPE_MTU
from vpn.modes import openconnect
from vpn.modes.base import BringUp
from vpn.modes.openconnect import OpenconnectTunnel


async def bring_up(config: TunnelConfig, up: BringUp) -> OpenconnectTunnel:
    """Bring a tunnel up; raises TunnelError naming the layer."""
    return await openconnect.bring_up(replace(config, dtls=False, mtu=PROTOTYPE_MTU), up)
