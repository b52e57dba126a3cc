"""UDP of programs in a namespace: read from its tun device, carried by the gateway, answered into the device.

Everything that is not TCP arrives at the device. A program's port gets an association at the gateway with its first
datagram, and loses it after ``IDLE`` seconds of silence, or when it is the least recently used of too many. What
is in ``direct`` leaves from this host itself. Other protocols are refused by ICMP, so that nobody waits for them.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from vpn.relay import packets
from vpn.relay.link import Link
from vpn.relay.packets import Endpoint, Packet
from vpn.relay.socks5 import Datagram, Target, give_datagram, take_datagram
from vpn.relay.tls import TlsStream

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IDLE = 120.0
PORTS = 512
QUEUE = 256  # datagrams of a port that may wait for the gateway; more are dropped
_READ = 65535 + 40


class Port:
    """One program's port: its datagrams out, and what comes back."""

    def __init__(self, inner: Endpoint, owner: Datagrams) -> None:
        self.inner = inner
        self.owner = owner
        self.used = asyncio.get_running_loop().time()
        self._out: collections.deque[Packet] = collections.deque(maxlen=QUEUE)
        self._wake = asyncio.Event()
        self._sent: dict[Target, bytes] = {}
        self._direct: dict[Endpoint, socket.socket] = {}
        self.task = asyncio.create_task(self._run())

    def send(self, packet: Packet) -> None:
        """Take a datagram of the program's."""
        self.used = asyncio.get_running_loop().time()
        if self.owner.is_direct(packet.target.address):
            self._send_direct(packet)
            return
        self._out.append(packet)
        self._wake.set()

    async def _run(self) -> None:
        stream: TlsStream | None = None
        reading: asyncio.Task[None] | None = None
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                if self._out and stream is None:
                    stream = await self.owner.link.associate()
                    reading = asyncio.create_task(self._read(stream))
                while self._out and stream is not None:
                    await stream.send(self._frame(self._out.popleft()))
        except (OSError, TimeoutError, ValueError):
            pass  # the gateway is away: what a network loses, programs send again
        finally:
            if reading is not None:
                reading.cancel()
            if stream is not None:
                stream.close()
            for sock in self._direct.values():
                asyncio.get_running_loop().remove_reader(sock)
                sock.close()
            self.owner.drop(self)

    def _frame(self, packet: Packet) -> bytes:
        target = Target(packet.target.host, packet.target.port)
        if len(self._sent) > 1024:
            self._sent.clear()
        self._sent[target] = packet.raw[:128]
        return give_datagram(Datagram(target, packet.data or b""))

    async def _read(self, stream: TlsStream) -> None:
        with suppress(OSError, ValueError):
            while True:
                self._on_answer(await stream.receive(take_datagram, 66000))
        self.task.cancel()

    def _on_answer(self, datagram: Datagram) -> None:
        self.used = asyncio.get_running_loop().time()
        if datagram.unreachable:
            if raw := self._sent.get(datagram.target):
                self.owner.write(packets.unreachable(raw))
            return
        source = Endpoint(ipaddress.ip_address(datagram.target.host).packed, datagram.target.port)
        self.owner.write(packets.build(source, self.inner, datagram.data))

    def _send_direct(self, packet: Packet) -> None:
        try:
            sock = self._direct.get(packet.target) or self._open_direct(packet.target)
            sock.send(packet.data or b"")
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH):
                self.owner.write(packets.unreachable(packet.raw))

    def _open_direct(self, target: Endpoint) -> socket.socket:
        family = socket.AF_INET if len(target.address) == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect((target.host, target.port))
        except OSError:
            sock.close()
            raise
        self._direct[target] = sock
        asyncio.get_running_loop().add_reader(sock, self._on_direct, sock, target)
        return sock

    def _on_direct(self, sock: socket.socket, target: Endpoint) -> None:
        with suppress(OSError):  # a refusal is told with the next datagram, as the kernel does
            for _ in range(64):
                data = sock.recv(65535)
                self.used = asyncio.get_running_loop().time()
                self.owner.write(packets.build(target, self.inner, data))


class Datagrams:
    """Every port of a namespace."""

    def __init__(self, tun: int, link: Link, direct: Sequence[Network], on_lost: Callable[[], None]) -> None:
        self.link = link
        self._tun = tun
        self._direct = tuple(direct)
        self._on_lost = on_lost
        self._ports: collections.OrderedDict[Endpoint, Port] = collections.OrderedDict()
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Begin to read the device."""
        os.set_blocking(self._tun, False)
        self._loop.add_reader(self._tun, self._on_readable)
        self._loop.call_later(IDLE, self._sweep)

    def is_direct(self, address: bytes) -> bool:
        """Whether an address is reached from this host itself."""
        return is_within(ipaddress.ip_address(address), self._direct)

    def write(self, packet: bytes) -> None:
        """Give a packet to the namespace; one that it does not take is lost, as packets are."""
        with suppress(OSError):
            os.write(self._tun, packet)

    def drop(self, port: Port) -> None:
        """Forget a port that ended."""
        if self._ports.get(port.inner) is port:
            del self._ports[port.inner]

    def _on_readable(self) -> None:
        for _ in range(64):
            try:
                raw = os.read(self._tun, _READ)
            except BlockingIOError:
                return
            except OSError:  # EBADFD: the namespace is gone, and its device with it
                self._loop.remove_reader(self._tun)
                self._on_lost()
                return
            packet = packets.parse(raw)
            if packet is not None:
                self._on_packet(packet)

    def _on_packet(self, packet: Packet) -> None:
        target = ipaddress.ip_address(packet.target.address)
        if target.is_multicast or target.is_unspecified or target == _BROADCAST:
            return
        if packet.data is None:
            if packet.protocol not in _SILENT or is_ping(packet):
                self.write(packets.unreachable(packet.raw, denied=True))
            return
        port = self._ports.get(packet.source)
        if port is None:
            if len(self._ports) >= PORTS:
                self._ports.popitem(last=False)[1].task.cancel()
            port = self._ports[packet.source] = Port(packet.source, self)
        self._ports.move_to_end(packet.source)
        port.send(packet)

    def _sweep(self) -> None:
        now = self._loop.time()
        for port in list(self._ports.values()):
            if now - port.used > IDLE:
                port.task.cancel()
        self._loop.call_later(IDLE / 4, self._sweep)


_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_SILENT = {packets.ICMP, packets.ICMP6}  # an ICMP message is not answered by one, but for a ping


def is_ping(packet: Packet) -> bool:
    """Whether it is an echo request."""
    six = packet.protocol == packets.ICMP6
    start = 40 if six else (packet.raw[0] & 15) * 4
    return len(packet.raw) > start and packet.raw[start] == (128 if six else 8)


def is_within(address: ipaddress.IPv4Address | ipaddress.IPv6Address, networks: Sequence[Network]) -> bool:
    """Whether one of the networks has the address; an IPv4 one also as IPv6 writes it."""
    plain = getattr(address, "ipv4_mapped", None) or address
    return any(plain in network for network in networks)
