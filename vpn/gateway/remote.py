"""The gateway's control protocol from another host that shares its state directory: through the relay's port.

A home directory is shared by a site's login nodes, a Unix socket in it is not. So the relay lets in, besides pilots,
who knows the key in ``control.key`` (0600, in the state directory: as good as the socket's directory being private),
and passes requests on to the control socket. Inside the relay's TLS, whose key is pinned by the record: login →
``CONTROL`` → one request → its answer's packets, each with its length (4 bytes) before it → end.

``Remote`` is the relay's side, ``connect`` the client's. Failure cases: a key that cannot be written is logged, and
the gateway can be asked on its own host only; an older gateway has no such file, and the client says so.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import socket
import ssl
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from vpn.errors import GatewayError
from vpn.gateway import control, state
from vpn.gateway.state import Record
from vpn.relay import socks5
from vpn.relay.tls import TlsStream, client_context, pin_of_der

log = logging.getLogger("vpn.gateway")

KEY_NAME = "control.key"
USER = ".control"
"""No pilot is called so."""
CONNECT_DEADLINE = 5.0
SERVE_DEADLINE = 60.0
T = TypeVar("T")


class Remote:
    """The relay's side. In the relay's process, which belongs to the gateway's owner."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = _digest(_load_or_make(directory / KEY_NAME))

    def admits(self, username: str, password: bytes) -> bool:
        """Whether this is the owner."""
        return username == USER and hmac.compare_digest(_digest(password), self._key)

    async def serve(self, stream: TlsStream) -> None:
        """Pass one request on, and what is answered back, until the daemon ends the connection."""
        loop = asyncio.get_running_loop()
        request = await stream.receive(take_packet, control.PACKET_LIMIT + 4)
        record = state.read_record(self._directory)
        if record is None:
            raise OSError("the gateway is ending, or beginning")
        with await asyncio.to_thread(control.connect, Path(record.control).parent, CONNECT_DEADLINE) as sock:
            sock.setblocking(False)
            await loop.sock_sendall(sock, request)
            while packet := await loop.sock_recv(sock, control.PACKET_LIMIT):
                await stream.send(give_packet(packet))
        await stream.end()


def open_remote(directory: Path) -> Remote | None:
    """The relay's side; None when there can be no key."""
    try:
        return Remote(directory)
    except OSError as error:
        log.error("%s: %s; this gateway can be asked on this host only", error.filename or directory, error.strerror)
        return None


def _load_or_make(path: Path) -> bytes:
    with suppress(FileNotFoundError):
        if key := path.read_bytes():
            return key
    key = secrets.token_urlsafe(32).encode()
    state.write_private(path, key)
    return key


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Connection:
    """The client's side: packets, as on the control socket. An end of the connection is an empty packet."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def settimeout(self, seconds: float) -> None:
        """How long each step may take."""
        self._sock.settimeout(seconds)

    def sendall(self, packet: bytes) -> None:
        """Send one packet."""
        self._sock.sendall(give_packet(packet))

    def recv(self, _limit: int) -> bytes:
        """The next packet."""
        try:
            return self.receive(take_packet)
        except (EOFError, ssl.SSLEOFError):
            return b""

    def log_in(self, key: bytes) -> None:
        """Say who we are and what we want; raises OSError."""
        login = socks5.give_login(USER, key.decode())
        self._sock.sendall(socks5.give_greeting(socks5.PASSWORD) + login + socks5.give_request(socks5.Command.CONTROL))
        try:
            if self.receive(socks5.take_method) != socks5.PASSWORD or not self.receive(socks5.take_login_answer):
                raise PermissionError("it does not take the key in its state directory")
            if self.receive(socks5.take_reply).answer != socks5.Answer.OK:
                raise OSError("it cannot be asked from another host")
        except (EOFError, ValueError):
            raise OSError("it ended the connection") from None

    def receive(self, take: Callable[[bytes], tuple[T, int] | None]) -> T:
        """The next message as ``take`` finds it; raises EOFError at an end, ValueError, OSError."""
        while (found := take(self._rest)) is None:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError
            self._rest += data
        self._rest = self._rest[found[1] :]
        return found[0]


def connect(directory: Path, record: Record, hosts: Sequence[str], deadline: float) -> Connection:
    """A connection to the gateway of this record, at the first of ``hosts`` that is it; ``deadline`` in seconds.

    Raises:
        GatewayError: it cannot be asked, and why.
    """
    where = f"gateway {record.name!r} on {record.host}"
    try:
        key = (directory / KEY_NAME).read_bytes()
    except FileNotFoundError:
        raise GatewayError(
            f"{where} can be asked on {record.host} only: it is run by root, or of an older version; run this there, "
            "or start another here with --name"
        ) from None
    except OSError as error:
        raise GatewayError(f"{where}: {directory / KEY_NAME} cannot be read: {error.strerror}") from None
    problems = []
    for host in hosts:
        try:
            return _connect(host, record, key, deadline / len(hosts))
        except OSError as error:
            problems.append(f"{host} port {record.relay_port}: {error.strerror or error}")
    raise GatewayError(
        f"{where} does not answer ({'; '.join(problems)}): if it was killed, start it again there, or another here "
        "with --name"
    )


def _connect(host: str, record: Record, key: bytes, deadline: float) -> Connection:
    plain = socket.create_connection((host, record.relay_port), deadline)
    try:
        sock = client_context().wrap_socket(plain)
    except BaseException:
        plain.close()
        raise
    connection = Connection(sock)
    try:
        if not hmac.compare_digest(pin_of_der(sock.getpeercert(binary_form=True) or b""), record.pin):
            raise OSError("what answers there has another key than the gateway's record says")
        connection.log_in(key)
    except BaseException:
        sock.close()
        raise
    return connection


def take_packet(data: bytes) -> tuple[bytes, int] | None:
    """A packet in a stream; raises ValueError for one that is too long."""
    if len(data) < 4:
        return None
    (length,) = struct.unpack_from(">I", data)
    if length > control.PACKET_LIMIT:
        raise ValueError(f"a packet of {length} bytes")
    return (bytes(data[4 : 4 + length]), 4 + length) if len(data) >= 4 + length else None


def give_packet(packet: bytes) -> bytes:
    """A packet in a stream."""
    return struct.pack(">I", len(packet)) + packet
