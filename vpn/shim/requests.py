"""What ``preload/socks.c`` asks, one packet each way on an abstract UNIX socket. Pure; raises ValueError on nonsense.

=======  ==========================================================  ==========================================
first    then                                                        answer
byte
=======  ==========================================================  ==========================================
``T``                                                                one byte, and the table's descriptor
``C``    ``struct connect_request``: a socket began to connect       an errno, 0 when its connection is begun
``N``    a host name                                                 EAI_… or 0, and addresses
``R``    an address, 16 bytes                                        one byte, and the name it stands for, if any
=======  ==========================================================  ==========================================

Numbers are in the node's byte order; addresses are IPv6, or IPv4 mapped into it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from vpn.shim.table import Address, pack_address, unpack_address

PACKET_LIMIT = 512
ADDRESS_LIMIT = 16
_CONNECT = struct.Struct("=cBH4xQ16s16sH6x")
_ERRNO = struct.Struct("=i")


@dataclass(frozen=True)
class GetTable:
    """A process wants the table."""


@dataclass(frozen=True)
class Connect:
    """The socket ``inode``, at ``local``:``local_port``, began to connect to the gate (of IPv6: ``six``) and is to
    reach ``address``:``port``.
    """

    six: bool
    inode: int
    local: Address
    local_port: int
    address: Address
    port: int


@dataclass(frozen=True)
class LookUp:
    """A program wants the address of a name."""

    name: str


@dataclass(frozen=True)
class Reverse:
    """A program wants the name of an address."""

    address: Address


Question = GetTable | Connect | LookUp | Reverse


def parse(data: bytes) -> Question:
    """A packet; raises ValueError."""
    kind, rest = data[:1], data[1:]
    if kind == b"T" and not rest:
        return GetTable()
    if kind == b"C" and len(data) == _CONNECT.size:
        _, six, port, inode, local, address, local_port = _CONNECT.unpack(data)
        return Connect(bool(six), inode, unpack_address(local), local_port, unpack_address(address), port)
    if kind == b"N" and rest:
        return LookUp(rest.decode("ascii"))
    if kind == b"R" and len(rest) == 16:
        return Reverse(unpack_address(rest))
    raise ValueError("not a question of the library")


def errno_answer(code: int) -> bytes:
    """To ``Connect``."""
    return _ERRNO.pack(code)


def name_answer(status: int, addresses: Sequence[Address] = ()) -> bytes:
    """To ``LookUp``."""
    return _ERRNO.pack(status) + b"".join(map(pack_address, addresses[:ADDRESS_LIMIT]))


def reverse_answer(name: str | None) -> bytes:
    """To ``Reverse``."""
    return b"\0" + (name or "").encode()
