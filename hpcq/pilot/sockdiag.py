"""The kernel's own counters of TCP sockets: sock_diag(7), asked for all there are, and told of each that ends.

A netlink socket answers for the network namespace it was made in, whoever reads it. A socket is named by its *cookie*,
which the kernel never gives to another one of the same namespace; whose it is, the links in /proc/PID/fd tell by its
inode, as long as a process has it. What says that a socket has ended has the counters and the cookie, and no inode.

Counted is what leaves the namespace: a connection with an end on the loopback, or with itself, is left out, and so are
the two ends of what mode ``relay`` redirects but the program's own. Where *gates* are named, which are ports of the
loopback, counted is what has one as its peer, and nothing else: the connections that mode ``socks`` makes. Figures are
right to a byte or two for each connection, since TCP counts its opening and its end as bytes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Set
from typing import NamedTuple

_NO_GATES: frozenset[int] = frozenset()

DEADLINE = 2.0
"""Seconds the kernel has to answer: it does so at once, or never."""

_DUMP_ALL_FAMILIES, _SOCKET = 18, 20  # TCPDIAG_GETSOCK, SOCK_DIAG_BY_FAMILY: what is told has this type too
_ERROR, _DONE = 2, 3
_REQUEST_DUMP = 0x001 | 0x300
_INFO = 2  # INET_DIAG_INFO
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBB48xII")  # inet_diag_req
_MESSAGE = struct.Struct("=BBxx4x16s16s4xQIIIII")  # inet_diag_msg
_PEERS_PORT_AT = 6
_PORT = struct.Struct(">H")
_ATTRIBUTE = struct.Struct("=HH")
_BYTES = struct.Struct("=QQ")
_BYTES_AT = 120  # tcp_info.tcpi_bytes_acked, then tcpi_bytes_received (Linux 4.1)
_LISTEN, _CLOSED = 10, 7
_STATES = 0xFFF & ~(1 << _LISTEN | 1 << 6 | 1 << 3)  # nor those that have no counters: TIME_WAIT, SYN_RECV
_NOWHERE = bytes(16)
_LOOPBACK = bytes(15) + b"\1"
_MAPPED = bytes(10) + b"\xff\xff"


class Flow(NamedTuple):
    """One TCP socket: its cookie, its inode (0: no process has it), and the bytes that were given to it and that it got
    since it was connected.
    """

    cookie: int
    inode: int
    sent: int
    received: int


def dump(asking: socket.socket, gates: Set[int]) -> list[Flow]:
    """Every TCP socket of the namespace with a peer elsewhere, or at one of the gates.

    Raises OSError, also for a kernel without sock_diag.
    """
    asking.settimeout(DEADLINE)
    number = _next_number()
    request = _REQUEST.pack(0, 0, 0, 1 << (_INFO - 1), _STATES, 0)
    asking.send(_HEADER.pack(_HEADER.size + len(request), _DUMP_ALL_FAMILIES, _REQUEST_DUMP, number, 0) + request)
    found: list[Flow] = []
    done = False
    while not done:
        flows, done = parse(asking.recv(1 << 18), number, gates)
        found += flows
    return found


_numbers = iter(range(1, 1 << 62))


def _next_number() -> int:
    return next(_numbers) & 0x7FFFFFFF


def ends(told: socket.socket, gates: Set[int]) -> Iterator[Flow]:
    """The sockets that have ended since the last time, as far as they had a peer elsewhere, or at one of the gates.

    Raises OSError (ENOBUFS) when some could not be told, since nobody had read for too long.
    """
    while True:
        try:
            data = told.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        yield from parse(data, 0, gates)[0]


def parse(data: bytes, number: int, gates: Set[int] = _NO_GATES) -> tuple[list[Flow], bool]:
    """The sockets in one datagram of the answer to request ``number`` (0: of what is told unasked), and whether it was
    the last. Raises OSError for the kernel's refusal.
    """
    found: list[Flow] = []
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, answers, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return found, True
        body = data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3
        if answers != number:  # to a question we no longer wait for
            continue
        if kind == _DONE:
            return found, True
        if kind == _ERROR:
            code = -int.from_bytes(body[:4], "little" if _IS_LITTLE else "big", signed=True)
            raise OSError(code, os.strerror(code))
        if kind in (_SOCKET, _DUMP_ALL_FAMILIES) and (flow := _flow(body, gates)) is not None:
            found.append(flow)
    return found, False


_IS_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _flow(body: bytes, gates: Set[int]) -> Flow | None:
    if len(body) < _MESSAGE.size:
        return None
    family, state, own, peer, cookie, _, _, waiting, _, inode = _MESSAGE.unpack_from(body)
    if gates:
        if _PORT.unpack_from(body, _PEERS_PORT_AT)[0] not in gates or not _is_here(family, peer):
            return None
    elif own == peer or _is_here(family, own) or _is_here(family, peer):
        return None
    for kind, value in _attributes(body[_MESSAGE.size :]):
        if kind == _INFO and len(value) >= _BYTES_AT + _BYTES.size:
            acknowledged, received = _BYTES.unpack_from(value, _BYTES_AT)
            sent = acknowledged + (waiting if state != _CLOSED else 0)
            return Flow(cookie, inode, max(0, sent - 1), received)  # what opened it is acknowledged as a byte
    return None


def _is_here(family: int, address: bytes) -> bool:
    """Whether it is the loopback's, or none: then it was never connected."""
    if family == socket.AF_INET:
        return address[0] in (0, 127)
    return address in (_NOWHERE, _LOOPBACK) or (address.startswith(_MAPPED) and address[12] in (0, 127))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def owners(wanted: Iterable[int], trees: Iterable[tuple[int, Iterable[int]]]) -> dict[int, int]:
    """Whose these inodes are: each to the key of the first of the ``trees`` (key, pids) with a process that has it."""
    left = set(wanted)
    found: dict[int, int] = {}
    for key, pids in trees:
        for pid in pids:
            if not left:
                return found
            for inode in _inodes(pid) & left:
                found[inode] = key
                left.discard(inode)
    return found


def _inodes(pid: int) -> set[int]:
    """The sockets a process has open."""
    found: set[int] = set()
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError, ValueError):
                link = os.readlink(entry.path)  # noqa: PTH115 - called for every descriptor
                if link.startswith("socket:["):
                    found.add(int(link[8:-1]))
    return found
