"""IP packets as a tun device has them: UDP taken out and put in, refusals told by ICMP. Pure: bytes in, bytes out.

``parse`` finds a UDP datagram, or who sent what else; ``build`` makes the packet of an answer; ``unreachable`` the
ICMP message that makes a program's socket report ECONNREFUSED (RFC 792, RFC 4443). ``take_echo`` and ``build_echo`` are
for ping (IPv4). Fragments and extension headers are not put together: the device's MTU is larger than any datagram, so
the kernel makes none.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

UDP, ICMP, ICMP6 = 17, 1, 58
LONGEST = 65507  # bytes of data in a datagram of IPv4
_TTL = 64
_PORT = {4: (3, 3), 6: (1, 4)}  # type and code: port unreachable
_HOST = {4: (3, 1), 6: (1, 3)}  # address unreachable
_ADMIN = {4: (3, 13), 6: (1, 1)}  # administratively prohibited


class Endpoint(NamedTuple):
    """An address, packed, and a port."""

    address: bytes
    port: int

    @property
    def host(self) -> str:
        """The address as text."""
        return str(ipaddress.ip_address(self.address))


class Packet(NamedTuple):
    """What a program sent: ``data`` is UDP's; None for another ``protocol``. ``raw`` is all of it."""

    source: Endpoint
    target: Endpoint
    protocol: int
    data: bytes | None
    raw: bytes


def parse(raw: bytes) -> Packet | None:
    """A packet; None for one that is malformed, or a fragment."""
    layout = _layout(raw)
    if layout is None:
        return None
    start, total, protocol, source, target = layout
    if protocol != UDP:
        return Packet(Endpoint(source, 0), Endpoint(target, 0), protocol, None, raw[:total])
    if total < start + 8:
        return None
    sport, dport, length = struct.unpack_from(">3H", raw, start)
    if not 8 <= length <= total - start:
        return None
    return Packet(Endpoint(source, sport), Endpoint(target, dport), UDP, raw[start + 8 : start + length], raw[:total])


def _layout(raw: bytes) -> tuple[int, int, int, bytes, bytes] | None:
    """Where the payload begins and ends, the protocol, source and target."""
    version = raw[0] >> 4 if raw else 0
    if version == 4 and len(raw) >= 20:
        start, total = (raw[0] & 15) * 4, raw[2] << 8 | raw[3]
        fragment = (raw[6] << 8 | raw[7]) & 0x3FFF
        good = 20 <= start <= total <= len(raw) and not fragment
        return (start, total, raw[9], raw[12:16], raw[16:20]) if good else None
    if version == 6 and len(raw) >= 40:
        total = 40 + (raw[4] << 8 | raw[5])
        return (40, total, raw[6], raw[8:24], raw[24:40]) if total <= len(raw) else None
    return None


def build(source: Endpoint, target: Endpoint, data: bytes, number: int | None = None) -> bytes:
    """A UDP packet; ``data`` at most ``LONGEST`` bytes. With a ``number`` (IPv4, 16 bits, another one for each packet
    that is on its way) routers may make fragments of it.
    """
    length = len(data) + 8
    head = struct.pack(">4H", source.port, target.port, length, 0)
    pseudo = source.address + target.address + struct.pack(">IxxxB", length, UDP)
    check = checksum(pseudo + head + data) or 0xFFFF
    return _ip(source.address, target.address, UDP, head[:6] + struct.pack(">H", check) + data, number)


def take_echo(packet: Packet) -> tuple[int, bytes] | None:
    """The identifier of an IPv4 echo request, and its sequence number with what follows; None for anything else."""
    message = packet.raw[(packet.raw[0] & 15) * 4 :]
    if packet.protocol != ICMP or packet.raw[0] >> 4 != 4 or len(message) < 8 or message[:2] != b"\x08\0":
        return None
    return int.from_bytes(message[4:6]), message[6:]


def build_echo(source: Endpoint, target: Endpoint, rest: bytes, number: int, *, reply: bool = True) -> bytes:
    """An IPv4 packet of ping whose identifier is the port of the program's end; ``rest`` as ``take_echo`` gives it."""
    identifier = (target if reply else source).port
    message = struct.pack(">BBHH", 0 if reply else 8, 0, 0, identifier) + rest
    message = message[:2] + struct.pack(">H", checksum(message)) + message[4:]
    return _ip(source.address, target.address, ICMP, message, number)


def unreachable(packet: bytes, *, denied: bool = False, host: bool = False) -> bytes:
    """The ICMP message that this packet's port (or ``host``) cannot be reached, or may not be, as from its target."""
    six = packet[0] >> 4 == 6
    kind, code = (_ADMIN if denied else _HOST if host else _PORT)[6 if six else 4]
    source, target = (packet[24:40], packet[8:24]) if six else (packet[16:20], packet[12:16])
    quoted = packet[: 1232 if six else 548]  # RFC 4443: the minimum MTU; RFC 1812: 576 bytes
    message = struct.pack(">BBHI", kind, code, 0, 0) + quoted
    protocol = ICMP6 if six else ICMP
    pseudo = source + target + struct.pack(">IxxxB", len(message), protocol) if six else b""
    message = message[:2] + struct.pack(">H", checksum(pseudo + message)) + message[4:]
    return _ip(source, target, protocol, message)


def _ip(source: bytes, target: bytes, protocol: int, body: bytes, number: int | None = None) -> bytes:
    if len(source) == 16:
        return struct.pack(">IHBB", 0x60000000, len(body), protocol, _TTL) + source + target + body
    fields = (0, 0x4000) if number is None else (number, 0)  # "don't fragment"
    head = struct.pack(">BBHHHBBH", 0x45, 0, len(body) + 20, *fields, _TTL, protocol, 0) + source + target
    return head[:10] + struct.pack(">H", checksum(head)) + head[12:] + body


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071): a sum of 16-bit words with end-around carry is one number's rest modulo 65535,
    but that such a sum is 0 only of zeros. So it takes a fifth of the time of adding them.
    """
    number = int.from_bytes(data + b"\0" if len(data) % 2 else data)
    rest = number % 0xFFFF
    return 0xFFFF - rest if rest or not number else 0
