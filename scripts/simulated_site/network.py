"""Links, addresses and routes of the site, by netlink. Each host sets up its own side.

Links are made by the builder in a network namespace of its own and moved to their hosts.
"""

from __future__ import annotations

import socket
from pathlib import Path

from pyroute2 import IPRoute

from simulated_site import plan
from simulated_site.errors import SiteError
from simulated_site.plan import Host
from simulated_site.shape import Shape, connect

OUTSIDE_LINKS = ("outside0", "eth0")
"""The login node's and the outside's end of the wire between them."""

RUNNING_DEADLINE = 30.0
_RTMGRP_LINK, _IFF_UP, _IFF_RUNNING = 1, 0x1, 0x40  # linux/rtnetlink.h, linux/if.h


def wire(pids: dict[str, int], outer: Shape | None) -> None:
    """A wire between login and wan, shaped or not, and one between login and each compute node."""
    outside = (OUTSIDE_LINKS[0], pids["login"]), (OUTSIDE_LINKS[1], pids["wan"])
    with IPRoute() as netlink:
        if outer is None:
            _pair(netlink, *outside)
        for host in plan.COMPUTE:
            _pair(netlink, (host.name, pids["login"]), ("eth0", pids[host.name]))
    if outer is not None:
        connect(*outside, outer)


def _pair(netlink: IPRoute, one: tuple[str, int], other: tuple[str, int]) -> None:
    peer = {"ifname": other[0], "net_ns_pid": other[1]}
    netlink.link("add", ifname=one[0], kind="veth", net_ns_pid=one[1], peer=peer)


def configure(host: Host) -> None:
    """In the host's network namespace: links up, addresses, and no forwarding. Returns when the links run, which needs
    the hosts at their other ends.
    """
    for family in ("ipv4", "ipv6"):
        switch = Path(f"/proc/sys/net/{family}/conf/all/forwarding")
        if switch.exists():  # a new namespace inherits the machine's setting
            switch.write_text("0")
    _let_everybody_ping()
    with _news_of_links() as news, IPRoute() as netlink:
        _up(netlink, "lo")
        if host.name == "login":
            _bridge(netlink)
            _address(netlink, OUTSIDE_LINKS[0], plan.LOGIN_OUTSIDE)
        else:
            _address(netlink, "eth0", host.address)
        _wait_until_running(netlink, news)


def _news_of_links() -> socket.socket:
    """Something comes whenever a link changes."""
    news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    news.bind((0, _RTMGRP_LINK))
    return news


def _wait_until_running(netlink: IPRoute, news: socket.socket) -> None:
    """The kernel says so up to a second after both ends are up: until then it is a host with its cables pulled."""
    news.settimeout(RUNNING_DEADLINE)
    while waiting := [link.get_attr("IFLA_IFNAME") for link in netlink.get_links() if _is_down(link["flags"])]:
        try:
            news.recv(65536)
        except TimeoutError:
            raise SiteError(f"{', '.join(waiting)}: up, but not running after {RUNNING_DEADLINE:g} s") from None


def _is_down(flags: int) -> bool:
    return bool(flags & _IFF_UP) and not flags & _IFF_RUNNING


def _let_everybody_ping() -> None:
    """As distributions do; a namespace of one id has only that group."""
    groups = Path("/proc/sys/net/ipv4/ping_group_range")
    try:
        groups.write_text("0 2147483647")
    except OSError:
        groups.write_text("0 0")


def _bridge(netlink: IPRoute) -> None:
    netlink.link("add", ifname=plan.BRIDGE, kind="bridge")
    bridge = _index(netlink, plan.BRIDGE)
    for host in plan.COMPUTE:
        netlink.link("set", index=_index(netlink, host.name), master=bridge, state="up")
    _address(netlink, plan.BRIDGE, plan.LOGIN_INSIDE)


def _address(netlink: IPRoute, name: str, address: str) -> None:
    netlink.addr("add", index=_index(netlink, name), address=address, prefixlen=plan.PREFIX_LENGTH)
    _up(netlink, name)


def _up(netlink: IPRoute, name: str) -> None:
    netlink.link("set", index=_index(netlink, name), state="up")


def _index(netlink: IPRoute, name: str) -> int:
    return int(netlink.link_lookup(ifname=name)[0])
