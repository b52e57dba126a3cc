"""One message a datagram between pilot and runner; a large one travels as a file in memory, its descriptor attached.

(``socket.recv_fds`` ignores its flags in Python 3.11 and 3.12, hence our own.)
"""

from __future__ import annotations

import array
import os
import socket
from typing import Any

import msgspec

from hpcq import messages as m

DATAGRAM_LIMIT = 96 * 1024
"""Bytes of a message sent as such; well below the default send buffer of a Unix socket."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(m.ToRunner).decode
_ANCILLARY = socket.CMSG_SPACE(array.array("i").itemsize)


def pack(message: msgspec.Struct) -> tuple[bytes, int | None]:
    """A message as a datagram, and the descriptor to be attached (the caller's to close)."""
    body = _encode(message)
    if len(body) <= DATAGRAM_LIMIT:
        return body, None
    attached = os.memfd_create("hpcq-message", os.MFD_CLOEXEC)
    with open(attached, "wb", closefd=False) as file:
        file.write(body)
    return _encode(m.Attached(len(body))), attached


def unpack(body: bytes, attached: int | None) -> Any:
    """The inverse of `pack`; closes the descriptor."""
    if attached is None:
        return _decode(body)
    with open(attached, "rb") as file:  # noqa: PTH123 - a descriptor
        file.seek(0)  # the offset is shared with whoever wrote it
        return _decode(file.read())


def send(channel: socket.socket, body: bytes, attached: int | None) -> None:
    """Send what `pack` made; raises BlockingIOError when a non-blocking socket is full."""
    if attached is None:
        channel.send(body)
    else:
        socket.send_fds(channel, [body], [attached])


def receive(channel: socket.socket, flags: int = 0) -> Any:
    """The next message; None when the other side has hung up.

    Raises:
        BlockingIOError: with ``MSG_DONTWAIT``, there is none.
    """
    body, ancillary, _, _ = channel.recvmsg(DATAGRAM_LIMIT + 4096, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
    if not body:
        return None
    attached = None
    for _level, _kind, data in ancillary:
        attached = array.array("i", data[: array.array("i").itemsize])[0]
    return unpack(body, attached)
