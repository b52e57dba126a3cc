"""The gateway's data plane: a process that carries what pilots send from the tunnels to the outside.

TCP that arrives from a tunnel is redirected, in the gateway's namespace, to a listener whose descriptor is here,
while this process stands in the host's network. So a pilot's connection ends in the namespace, where segments are
as large as the tunnel's packets and the round trip is the cluster's, and goes on as an ordinary connection of the
host's: ``Outside`` decides, connects, counts, limits, logs and moves the bytes (splice(2)).

A connection belongs to the client whose tunnel address it comes from. The daemon says who that is (``Arrived``); a
connection that is faster than that word waits for it, ``OWNER_DEADLINE`` seconds at most. ``Left`` cuts what a
client still has open.

What is not TCP is routed to a device of the namespace, which is read here (``device``).

The name service is redirected here too (UDP and TCP, port 53 of the servers pilots are told of), and answered by the
host's name servers (``resolver``): so the rules that name hosts know the addresses that pilots come with.

The process ends when the daemon's end of the control socket does; its connections are then
reset by the kernel.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import sys
from collections import defaultdict
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from vpn.gateway.accesslog import AccessLog
from vpn.gateway.device import Device
from vpn.gateway.ledger import PLANE, Ledger
from vpn.gateway.lesser import become
from vpn.gateway.outside import Outside, OutsideError, OutsideLimits, own_addresses
from vpn.gateway.plane_messages import (
    CONTROL_FD,
    DEVICE_FD,
    DNS_TCP_FD,
    DNS_UDP_FD,
    LEDGER_FD,
    LISTENER_FD,
    Arrived,
    Ask,
    Figure,
    Figures,
    Left,
    Order,
    Settings,
    decode_order,
    encode,
)
from vpn.gateway.policy import Policy
from vpn.gateway.resolver import Resolver
from vpn.relay.dnsserver import DnsServer
from vpn.relay.loop import run_loop
from vpn.relay.pump import ready, reset_on_close
from vpn.spawn import leave_terminal_alone, raise_file_limit

log = logging.getLogger("vpn.gateway.plane")

OWNER_DEADLINE = 5.0
NAMES_EVERY = 300.0  # seconds between two look-ups of the hosts that the allow-list names
NAMES_AGAIN = 15.0  # … after one that failed
ACCEPT_PAUSE = 0.1  # seconds without accepting when there is no descriptor or memory left: others end meanwhile
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h


class Owners:
    """Which client has which tunnel address; pure."""

    def __init__(self) -> None:
        self._clients: dict[str, str] = {}
        self._waiting: dict[str, set[asyncio.Future[str]]] = defaultdict(set)

    def arrived(self, address: str, client: str) -> str:
        """The address is this client's; the client it was another's before, or ""."""
        before = self._clients.get(address, "")
        self._clients[address] = client
        for future in self._waiting.pop(address, ()):
            if not future.done():
                future.set_result(client)
        return before if before != client else ""

    def left(self, client: str) -> None:
        """It has no address any more."""
        self._clients = {address: owner for address, owner in self._clients.items() if owner != client}

    def known(self, address: str) -> str:
        """The client of an address, or ""."""
        return self._clients.get(address, "")

    async def of(self, address: str, deadline: float = OWNER_DEADLINE) -> str:
        """The client of an address, waited for; raises TimeoutError."""
        if address in self._clients:
            return self._clients[address]
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting[address].add(future)
        try:
            return await asyncio.wait_for(future, deadline)
        finally:
            self._waiting[address].discard(future)
            if not self._waiting[address]:
                del self._waiting[address]


class Plane:
    """Accepts, carries, answers the daemon."""

    def __init__(self, outside: Outside, listener: socket.socket, device: int, resolver: Resolver) -> None:
        self.outside = outside
        self._dns = DnsServer(resolver.ask)
        self.owners = Owners()
        self._device = Device(device, outside, self.owners.known)
        self._listener = listener
        self._names_known = asyncio.Event()
        self._carrying: dict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, control: socket.socket, dns_udp: socket.socket, dns_tcp: socket.socket) -> None:
        """Until the daemon is gone."""
        reader, writer = await asyncio.open_connection(sock=control)
        self._dns.serve_udp(dns_udp)
        always = (self._accept(), self._carry_others(), self._learn_names(), self._dns.serve_tcp(dns_tcp))
        serving = [asyncio.create_task(each) for each in always]
        try:
            while line := await reader.readline():
                self.obey(decode_order(line), writer)
        except ConnectionError:
            pass
        finally:
            for task in serving:
                task.cancel()
            writer.close()

    def obey(self, order: Order, writer: asyncio.StreamWriter) -> None:
        """Do as the daemon says."""
        match order:
            case Arrived(address, client):
                self.cut(self.owners.arrived(address, client))
                self._start(self._device.arrived(address))
            case Left(client):
                self.owners.left(client)
                self.cut(client)
                self.outside.forget(client)
            case Ask(number):
                writer.write(encode(self.figures(number)))

    def cut(self, client: str) -> None:
        """End what a client has open."""
        for task in self._carrying.pop(client, ()):
            task.cancel()
        self._device.cut(client)

    def figures(self, number: int) -> Figures:
        """What every client has moved."""
        usage = self.outside.usage
        return Figures(
            number, {client: Figure(*one.total(), len(one.open), one.connections) for client, one in usage.items()}
        )

    async def _learn_names(self) -> None:
        """Pilots come with addresses: whose they are must be known before, for the hosts that rules name."""
        hosts = [rule.name for rule in self.outside.policy.rules if rule.name and not rule.name.startswith(".")]
        while True:
            found = await asyncio.gather(*map(self.outside.resolve, hosts), return_exceptions=True)
            for problem in found:
                if isinstance(problem, BaseException):
                    log.warning("a host of the allow-list is not known: %s", problem)
            self._names_known.set()
            await asyncio.sleep(NAMES_AGAIN if any(isinstance(one, BaseException) for one in found) else NAMES_EVERY)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(self._listener)
            except OSError as error:
                log.warning("no connection can be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            self._start(self._serve(sock, str(peer[0])))

    async def _carry_others(self) -> None:
        await self._names_known.wait()
        await self._device.run()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket, address: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        client = ""
        with sock:
            try:
                host, port = original_destination(sock)
                client = await self.owners.of(address)
                await self._names_known.wait()
                self._carrying[client].add(task)
                await self.outside.carry(client, ready(sock), host, port)
            except OutsideError as refusal:
                log.debug("%s: %s", client, refusal.message)
            except (OSError, TimeoutError) as error:
                log.info("a connection from %s was dropped: %s", address, error or "nobody has that address")
                reset_on_close(sock)
            except asyncio.CancelledError:
                reset_on_close(sock)
            finally:
                self._carrying.get(client, set()).discard(task)


def original_destination(sock: socket.socket) -> tuple[str, int]:
    """Where a redirected IPv4 connection was going (SO_ORIGINAL_DST); raises OSError when it was not redirected."""
    data = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    port, address = struct.unpack_from("!2xH4s", data)
    return socket.inet_ntoa(address), port


def main(argv: list[str]) -> None:
    """SETTINGS, with the control socket and the listener at their descriptors."""
    leave_terminal_alone()
    raise_file_limit()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    settings = msgspec.json.decode(argv[0].encode(), type=Settings)
    policy = Policy(settings.rules, own_addresses())
    log_file = become(settings.user, Path(settings.log))
    access = AccessLog(log_file) if settings.log else None
    limits = OutsideLimits(rate=settings.rate, rate_per_client=settings.rate_per_client)
    ledger = Ledger(LEDGER_FD, PLANE) if settings.rate else None
    outside = Outside(policy, access, limits, ledger)
    resolver = Resolver(policy, outside.names, settings.dns)
    numbers = (LISTENER_FD, CONTROL_FD, DNS_UDP_FD, DNS_TCP_FD)
    listener, *others = (socket.socket(fileno=number) for number in numbers)
    for sock in (listener, *others):
        sock.setblocking(False)
    with suppress(KeyboardInterrupt):
        run_loop(Plane(outside, listener, DEVICE_FD, resolver).run(*others))
    if access is not None:
        access.close()
