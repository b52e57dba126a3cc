"""Bytes that tasks send and receive: the kernel's own counters of every TCP socket, asked for by sock_diag(7).

A netlink socket answers for the network namespace it was made in, so one that was made inside a tunnel's namespace
tells of the connections there, whoever reads it. Each socket says how many bytes were acknowledged and received so far
(``tcp_info``) and its inode; whose it is, the links in /proc/PID/fd tell. What a connection did after it was last
looked at is missed, so sums are lower bounds. Connections to the node itself (loopback) do not count.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

DEADLINE = 2.0
"""Seconds the kernel has to answer: it does so at once, or never."""

_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLMSG_DONE = 20, 2, 3
_REQUEST_DUMP = 0x001 | 0x300
_INET_DIAG_INFO = 2
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2
_MESSAGE = struct.Struct("=BBBB4x16s16s4x8xIIIII")  # inet_diag_msg; addresses, then …, inode
_ATTRIBUTE = struct.Struct("=HH")
_BYTES = struct.Struct("=QQ")
_BYTES_AT = 120  # tcp_info.tcpi_bytes_acked, then tcpi_bytes_received (Linux 4.1)
_ALL_STATES = 0xFFF


class Flow(NamedTuple):
    """One TCP socket: its inode, bytes sent (acknowledged) and received since it was connected."""

    inode: int
    sent: int
    received: int


class Traffic(NamedTuple):
    """Bytes of one task."""

    sent: int = 0
    received: int = 0


NO_TRAFFIC = Traffic()


def open_diagnosis() -> socket.socket:
    """A sock_diag socket of the namespace we are in."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)  # NETLINK_SOCK_DIAG


def flows(diagnosis: socket.socket) -> list[Flow]:
    """Every TCP socket of the namespace that has a process and a peer elsewhere. Raises OSError."""
    diagnosis.settimeout(DEADLINE)
    found: list[Flow] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), _ALL_STATES)
        length = _HEADER.size + len(request)
        diagnosis.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, family, 0) + request)
        done = False
        while not done:
            done = parse(diagnosis.recv(1 << 18), family, found)
    return found


def parse(data: bytes, sequence: int, found: list[Flow]) -> bool:
    """Take one datagram of an answer; whether it was the last of it. Raises OSError for the kernel's refusal."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, number, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return True
        body = data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3
        if number != sequence:  # of an answer we did not wait for
            continue
        if kind == _NLMSG_DONE:
            return True
        if kind == _NLMSG_ERROR:
            code = -int.from_bytes(body[:4], "little", signed=True)
            raise OSError(code, os.strerror(code))
        flow = _flow(body)
        if flow is not None:
            found.append(flow)
    return False


def _flow(body: bytes) -> Flow | None:
    if len(body) < _MESSAGE.size:
        return None
    _, _, _, _, _, peer, *_, inode = _MESSAGE.unpack_from(body)
    if not inode or _is_here(body[0], peer):
        return None
    for kind, value in _attributes(body[_MESSAGE.size :]):
        if kind == _INET_DIAG_INFO and len(value) >= _BYTES_AT + _BYTES.size:
            sent, received = _BYTES.unpack_from(value, _BYTES_AT)
            return Flow(inode, max(0, sent - 1), received)  # the SYN is acknowledged as a byte
    return None


def _is_here(family: int, peer: bytes) -> bool:
    """Whether the other side is this node's loopback, or nobody (a listening socket)."""
    if family == socket.AF_INET:
        return peer[0] in (0, 127)
    mapped = peer.startswith(bytes(10) + b"\xff\xff")
    return peer in (bytes(16), bytes(15) + b"\1") or (mapped and peer[12] == 127)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def inodes(pids: Iterable[int]) -> set[int]:
    """The sockets these processes have open."""
    found: set[int] = set()
    for pid in pids:
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError, ValueError):
                    link = os.readlink(entry.path)  # noqa: PTH115 - called for every descriptor
                    if link.startswith("socket:["):
                        found.add(int(link[8:-1]))
    return found


class Account:
    """The traffic of one runner's task: the sum over its sockets, also those that are closed by now.

    An interpreter keeps connections from task to task: what they had done by the last look belongs to the task before.
    """

    def __init__(self) -> None:
        self._before: dict[int, Flow] = {}
        self._last: dict[int, Flow] = {}

    def begin(self) -> None:
        """Another task."""
        self._before, self._last = self._last, {}

    def look(self, own: set[int], now: Iterable[Flow]) -> Traffic:
        """The task's traffic, given its sockets and what the kernel says of all."""
        self._last.update((flow.inode, flow) for flow in now if flow.inode in own)
        sent = received = 0
        for inode, flow in self._last.items():
            before = self._before.get(inode)
            if before is None or before.sent > flow.sent or before.received > flow.received:  # the number is used again
                before = _NOTHING_YET
            sent += flow.sent - before.sent
            received += flow.received - before.received
        return Traffic(sent, received)


_NOTHING_YET = Flow(0, 0, 0)
