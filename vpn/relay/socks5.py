"""SOCKS5 as bytes: RFC 1928, RFC 1929, and what this relay adds. Pure: no I/O.

Each ``take_…`` looks at the bytes received so far and returns what was said and how many bytes it took, or None
while it is incomplete; it raises ``SocksError`` as soon as the bytes cannot become valid, and no message is longer
than ``LONGEST``. Each ``give_…`` returns bytes to send.

Inside the relay's TLS connections these commands are added, in the range RFC 1928 leaves free:

* ``SESSION`` opens the session of a pilot; its reply carries the token that further connections log in with, as
  the bound name, and in the bound port what the gateway can do (``HAS_…``). The connection then stays: each
  byte the pilot sends is sent back. An orderly end of it is the end of the session;
* ``RESOLVE`` turns the connection into a stream of DNS messages, as DNS over TCP has them (RFC 1035, 4.2.2);
* ``ASSOCIATE`` keeps its meaning, but datagrams travel inside the connection, for UDP beside it would not be
  encrypted: the request header of RFC 1928, section 7, whose reserved field holds the length of the data. A
  "fragment" of ``UNREACHABLE`` carries none: the host it names cannot be reached;
* ``CONNECT_PLAIN`` is ``CONNECT``, after which neither side encrypts: the client ends its direction of TLS behind the
  request, the gateway its own behind the reply that says OK, and what follows is the program's bytes. Who may connect
  is thus never said in clear. ``HAS_PLAIN`` says that a gateway knows it;
* ``CONTROL`` is for the gateway's owner: a request of the control protocol follows (``vpn.gateway.remote``).
"""

from __future__ import annotations

import ipaddress
import struct
from enum import IntEnum
from typing import NamedTuple

VERSION, LOGIN_VERSION = 5, 1
NO_LOGIN, PASSWORD, NOTHING = 0x00, 0x02, 0xFF
LONGEST = 520  # bytes: a login with the longest name and password
HAS_IPV6, HAS_PLAIN = 1, 2
DATAGRAM_LIMIT = 65535
UNREACHABLE = 0xFF


class SocksError(ValueError):
    """Bytes that are not SOCKS5."""


class Command(IntEnum):
    """What a client asks for."""

    CONNECT = 1
    BIND = 2
    ASSOCIATE = 3
    SESSION = 0x80
    RESOLVE = 0x81
    CONNECT_PLAIN = 0x82
    CONTROL = 0x83


class Answer(IntEnum):
    """RFC 1928, section 6."""

    OK = 0
    FAILED = 1
    DENIED = 2
    NETWORK_UNREACHABLE = 3
    HOST_UNREACHABLE = 4
    REFUSED = 5
    TIMEOUT = 6  # "TTL expired"
    COMMAND_UNKNOWN = 7
    ADDRESS_UNKNOWN = 8


class Login(NamedTuple):
    """RFC 1929."""

    username: bytes
    password: bytes


class Target(NamedTuple):
    """A host (a name, or an address as text) and a port."""

    host: str
    port: int


class Request(NamedTuple):
    """A client's request; ``command`` may be none we know."""

    command: int
    target: Target


class Reply(NamedTuple):
    """A server's reply; ``answer`` may be none we know."""

    answer: int
    bound: Target


class Datagram(NamedTuple):
    """UDP data to or from a host; ``unreachable``: not from it, but the news that it cannot be reached."""

    target: Target
    data: bytes
    unreachable: bool = False


NOWHERE = Target("0.0.0.0", 0)  # noqa: S104  (a value on the wire)


def take_greeting(data: bytes) -> tuple[tuple[int, ...], int] | None:
    """A client's methods."""
    _check(data, 0, VERSION, "the version")
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    return tuple(data[2 : 2 + data[1]]), 2 + data[1]


def give_greeting(*methods: int) -> bytes:
    """A client's methods."""
    return bytes([VERSION, len(methods), *methods])


def take_method(data: bytes) -> tuple[int, int] | None:
    """A server's choice."""
    _check(data, 0, VERSION, "the version")
    return (data[1], 2) if len(data) >= 2 else None


def give_method(method: int) -> bytes:
    """A server's choice."""
    return bytes([VERSION, method])


def take_login(data: bytes) -> tuple[Login, int] | None:
    """Name and password."""
    _check(data, 0, LOGIN_VERSION, "the login's version")
    if len(data) < 2 or len(data) < 3 + data[1]:
        return None
    middle = 2 + data[1]
    end = middle + 1 + data[middle]
    if len(data) < end:
        return None
    return Login(data[2:middle], data[middle + 1 : end]), end


