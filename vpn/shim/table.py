"""The memory every program of a session can read: where the gate is, what is reached directly, and for each local port
which socket wanted what, and with what outcome. ``preload/socks.c`` has the same layout in C.

It lives in a memfd: nothing on disk, gone with its last user. Only the forwarder can write it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import mmap
import os
import struct
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAGIC = 0x314B5356
HEADER_SIZE = 4096
DIRECT_LIMIT = 128
PORTS = 65536
PENDING = -1
THROUGH = 0

_HEADER = struct.Struct("=IHHI")
_NETWORK = struct.Struct("=16sI")
_ENTRY = struct.Struct("=Q16sHHi")
_OUTCOME = struct.Struct("=i")
_OUTCOME_AT = _ENTRY.size - _OUTCOME.size
SIZE = HEADER_SIZE + 2 * PORTS * _ENTRY.size

# linux/fcntl.h, for Pythons that do not name it: whoever has the descriptor may not make another writable mapping.
_F_SEAL_FUTURE_WRITE = 0x0010


class TooManyNetworksError(ValueError):
    """More networks than the table has room for."""


def pack_address(address: Address) -> bytes:
    """16 bytes: IPv6, or IPv4 mapped into it."""
    return address.packed if address.version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def unpack_address(data: bytes) -> Address:
    """The inverse; a mapped address becomes the IPv4 address it is."""
    address = ipaddress.IPv6Address(data)
    return address.ipv4_mapped or address


class Table:
    """The mapping, written here."""

    def __init__(self, gate4: int, gate6: int, direct: Sequence[Network]) -> None:
        if len(direct) > DIRECT_LIMIT:
            text = f"{len(direct)} networks are to be reached directly; at most {DIRECT_LIMIT} can be"
            raise TooManyNetworksError(text)
        self.fd = os.memfd_create("vpn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        self._map = mmap.mmap(self.fd, SIZE)
        _HEADER.pack_into(self._map, 0, MAGIC, gate4, gate6, len(direct))
        for index, network in enumerate(direct):
            bits = network.prefixlen + (96 if network.version == 4 else 0)
            _NETWORK.pack_into(
                self._map, _HEADER.size + index * _NETWORK.size, pack_address(network.network_address), bits
            )
        for seal in (fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK, _F_SEAL_FUTURE_WRITE):
            try:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seal)
            except OSError:  # kernels before 5.1 do not know the second
                continue

    def begin(self, *, six: bool, port: int, inode: int, address: Address, remote_port: int) -> None:
        """A socket at this local port wants a destination."""
        at = _offset(six, port)
        _ENTRY.pack_into(self._map, at, inode, pack_address(address), remote_port, 0, PENDING)

    def end(self, *, six: bool, port: int, outcome: int) -> None:
        """It is through (0), or cannot be (an errno)."""
        _OUTCOME.pack_into(self._map, _offset(six, port) + _OUTCOME_AT, outcome)

    def close(self) -> None:
        """Unmap; programs keep what they have mapped."""
        self._map.close()
        os.close(self.fd)


def _offset(six: bool, port: int) -> int:
    return HEADER_SIZE + (PORTS * six + port) * _ENTRY.size
