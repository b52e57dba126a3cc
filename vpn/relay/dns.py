"""What a forwarder needs to know of DNS messages (RFC 1035). Pure; never more than the message says.

Names are ASCII as they are on the wire; a message that is malformed has no answer here, and is forwarded all the
same: it is the program's business.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SHORTEST = 12  # bytes: a header
_TRUNCATED = 0x0200
A, _CNAME, AAAA = 1, 5, 28
_RECORDS = 512  # looked at in one message
_SERVFAIL = 2


class Resolved(NamedTuple):
    """The addresses an answer gives for the name that was asked for, and for how many seconds."""

    name: str
    addresses: list[Address]
    ttl: int


def question(name: str, kind: int) -> bytes:
    """A query for a name (ASCII, its parts of at most 63 bytes): recursion desired."""
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    return struct.pack(">6H", 0, 0x0100, 1, 0, 0, 0) + labels + struct.pack(">BHH", 0, kind, 1)


def has_failed(message: bytes) -> bool:
    """Whether an answer says neither yes nor no (RFC 1035, 4.1.1: NOERROR and NXDOMAIN do)."""
    return len(message) < SHORTEST or message[3] & 0xF not in (0, 3)


def with_id(message: bytes, number: int) -> bytes:
    """The message with another id."""
    return struct.pack(">H", number) + message[2:]


def id_of(message: bytes) -> int:
    """A message's id."""
    return message[0] << 8 | message[1]


def is_truncated(message: bytes) -> bool:
    """Whether the answer was too long for UDP."""
    return bool((message[2] << 8 | message[3]) & _TRUNCATED)


def truncated(message: bytes, limit: int) -> bytes:
    """An answer that fits: the message, or its header and question with the flag that says to ask over TCP."""
    if len(message) <= limit:
        return message
    end = _question_end(message)
    flags = (message[2] << 8 | message[3]) | _TRUNCATED
    return message[:2] + struct.pack(">5H", flags, 1 if end > SHORTEST else 0, 0, 0, 0) + message[SHORTEST:end]


def failure(query: bytes) -> bytes:
    """The answer to a query that could not be asked: SERVFAIL."""
    end = _question_end(query)
    flags = 0x8080 | (query[2] << 8 & 0x0100) | _SERVFAIL  # an answer; recursion desired, available
    return query[:2] + struct.pack(">5H", flags, 1 if end > SHORTEST else 0, 0, 0, 0) + query[SHORTEST:end]


def answers(query: bytes, message: bytes) -> bool:
    """Whether ``message`` can be the answer to ``query``: same id, same question, an answer at all."""
    if len(message) < SHORTEST or not message[2] & 0x80 or message[:2] != query[:2]:
        return False
    asked, said = query[SHORTEST : _question_end(query)], message[SHORTEST : _question_end(message)]
    return asked.lower() == said.lower() or not said


def udp_limit(query: bytes) -> int:
    """How long an answer by UDP may be: what an OPT record at the end says (RFC 6891, 6.1.2), else 512 bytes."""
    if len(query) < SHORTEST or not struct.unpack_from(">H", query, 10)[0]:
        return 512
    offset = _question_end(query)
    if len(query) >= offset + 11 and query[offset] == 0 and query[offset + 1 : offset + 3] == b"\x00\x29":
        return max(512, int(struct.unpack_from(">H", query, offset + 3)[0]))
    return 512


def resolved(message: bytes) -> Resolved | None:
    """The addresses in an answer, through its aliases; None when there are none or it is malformed."""
    try:
        return _resolved(message)
    except (IndexError, struct.error, ValueError):
        return None


def _resolved(message: bytes) -> Resolved | None:
    questions, count = struct.unpack_from(">HH", message, 4)
    if questions != 1 or not message[2] & 0x80:
        return None
    asked, offset = _name(message, SHORTEST)
    offset += 4
    known, addresses, ttl = {asked}, list[Address](), 1 << 31
    for _ in range(min(count, _RECORDS)):
        owner, offset = _name(message, offset)
        kind, _, seconds, length = struct.unpack_from(">HHIH", message, offset)
        offset += 10
        data = message[offset : offset + length]
        if owner in known:
            if kind == _CNAME:
                known.add(_name(message, offset)[0])
            elif kind in (A, AAAA):
                addresses.append(ipaddress.ip_address(bytes(data)))
                ttl = min(ttl, seconds)
        offset += length
    return Resolved(asked, addresses, ttl) if addresses else None


def _name(message: bytes, offset: int) -> tuple[str, int]:
    """A name, and where it ends; pointers may only go back (RFC 1035, 4.1.4)."""
    labels, end, lowest = [], 0, offset
    while length := message[offset]:
        if length & 0xC0 == 0xC0:
            end = end or offset + 2
            offset = (length & 0x3F) << 8 | message[offset + 1]
            if offset >= lowest:
                raise ValueError("a pointer that does not go back")
            lowest = offset
            continue
        if length & 0xC0:
            raise ValueError("a label of an unknown kind")
        labels.append(message[offset + 1 : offset + 1 + length].decode("latin-1"))
        offset += 1 + length
    return ".".join(labels).lower(), end or offset + 1


def _question_end(message: bytes) -> int:
    """Where the question ends; the header's end when there is not exactly one."""
    if len(message) < SHORTEST or message[4:6] != b"\x00\x01":
        return SHORTEST
    try:
        end = _name(message, SHORTEST)[1] + 4
    except (IndexError, ValueError):
        return SHORTEST
    return end if end <= len(message) else SHORTEST
