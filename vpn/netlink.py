"""What a namespace needs of netlink(7): a device's address, MTU and state, routes, and one rule of nat.

Written out here, because a library that knows all of netlink takes longer to load (0.4 s) than a tunnel to come up.
Messages are built by pure functions; ``perform`` sends some and waits for the kernel's word on each. It raises
OSError with the kernel's errno. Sources: rtnetlink(7), linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

ROUTE, DIAGNOSIS, NETFILTER = 0, 4, 12  # protocols of netlink(7)
TCP_ENDS = (1, 3)  # SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_REQUEST, _ACK, _CREATE, _EXCL, _APPEND = 0x1, 0x4, 0x400, 0x200, 0x800
_NESTED = 0x8000
_ERROR = 2
_DEADLINE = 10.0
_UP = 1
_NODAD = 2  # an address nobody else can have need not be looked for
_NFT = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = (_NFT << 8 | number for number in (0, 3, 6))
_LOCAL_OUT, _ACCEPT = 3, 1
_META_OIFNAME, _META_L4PROTO = 7, 16

Message = tuple[int, int, bytes]
"""Type, flags beside request, and what follows the header."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | _NESTED, b"".join(attributes))


def link_up(index: int, mtu: int = 0, queue: int = 0) -> Message:
    """Set a device up; ``mtu`` in bytes, ``queue`` in packets that may wait to be sent; 0: as it is."""
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, _UP, _UP)
    given = ((4, mtu), (13, queue))
    return 16, _ACK, body + b"".join(attribute(kind, struct.pack("=I", value)) for kind, value in given if value)


def address_add(index: int, address: str) -> Message:
    """Give a device an address (CIDR)."""
    interface = ipaddress.ip_interface(address)
    family, prefix = _family(interface.version), interface.network.prefixlen
    body = struct.pack("=BBBBI", family, prefix, _NODAD if interface.version == 6 else 0, 0, index)
    return 20, _ACK | _CREATE | _EXCL, body + b"".join(attribute(kind, interface.packed) for kind in (2, 1))


def route_add(index: int, route: str) -> Message:
    """A route (CIDR) through a device."""
    network = ipaddress.ip_network(route)
    scope = 253 if network.version == 4 else 0  # RT_SCOPE_LINK: no gateway
    body = struct.pack("=8BI", _family(network.version), network.prefixlen, 0, 0, 254, 3, scope, 1, 0)
    destination = attribute(1, network.network_address.packed) if network.prefixlen else b""
    return 24, _ACK | _CREATE | _EXCL, body + destination + attribute(4, struct.pack("=I", index))


def redirect(family: int, table: str, device: str, port: int) -> list[Message]:
    """``nft``: table, chain, and rule that sends TCP leaving through ``device`` to a port of this host's instead.

    The same as ``oifname DEVICE meta l4proto tcp redirect to :PORT`` in a chain of type nat at hook output.
    """
    name = attribute(1, table.encode() + b"\0")
    hook = nested(4, attribute(1, struct.pack(">I", _LOCAL_OUT)), attribute(2, struct.pack(">i", -100)))
    chain = [name, attribute(3, b"output\0"), hook, attribute(5, struct.pack(">I", _ACCEPT)), attribute(7, b"nat\0")]
    expressions = [
        *_compare(_META_OIFNAME, device.encode().ljust(16, b"\0")),
        *_compare(_META_L4PROTO, bytes([socket.IPPROTO_TCP])),
        _expression("immediate", _number(1, 1), nested(2, attribute(1, struct.pack(">H", port)))),
        _expression("redir", _number(1, 1)),
    ]
    rule = [name, attribute(2, b"output\0"), nested(4, *expressions)]
    head = struct.pack(">BBH", family, 0, 0)
    batch = struct.pack(">BBH", socket.AF_UNSPEC, 0, _NFT)
    return [
        (_BATCH_BEGIN, 0, batch),
        (_NEW_TABLE, _ACK | _CREATE, head + name),
        (_NEW_CHAIN, _ACK | _CREATE, head + b"".join(chain)),
        (_NEW_RULE, _ACK | _CREATE | _APPEND, head + b"".join(rule)),
        (_BATCH_END, 0, batch),
    ]


def perform(protocol: int, messages: Sequence[Message]) -> None:
    """Send messages in one piece; returns when the kernel has done them all, raises OSError for the first refused."""
    data, waiting = b"", set()
    for number, (kind, flags, body) in enumerate(messages, 1):
        data += struct.pack("=IHHII", len(body) + 16, kind, flags | _REQUEST, number, 0) + body
        if flags & _ACK:
            waiting.add(number)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol) as sock:
        sock.settimeout(_DEADLINE)
        sock.bind((0, 0))
        sock.send(data)
        while waiting:
            for number, code in _acknowledged(sock.recv(65536)):
                if code:
                    raise OSError(code, os.strerror(code))
                waiting.discard(number)


def diagnosis(*groups: int) -> socket.socket:
    """A socket of sock_diag(7) that is told what these groups are; raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, DIAGNOSIS)
    try:
        sock.bind((0, 0))
        for group in groups:
            sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except OSError:
        sock.close()
        raise
    return sock


def diagnosing_sockets() -> list[socket.socket]:
    """One that can be asked about this namespace's connections, and one that is told of TCP ones that end, unless that
    is refused; raises OSError.
    """
    opened = [diagnosis()]
    with suppress(OSError):
        opened.append(diagnosis(*TCP_ENDS))
    return opened


def _acknowledged(data: bytes) -> list[tuple[int, int]]:
    """Message number and errno (0: done) of each acknowledgement."""
    found, offset = [], 0
    while offset + 16 <= len(data):
        length, kind, _, number, _ = struct.unpack_from("=IHHII", data, offset)
        if kind == _ERROR:
            found.append((number, -struct.unpack_from("=i", data, offset + 16)[0]))
        offset += max(16, length + -length % 4)
    return found


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(1, attribute(1, name.encode() + b"\0"), nested(2, *attributes))


def _compare(key: int, value: bytes) -> list[bytes]:
    """Load a property of the packet into register 1, and go on only if it equals this."""
    load = _expression("meta", _number(1, 1), _number(2, key))
    return [load, _expression("cmp", _number(1, 1), _number(2, 0), nested(3, attribute(1, value)))]
