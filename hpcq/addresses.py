"""Where a manager listens and what it tells pilots: addresses of this host, and a port or a range of ports.

Login nodes have several networks, and not every one reaches the compute nodes: pilots are told all addresses and try
them in turn, unless the user names one (``address``) or the network (``interface``) that does.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import resource
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from hpcq.errors import UsageError

DESCRIPTORS = 65536
"""Open files the manager asks the system for: each pilot takes one, and one more while it moves files."""


def own_addresses(interface: str | None = None) -> list[str]:
    """This host's addresses that others can reach, IPv4 first; those of one interface if it is named.

    Raises:
        UsageError: there is no such interface, or it has no address; says which there are.
    """
    interfaces = psutil.net_if_addrs()
    if interface is not None and interface not in interfaces:
        raise UsageError(f"this host has no interface {interface!r}; it has {', '.join(sorted(interfaces))}")
    found: dict[str, None] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for name, entries in interfaces.items():
            for entry in entries:
                useless = ("fe80:",) if interface else ("fe80:", "127.", "::1")
                if name == (interface or name) and entry.family == family and not entry.address.startswith(useless):
                    found[entry.address] = None
    if interface is not None and not found:
        raise UsageError(f"interface {interface!r} has no address")
    return list(found) or ["127.0.0.1"]


def place(address: str | None, interface: str | None) -> tuple[str | None, list[str]]:
    """The address to listen on (None: all), and those to tell pilots.

    Raises:
        UsageError: both were given; the name cannot be resolved; no such interface.
    """
    if address is not None and interface is not None:
        raise UsageError("give address or interface, not both")
    if interface is not None:
        addresses = own_addresses(interface)
        return addresses[0], addresses[:1]
    if address is None:
        return None, own_addresses()
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"address {address!r} cannot be resolved: {error}") from None
    numeric = str(found[0][4][0])
    return numeric, own_addresses() if ipaddress.ip_address(numeric.partition("%")[0]).is_unspecified else [numeric]


def ports(port: int | str | Sequence[int]) -> Sequence[int]:
    """The ports to try, in order: one (0: any free one), ``"20000-20100"``, or a sequence.

    Raises:
        UsageError: not that, or none from 1 to 65535.
    """
    found: Sequence[int]
    if isinstance(port, str):
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:[-:]\s*(\d{1,5}))?\s*", port)
        if match is None:
            raise UsageError(f"port must be a number or a range such as 20000-20100, not {port!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        found = range(first, last + 1)
    elif isinstance(port, int):
        found = (port,)
    else:
        found = port
    if not found or not all(isinstance(one, int) and 0 < one < 65536 for one in found):
        if list(found) == [0]:
            return found
        raise UsageError(f"port must be from 1 to 65535, or 0 for any free one, not {port!r}")
    return found


def raise_descriptor_limit() -> int:
    """Let this process open as many files as the system allows it to, within reason; the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft if soft != resource.RLIM_INFINITY else DESCRIPTORS


def descriptors() -> dict[str, int]:
    """How many files this process has open, and how many it may have."""
    with contextlib.suppress(OSError):
        used = sum(1 for _ in Path("/proc/self/fd").iterdir())
        return {"used": used, "limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}
    return {}
