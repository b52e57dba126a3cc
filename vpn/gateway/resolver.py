"""The gateway's name servers, asked for pilots: DNS messages forwarded as they are, and their answers remembered.

A query goes by UDP from a socket of its own (a new port for each, so that an answer cannot be guessed), and by TCP
when the answer says it was cut off. Servers are tried in their order. Addresses of names that the allow-list names
are remembered: that is how a rule ``*.cern.ch`` knows them when a program connects.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vpn.gateway.policy import Names, Policy
from vpn.relay import dns, socks5

ANSWER_DEADLINE = 3.0  # seconds for one server
PORT = 53


class Resolver:
    """Asks ``servers``, or those of this host's resolv.conf, read anew when it changed."""

    def __init__(self, policy: Policy, names: Names, servers: Sequence[str] = ()) -> None:
        self._policy = policy
        self._names = names
        self._servers = tuple(servers)
        self._conf: tuple[float, tuple[str, ...]] = (0.0, ("127.0.0.1",))

    async def ask(self, query: bytes) -> bytes:
        """The answer to a query; SERVFAIL when no server gave one. A message that is none is answered by b""."""
        if len(query) < dns.SHORTEST:
            return b""
        ours = dns.with_id(query, random.getrandbits(16))
        for server in self.servers():
            with suppress(OSError, TimeoutError, ValueError):
                async with asyncio.timeout(ANSWER_DEADLINE):
                    answer = await _by_udp(server, ours)
                    if dns.is_truncated(answer):
                        answer = await _by_tcp(server, ours)
                self._learn(answer)
                return dns.with_id(answer, dns.id_of(query))
        return dns.failure(query)

    def servers(self) -> tuple[str, ...]:
        """Whom to ask."""
        if self._servers:
            return self._servers
        path = Path("/etc/resolv.conf")
        with suppress(OSError):
            changed = path.stat().st_mtime
            if changed != self._conf[0]:
                self._conf = changed, name_servers(path.read_text(errors="replace")) or ("127.0.0.1",)
        return self._conf[1]

    def _learn(self, answer: bytes) -> None:
        found = dns.resolved(answer)
        if found is not None and self._policy.cares(found.name):
            self._names.learn(found.name, found.addresses, found.ttl, time.monotonic())


def name_servers(text: str) -> tuple[str, ...]:
    """The name servers of a resolv.conf (resolv.conf(5)); lines that are none are left out."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with suppress(ValueError):
                ipaddress.ip_address(words[1])
                found.append(words[1])
    return tuple(found)


def _family(server: str) -> int:
    return socket.AF_INET6 if ":" in server else socket.AF_INET


async def _by_udp(server: str, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect((server, PORT))
        await loop.sock_sendall(sock, query)
        while True:
            answer = await loop.sock_recv(sock, 65535)
            if dns.answers(query, answer):
                return answer


async def _by_tcp(server: str, query: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(_family(server), socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        await loop.sock_connect(sock, (server, PORT))
        await loop.sock_sendall(sock, socks5.give_message(query))
        data = b""
        while (found := socks5.take_message(data)) is None:
            more = await loop.sock_recv(sock, 65535)
            if not more:
                raise ConnectionError("the name server ended the connection")
            data += more
        if not dns.answers(query, found[0]):
            raise ValueError("an answer to another question")
        return found[0]
