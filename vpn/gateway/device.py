"""What is not TCP on its way from the tunnels to the outside: read from a device of the gateway's namespace, carried by
sockets of the host's, answered into the device.

::

    vpns0, vpns1 … (ocserv) --> route --> the device --> a client's `Ways` --> the outside
    vpns0, vpns1 … (ocserv) <-- route <-- the device <-- answers, and refusals as ICMP messages

- Whose a packet is, is told by its source (``Owners``); the kernel lets no packet in whose source is not the tunnel's.
  One that is faster than the word of its client waits for it, ``EARLY`` packets in all and ``PATIENCE`` seconds each.
- UDP, and echo requests: a way for each target of each port. It is decided on, limited, counted and logged as a
  connection is. A way that is not used for ``IDLE`` is closed; a client has ``FLOWS`` at most, and ``Openings`` says
  how fast it gets new ones. What is refused, by policy or by the target, is refused by ICMP, so that nobody waits.
- Other protocols are refused by ICMP. An ICMP message other than ping, and what is for many (multicast, broadcast), is
  dropped in silence.
- ``cut`` ends what a client has, when its address is another's or it is revoked.

The device's MTU is larger than any packet, and answers may be fragmented: the kernel does it where it sends them into a
tunnel. What clients send in fragments is put together by ``Fragments``. The device outlives this process: the next one
goes on reading it; only ways are lost, and a program's next datagram makes another.
"""

from __future__ import annotations

import asyncio
import collections
import ipaddress
import itertools
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from vpn.gateway.fragments import Fragments
from vpn.gateway.openings import Openings
from vpn.gateway.outside import Outside, OutsideError
from vpn.gateway.strangers import log
from vpn.gateway.ways import BATCH, Protocol, Ways
from vpn.relay import packets
from vpn.relay.packets import Endpoint, Packet

IDLE = 120.0  # seconds (RFC 4787, section 4.3)
FLOWS = 1024
EARLY = 256
PATIENCE = 5.0  # seconds
_READ = 65536
_ECHO = b"\x08\0\0\0\0\0"  # of an echo request: type, code; checksum and identifier are the kernel's
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


class Flow(NamedTuple):
    """One way of a client's; a ping's identifier stands for the port it has not."""

    protocol: Protocol
    source: Endpoint
    target: Endpoint


class Client:
    """What a client has open, and may open."""

    def __init__(self, ways: Ways[Flow]) -> None:
        self.ways = ways
        self.openings: Openings[tuple[Protocol, Endpoint]] = Openings()


class Device:
    """Reads the device ``tun``, a descriptor of the caller's; ``owner`` gives the client of an address, or ""."""

    def __init__(self, tun: int, outside: Outside, owner: Callable[[str], str]) -> None:
        self._tun = tun
        self._outside = outside
        self._owner = owner
        self._clients: dict[str, Client] = {}
        self._fragments = Fragments()
        self._early: collections.deque[tuple[float, Packet]] = collections.deque(maxlen=EARLY)
        self._numbers = itertools.count()

    async def run(self) -> None:
        """Until it is cancelled, or the device is gone with its namespace."""
        os.set_blocking(self._tun, False)
        sweeper = asyncio.create_task(self._sweep())
        try:
            while True:
                await self._readable()
                for _ in range(BATCH):
                    try:
                        raw = os.read(self._tun, _READ)
                    except BlockingIOError:
                        break
                    except OSError:  # EBADFD
                        return
                    await self.receive(raw)
        finally:
            sweeper.cancel()
            for client in list(self._clients):
                self.cut(client)

    async def receive(self, raw: bytes) -> None:
        """Carry, or refuse, what a client has sent; raises nothing."""
        try:
            whole = self._fragments.add(raw)
            packet = packets.parse(whole) if whole is not None else None
            if packet is not None:
                await self._on_packet(packet)
        except Exception as error:  # a fault of ours must not end everybody's datagrams
            log.exception("a packet cannot be carried: %r", error)

    async def arrived(self, address: str) -> None:
        """It has a client now: carry what was too early."""
        waiting, self._early = self._early, collections.deque(maxlen=EARLY)
        oldest = time.monotonic() - PATIENCE
        for at, packet in waiting:
            if packet.source.host == address:
                if at >= oldest:
                    await self.receive(packet.raw)
            else:
                self._early.append((at, packet))

    def cut(self, client: str) -> None:
        """End what a client has open."""
        if (one := self._clients.pop(client, None)) is not None:
            one.ways.close()

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._tun, _resolve, future)
        try:
            await future
        finally:
            loop.remove_reader(self._tun)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(IDLE / 4)
            for one in self._clients.values():
                one.ways.expire(asyncio.get_running_loop().time() - IDLE)

    async def _on_packet(self, packet: Packet) -> None:
        target = ipaddress.ip_address(packet.target.address)
        if target.is_multicast or target.is_unspecified or target == _BROADCAST:
            return
        client = self._owner(packet.source.host)
        if not client:
            self._early.append((time.monotonic(), packet))
        elif packet.data is not None:
            await self._carry(client, Flow("udp", packet.source, packet.target), packet.data)
        elif (echo := packets.take_echo(packet)) is not None:
            source = Endpoint(packet.source.address, echo[0])
            await self._carry(client, Flow("icmp", source, packet.target), _ECHO + echo[1])
        elif packet.protocol != packets.ICMP:
            self._write(packets.unreachable(packet.raw, denied=True))

    async def _carry(self, client: str, flow: Flow, data: bytes) -> None:
        one = self._clients.get(client)
        if one is None:
            ways = Ways(self._outside, client, FLOWS, self._on_answer, self._on_refusal)
            one = self._clients[client] = Client(ways)
        if flow not in one.ways and not await self._open(client, one, flow):
            return
        one.ways.send(flow, data)

    async def _open(self, client: str, one: Client, flow: Flow) -> bool:
        """Whether there is a way now."""
        target, now = (flow.protocol, flow.target), time.monotonic()
        verdict = one.openings.admit(target, now)
        if verdict == "try":
            try:
                await one.ways.open(flow, flow.target.host, flow.target.port, flow.protocol)
            except OutsideError:
                one.openings.refused(target, now)
                verdict = "refuse"
        elif verdict == "lose":
            log.warning("%s sends to more targets than are tried: %d datagrams are lost", client, one.openings.lost)
        if verdict == "refuse":
            self._refuse(flow, denied=flow.protocol == "icmp")
        return verdict == "try"

    def _on_answer(self, flow: Flow, data: bytes) -> None:
        number = next(self._numbers) & 0xFFFF
        if flow.protocol == "udp":
            self._write(packets.build(flow.target, flow.source, data, number))
        elif len(data) >= 8 and data[0] == 0:
            self._write(packets.build_echo(flow.target, flow.source, data[6:], number))

    def _on_refusal(self, flow: Flow) -> None:
        self._refuse(flow, denied=False)

    def _refuse(self, flow: Flow, *, denied: bool) -> None:
        """By a message about a packet like the one that was sent: programs are found by its addresses and ports."""
        if flow.protocol == "udp":
            packet = packets.build(flow.source, flow.target, b"")
        else:
            packet = packets.build_echo(flow.source, flow.target, bytes(2), 0, reply=False)
        self._write(packets.unreachable(packet, denied=denied, host=flow.protocol == "icmp"))

    def _write(self, packet: bytes) -> None:
        """Give a packet to the namespace; one that it does not take is lost, as packets are."""
        with suppress(OSError):
            os.write(self._tun, packet)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
