"""A SOCK_SEQPACKET socket that carries typed messages with file descriptors and process ids.

One packet is one message. A message larger than a packet may be goes into a memfd that is sent as its first
descriptor: a task's environment can be larger than the kernel's socket buffer. A process id is sent as
SCM_CREDENTIALS, which the kernel translates between pid namespaces (unix(7)).
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from vpn.messages import Message, Report, Request

INLINE_LIMIT = 32 * 1024
FD_LIMIT = 240  # the kernel's SCM_MAX_FD is 253
_INLINE, _MEMFD = b"\0", b"\1"
_CREDENTIALS = struct.Struct("3i")
_ANCILLARY = socket.CMSG_SPACE((FD_LIMIT + 1) * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)

M = TypeVar("M")


class Packet(NamedTuple, Generic[M]):
    """A received message, its descriptors (now the receiver's), and the sender's process id (0: not sent).

    At the limit of open files the kernel drops descriptors: there can be fewer than were sent.
    """

    message: M
    fds: list[int]
    pid: int


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets; the first, our end, is told process ids."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


class Channel(Generic[M]):
    """Sends any message; receives those of one direction, refusing anything else."""

    def __init__(self, sock: socket.socket, incoming: type[M]) -> None:
        self.sock = sock
        self._decode = msgspec.msgpack.Decoder(incoming).decode

    def send(self, message: Message, fds: Sequence[int] = (), pid: int = 0) -> None:
        """Send one message; raises BlockingIOError when the socket is non-blocking and full."""
        if len(fds) > FD_LIMIT:
            raise ValueError(f"{len(fds)} descriptors in one message; at most {FD_LIMIT} can be passed")
        payload = msgspec.msgpack.encode(message)
        if len(payload) <= INLINE_LIMIT:
            self._send(_INLINE + payload, fds, pid)
            return
        big = _memory_file(payload)
        try:
            self._send(_MEMFD, [big, *fds], pid)
        finally:
            os.close(big)

    def _send(self, data: bytes, fds: Sequence[int], pid: int) -> None:
        ancillary: list[tuple[int, int, bytes]] = []
        if fds:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes()))
        if pid:
            credentials = _CREDENTIALS.pack(pid, os.getuid(), os.getgid())
            ancillary.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials))
        self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)

    def receive(self) -> Packet[M] | None:
        """Receive one message; None at the end. Raises BlockingIOError when there is none yet."""
        data, ancillary, flags, _ = self.sock.recvmsg(INLINE_LIMIT + 64, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds, pid = _unpack(ancillary)
        if not data:
            _close_all(fds)
            return None
        try:
            if flags & socket.MSG_TRUNC:
                raise msgspec.DecodeError("a message lost part of its bytes")
            payload = data[1:] if data[:1] == _INLINE else _take_memory_file(fds)
            return Packet(self._decode(payload), fds, pid)
        except BaseException:
            _close_all(fds)
            raise

    def close(self) -> None:
        """Close the socket; the other side sees the end."""
        self.sock.close()


def keeper_channel(sock: socket.socket) -> Channel[Request]:
    """The keeper's end: requests come in."""
    return Channel(sock, Request)  # type: ignore[arg-type]


def client_channel(sock: socket.socket) -> Channel[Report]:
    """The session's end: reports come in."""
    return Channel(sock, Report)  # type: ignore[arg-type]


def _unpack(ancillary: list[tuple[int, int, bytes]]) -> tuple[list[int], int]:
    fds, pid = array.array("i"), 0
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        elif kind == socket.SCM_CREDENTIALS:
            pid = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
    return list(fds), pid


def _memory_file(payload: bytes) -> int:
    fd = os.memfd_create("message")
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(payload)
    return fd


def _take_memory_file(fds: list[int]) -> bytes:
    if not fds:
        raise msgspec.DecodeError("a message lost its descriptor (limit of open files?)")
    fd = fds.pop(0)
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
