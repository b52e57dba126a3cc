"""One message a datagram between pilot and runner; a large one travels as a file in memory, its descriptor attached.

So do large arguments (`Execute.parcel`) and, the other way, large results (`Leaves`).
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
_decode_left = msgspec.msgpack.Decoder(m.Leaves).decode
_ITEM = array.array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(2 * _ITEM)
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # flags that are enums take longer to join than to receive
NONE: tuple[int, ...] = ()


def pack(message: msgspec.Struct, parcel: int = -1) -> tuple[bytes, tuple[int, ...]]:
    """A message as a datagram, and the descriptors to be attached (the caller's to close), ``parcel``'s the last."""
    body = _encode(message)
    if len(body) <= DATAGRAM_LIMIT:
        return body, NONE if parcel < 0 else (os.dup(parcel),)
    attached = os.memfd_create("hpcq-message", os.MFD_CLOEXEC)
    with open(attached, "wb", closefd=False) as file:
        file.write(body)
    return _encode(m.Attached(len(body))), (attached,) if parcel < 0 else (attached, os.dup(parcel))


def unpack(body: bytes, attached: tuple[int, ...]) -> Any:
    """The inverse of `pack`; closes the descriptors, but for that of a parcel, which is the receiver's from now on."""
    message = _decode(body)
    if type(message) is m.Attached:
        with open(attached[0], "rb") as file:  # noqa: PTH123 - a descriptor
            file.seek(0)  # the offset is shared with whoever wrote it
            message = _decode(file.read())
        attached = attached[1:]
    if type(message) is m.Execute:
        message.parcel = attached[0] if attached else -1
    return message


def send(channel: socket.socket, body: bytes, attached: tuple[int, ...]) -> None:
    """Send what `pack` made; raises BlockingIOError when a non-blocking socket is full."""
    if attached:
        socket.send_fds(channel, [body], attached)
    else:
        channel.send(body)


def receive(channel: socket.socket, flags: int = 0) -> Any:
    """The next message; None when the other side has hung up.

    Raises:
        BlockingIOError: with ``MSG_DONTWAIT``, there is none.
    """
    body, attached = _receive(channel, flags)
    return unpack(body, attached) if body else None


def _receive(channel: socket.socket, flags: int) -> tuple[bytes, tuple[int, ...]]:
    body, ancillary, _, _ = channel.recvmsg(DATAGRAM_LIMIT + 4096, _ANCILLARY, flags | _CLOEXEC)
    if not ancillary:
        return body, NONE
    found = array.array("i")
    for _level, _kind, data in ancillary:
        found.frombytes(data[: len(data) - len(data) % _ITEM])
    return body, tuple(found)


def leave(channel: socket.socket, task: int, descriptor: int, on_disk: bool) -> None:
    """In the runner: pass on the file that a task's large result is in, before the result is told."""
    socket.send_fds(channel, [_encode(m.Leaves(task, on_disk))], [descriptor])


def left(channel: socket.socket, task: int) -> tuple[int, bool] | None:
    """In the pilot: the last file that the runner passed on for this task, and whether it is on disk.

    Others are those of tasks that ended otherwise after they had left one.
    """
    found: tuple[int, bool] | None = None
    while True:
        try:
            body, attached = _receive(channel, socket.MSG_DONTWAIT)
        except OSError:  # nothing more; or the runner has ended
            return found
        if not body:
            return found
        try:
            message = _decode_left(body)
        except msgspec.MsgspecError:
            message = None
        for descriptor in attached[1:] if message is not None and message.task == task else attached:
            os.close(descriptor)
        if message is not None and message.task == task and attached:
            if found is not None:
                os.close(found[0])
            found = attached[0], message.on_disk
