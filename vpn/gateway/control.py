"""The gateway's control protocol: one request and one answer over a Unix socket of packets. An answer with many pilots
takes several packets, each but the last of them marked to be gone on with.

Only the owner gets in: the directory is 0700 and the kernel's word on the peer's uid (SO_PEERCRED) is checked
besides. The socket's path may be longer than a socket address can hold, so both sides name it through
/proc/self/fd.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

SOCKET_NAME = "control.sock"
PACKET_LIMIT = 256 * 1024
PILOTS = 200  # in one packet: few enough, however long their labels are


class Issue(msgspec.Struct, tag=True, frozen=True):
    """Make a credential for one pilot; ``label`` is for people."""

    label: str


class Revoke(msgspec.Struct, tag=True, frozen=True):
    """End a credential and the connection made with it."""

    username: str


class Status(msgspec.Struct, tag=True, frozen=True):
    """Ask for ``Report``."""


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End the gateway; the connection ends when it has ended."""


class Issued(msgspec.Struct, tag=True, frozen=True):
    """A credential as ``Credential.to_bytes`` gives it."""

    credential: bytes


class Pilot(msgspec.Struct, frozen=True):
    """One credential: ``state`` is issued, connected, disconnected, restored; TCP connections open, and bytes."""

    label: str
    username: str
    state: str
    address: str
    connections: int = 0
    up: int = 0
    down: int = 0


class Report(msgspec.Struct, tag=True, frozen=True):
    """What the gateway is and whom it serves; ``uptime`` in seconds. ``restarts``: how many of its processes ended by
    themselves and were started again, the last because of ``last_end``. ``goes_on``: the next packet has more pilots.
    """

    name: str
    host: str
    addresses: list[str]
    port: int
    pin: str
    dns: list[str]
    uptime: float
    pilots: list[Pilot]
    relay_port: int = 0
    refusal: str = ""
    restarts: int = 0
    last_end: str = ""
    goes_on: bool = False


class Agreed(msgspec.Struct, tag=True, frozen=True):
    """Done."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Not done, and why."""

    message: str


Request = Issue | Revoke | Status | Stop
Answer = Issued | Report | Agreed | Refused

encode = msgspec.msgpack.Encoder().encode
decode_request: Callable[[bytes], Request] = msgspec.msgpack.Decoder(Request).decode
decode_answer: Callable[[bytes], Answer] = msgspec.msgpack.Decoder(Answer).decode


def packets(answer: Answer) -> Iterator[bytes]:
    """An answer as it is sent."""
    if not isinstance(answer, Report):
        yield encode(answer)
        return
    starts = range(0, max(1, len(answer.pilots)), PILOTS)
    for start in starts:
        some = answer.pilots[start : start + PILOTS]
        yield encode(msgspec.structs.replace(answer, pilots=some, goes_on=start != starts[-1]))


def whole(answers: Sequence[Answer]) -> Answer | None:
    """The answer that packets received so far make; None while more are to come."""
    last = answers[-1]
    if not isinstance(last, Report):
        return last
    if last.goes_on:
        return None
    return msgspec.structs.replace(last, pilots=[one for part in answers for one in getattr(part, "pilots", [])])


def listen(directory: Path) -> socket.socket:
    """The daemon's socket, replacing one a killed daemon left."""
    (directory / SOCKET_NAME).unlink(missing_ok=True)
    sock = _socket()
    _with_short_path(directory, sock.bind)
    (directory / SOCKET_NAME).chmod(0o600)
    sock.listen(64)
    sock.setblocking(False)
    return sock


def connect(directory: Path, timeout: float) -> socket.socket:
    """A client's connection; raises OSError when nobody listens."""
    sock = _socket()
    sock.settimeout(timeout)
    try:
        _with_short_path(directory, sock.connect)
    except BaseException:
        sock.close()
        raise
    return sock


def peer_uid(sock: socket.socket) -> int:
    """Who connected (unix(7))."""
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_LIMIT)
    return sock


def _with_short_path(directory: Path, use: Callable[[str], Any]) -> None:
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        use(f"/proc/self/fd/{folder}/{SOCKET_NAME}")
    finally:
        os.close(folder)