def give_login(username: str, password: str) -> bytes:
    """Name and password; at most 255 bytes each, or SocksError."""
    parts = username.encode(), password.encode()
    if max(map(len, parts)) > 255:
        raise SocksError("a name or password of more than 255 bytes")
    return bytes([LOGIN_VERSION]) + b"".join(bytes([len(part)]) + part for part in parts)


def take_login_answer(data: bytes) -> tuple[bool, int] | None:
    """Whether the login was accepted."""
    return (data[1] == 0, 2) if len(data) >= 2 else None


def give_login_answer(*, accepted: bool) -> bytes:
    """Whether the login was accepted."""
    return bytes([LOGIN_VERSION, 0 if accepted else 1])


def take_request(data: bytes) -> tuple[Request, int] | None:
    """What a client asks for."""
    _check(data, 0, VERSION, "the version")
    found = _take_target(data, 3)
    return (Request(data[1], found[0]), found[1]) if found else None


def give_request(command: int, target: Target = NOWHERE) -> bytes:
    """What a client asks for."""
    return bytes([VERSION, command, 0]) + give_target(target)


def take_reply(data: bytes) -> tuple[Reply, int] | None:
    """What a server answers."""
    _check(data, 0, VERSION, "the version")
    found = _take_target(data, 3)
    return (Reply(data[1], found[0]), found[1]) if found else None


def give_reply(answer: int, bound: Target = NOWHERE) -> bytes:
    """What a server answers."""
    return bytes([VERSION, answer, 0]) + give_target(bound)


def take_datagram(data: bytes) -> tuple[Datagram, int] | None:
    """A datagram of an association inside a connection."""
    if len(data) > 2 and data[2] not in (0, UNREACHABLE):
        raise SocksError(f"fragment {data[2]} of a datagram")
    found = _take_target(data, 3)
    if found is None:
        return None
    target, start = found
    end = start + (data[0] << 8 | data[1])
    return (Datagram(target, data[start:end], data[2] == UNREACHABLE), end) if len(data) >= end else None


def give_datagram(datagram: Datagram) -> bytes:
    """A datagram of an association inside a connection; at most 65,535 bytes of data, or SocksError."""
    if len(datagram.data) > DATAGRAM_LIMIT:
        raise SocksError(f"a datagram of {len(datagram.data)} bytes")
    kind = UNREACHABLE if datagram.unreachable else 0
    return struct.pack(">HB", len(datagram.data), kind) + give_target(datagram.target) + datagram.data


def take_message(data: bytes) -> tuple[bytes, int] | None:
    """A DNS message in a stream."""
    if len(data) < 2 or len(data) < 2 + (data[0] << 8 | data[1]):
        return None
    end = 2 + (data[0] << 8 | data[1])
    return data[2:end], end


def give_message(message: bytes) -> bytes:
    """A DNS message in a stream."""
    return struct.pack(">H", len(message)) + message


def _take_target(data: bytes, start: int) -> tuple[Target, int] | None:
    """The address from the byte of its type on; names must be ASCII and not empty."""
    if len(data) < start + 2:
        return None
    kind, first = data[start], start + 1
    if kind == 3:
        first += 1
    length = {1: 4, 4: 16, 3: data[start + 1]}.get(kind)
    if length is None:
        raise SocksError(f"an address of type {kind}")
    end = first + length
    if kind == 3 and length == 0:
        raise SocksError("an empty name")
    if len(data) < end + 2:
        return None
    host, port = data[first:end], data[end] << 8 | data[end + 1]
    if kind != 3:
        return Target(str(ipaddress.ip_address(bytes(host))), port), end + 2
    try:
        name = bytes(host).decode("ascii")
    except UnicodeDecodeError:
        raise SocksError("a name that is not ASCII") from None
    if not name.isprintable() or " " in name:
        raise SocksError("a name with characters no name has")
    return Target(name, port), end + 2


def give_target(target: Target) -> bytes:
    """Type, address and port; a name of more than 255 bytes, or one that is not ASCII, is a SocksError."""
    port = struct.pack(">H", target.port)
    try:
        address = ipaddress.ip_address(target.host)
    except ValueError:
        pass
    else:
        return bytes([1 if address.version == 4 else 4]) + address.packed + port
    name = target.host.encode("ascii", "replace")
    if not 0 < len(name) <= 255 or not target.host.isascii():
        raise SocksError(f"{target.host!r} cannot be asked for")
    return bytes([3, len(name)]) + name + port


def _check(data: bytes, index: int, value: int, what: str) -> None:
    if len(data) > index and data[index] != value:
        raise SocksError(f"{what} is {data[index]}, not {value}")
