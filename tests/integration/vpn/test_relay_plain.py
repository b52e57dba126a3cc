"""Connections without TLS: logins stay secret, and not a byte is lost where the encryption ends."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import socket

import pytest
from test_relay_service import FAR, HOST, Gateway, run

from vpn.config import Credential, Secret
from vpn.relay import socks5
from vpn.relay.link import Link
from vpn.relay.socks5 import Command, Target

BANNER = os.urandom(1 << 20)


class Wire:
    """A wire that keeps what passes, between pilots and a gateway."""

    def __init__(self, gateway):
        self.gateway = gateway
        self.passed = bytearray()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._pass, HOST, 0)
        port = self.server.sockets[0].getsockname()[1]
        self.gateway.service.tickets.add("secretive-pilot", "secret-password")
        credential = Credential((HOST,), 0, self.gateway.pin, "secretive-pilot", Secret("secret-password"), port)
        self.link = Link(credential, tls=False)
        await self.link.open()
        return self

    async def __aexit__(self, *_):
        await self.link.close()
        self.server.close()

    async def _pass(self, reader, writer):
        there, back = await asyncio.open_connection(HOST, self.gateway.port)
        await asyncio.gather(self._copy(reader, back), self._copy(there, writer))

    async def _copy(self, reader, writer):
        while data := await reader.read(65536):
            self.passed += data
            writer.write(data)
            await writer.drain()
        writer.close()


def test_the_programs_bytes_are_plain_and_the_login_is_not(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, Wire(gateway) as wire:
            loop = asyncio.get_running_loop()
            with await wire.link.connect(FAR, gateway.far_port) as sock:
                assert isinstance(sock, socket.socket)
                await loop.sock_sendall(sock, b"what a program says")
                assert await loop.sock_recv(sock, 100) == b"what a program says"
            token = wire.link._secret
            assert wire.passed.count(b"what a program says") == 2
            for secret in ("secretive-pilot", "secret-password", token, FAR):
                assert secret.encode() not in wire.passed
            assert socket.inet_aton(FAR) + gateway.far_port.to_bytes(2, "big") not in wire.passed

    run(main)


def test_who_is_spoken_to_first_hears_everything(tmp_path):
    async def greet(_reader, writer):
        writer.write(BANNER)
        writer.close()

    async def hear(link, port):
        loop, digest = asyncio.get_running_loop(), hashlib.sha256()
        with await link.connect(FAR, port) as sock:
            while data := await loop.sock_recv(sock, 65536):
                digest.update(data)
        return digest.digest()

    async def main():
        async with Gateway(tmp_path) as gateway, await asyncio.start_server(greet, FAR, 0) as server:
            gateway.service.tickets.add("pilot", "password")
            link = gateway.link(tls=False)
            await link.open()
            port = server.sockets[0].getsockname()[1]
            heard = await asyncio.gather(*(hear(link, port) for _ in range(20)))
            assert set(heard) == {hashlib.sha256(BANNER).digest()}
            await link.close()

    run(main)


def test_what_cannot_be_reached_has_the_errno_of_connect(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, Wire(gateway) as wire:
            for host, port, code in ((FAR, 1, errno.ECONNREFUSED), ("10.0.0.1", 22, errno.EACCES)):
                with pytest.raises(OSError, match=host) as refused:
                    await wire.link.connect(host, port)
                assert refused.value.errno == code, host

    run(main)


def test_who_goes_on_in_tls_is_dropped(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            stream = await link._encrypted()
            login = socks5.give_login("pilot", link._secret)
            request = socks5.give_request(Command.CONNECT_PLAIN, Target(FAR, gateway.far_port))
            await stream.send(socks5.give_greeting(socks5.PASSWORD) + login + request + b"not the end")
            await link._logged_in(stream)
            with pytest.raises(OSError):  # noqa: PT011  (reset, or the end of the encryption)
                await stream.receive(socks5.take_reply)
            stream.close()
            assert not gateway.outside.usage

    run(main)
