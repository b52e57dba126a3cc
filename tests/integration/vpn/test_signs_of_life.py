"""Signs of life that a tunnel asks for, on loopback: the SOCKS5 server's greeting, a name server's answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

import pytest

from vpn.errors import TunnelError
from vpn.modes import slirp
from vpn.relay import socks5
from vpn.shim.upstream import PlainSocks

HOST = "127.0.0.1"


def run(main):
    asyncio.run(asyncio.wait_for(main(), 90))


class SocksServer:
    """Greets, and answers requests by sending what it is sent; counts greetings."""

    def __init__(self):
        self.greetings = 0
        self.greeted = asyncio.Condition()
        self.method = socks5.NO_LOGIN

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, HOST, 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(3)
            writer.write(socks5.give_method(self.method))
            await writer.drain()
            async with self.greeted:
                self.greetings += 1
                self.greeted.notify_all()
            await reader.read()
        writer.close()

    async def wait(self, count):
        async with self.greeted:
            await self.greeted.wait_for(lambda: self.greetings >= count)


def test_a_socks_server_is_greeted_again_and_again_and_missed_when_it_is_gone():
    async def main():
        async with SocksServer() as server:
            upstream = PlainSocks(HOST, server.port, 0.01, 0.01)
            await upstream.open()
            await server.wait(5)
            assert not upstream.lost.done()
            server.server.close()
            await server.server.wait_closed()
            error = await upstream.lost
            assert error.layer == "gateway"
            assert f"{HOST} port {server.port}" in error.message
            await upstream.close()

    run(main)


def test_a_socks_server_that_takes_us_no_more_is_missed():
    async def main():
        async with SocksServer() as server:
            upstream = PlainSocks(HOST, server.port, 0.0, 0.01)
            await upstream.open()
            server.method = socks5.PASSWORD
            assert "wants a password" in (await upstream.lost).message
            await upstream.close()

    run(main)


def test_that_we_have_no_descriptor_left_says_nothing_of_the_server(monkeypatch):
    async def main():
        async with SocksServer() as server:
            upstream = PlainSocks(HOST, server.port, 0.0, 0.01)
            await upstream.open()
            tried = asyncio.Event()

            def none_left(*_):
                tried.set()
                raise OSError(24, os.strerror(24))

            with monkeypatch.context() as patch:
                patch.setattr("vpn.shim.upstream.socket.socket", none_left)
                await tried.wait()
            await server.wait(server.greetings + 2)
            assert not upstream.lost.done()
            await upstream.close()

    run(main)


class NameServer(asyncio.DatagramProtocol):
    """Says something else first; then, unless it is silent, what is an answer to the letter."""

    silent = False

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, where):
        self.transport.sendto(b"garbage", where)
        if not self.silent:
            self.transport.sendto(data[:2] + b"\x81\x83" + data[4:], where)


def test_a_name_servers_answer():
    async def main():
        loop = asyncio.get_running_loop()
        transport, server = await loop.create_datagram_endpoint(NameServer, (HOST, 0))
        port = transport.get_extra_info("sockname")[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.bind((HOST, 0))
            await slirp.ask(sock, HOST, 60, port)
            await slirp.ask(sock, HOST, 60, port)
            server.silent = True
            with pytest.raises(TunnelError, match=f"the name server {HOST} does not answer"):
                await slirp.ask(sock, HOST, 0.05, port)
            with pytest.raises(TunnelError, match="Permission denied"):
                await slirp.ask(sock, "255.255.255.255", 60, port)
        transport.close()

    run(main)


def test_what_a_device_has_received():
    before = slirp.received(os.getpid(), "lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((HOST, 0))
        sock.sendto(b"x" * 1000, sock.getsockname())
        assert len(sock.recv(2000)) == 1000
    assert slirp.received(os.getpid(), "lo") >= before + 1000
    assert slirp.received(os.getpid(), "none") is None
    assert slirp.received(0) is None
