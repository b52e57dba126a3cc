"""The relay's service on loopback: logins, sessions, hostile clients, UDP and DNS, the end of a pilot."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import ssl
import time

import pytest
from dnslib import QTYPE, RR, A, DNSRecord

from vpn.config import Credential, Secret
from vpn.errors import TunnelError
from vpn.gateway import resolver, socks, tickets
from vpn.gateway.certificate import load_or_make, pin_of
from vpn.gateway.outside import Outside, OutsideError, OutsideLimits
from vpn.gateway.policy import Policy
from vpn.gateway.resolver import Resolver
from vpn.relay import link, socks5
from vpn.relay.bucket import QUANTUM
from vpn.relay.link import Link
from vpn.relay.pump import pump, ready
from vpn.relay.socks5 import Command, Datagram, Target
from vpn.relay.tls import server_context

HOST = "127.0.0.2"  # what the service listens on; pilots may go to 127.0.0.3 only
FAR = "127.0.0.3"


class Gateway:
    """A service, and servers beyond it."""

    def __init__(self, directory, limits=None):
        _, certificate = load_or_make(directory, "test")
        self.pin = pin_of(certificate.encode())
        self.events = []
        self.changed = asyncio.Event()
        self.outside = Outside(Policy([f"{FAR}", "*.example.org"]), limits=limits)
        context = server_context(directory / "server-cert.pem", directory / "server-key.pem")
        asks = Resolver(self.outside.policy, self.outside.names, [FAR])
        self.service = socks.SocksService(context, self.outside, asks, self.on_event)
        self.listener = socket.create_server((HOST, 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]

    async def __aenter__(self):
        self.accepting = asyncio.create_task(self.service.accept(self.listener))
        self.far = await asyncio.start_server(echo, FAR, 0)
        self.far_port = self.far.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.far.close()
        self.accepting.cancel()
        await asyncio.gather(self.accepting, return_exceptions=True)
        await self.service.close()
        self.listener.close()

    def link(self, user="pilot", password="password", pin=None, **options):
        return Link(Credential((HOST,), 0, pin or self.pin, user, Secret(password), self.port), **options)

    @contextlib.asynccontextmanager
    async def session(self, user="pilot", password="password"):
        self.service.tickets.add(user, password)
        link = self.link(user, password)
        await link.open()
        yield link
        await link.close()

    def on_event(self, *event):
        self.events.append(event)
        self.changed.set()

    async def event(self, *wanted):
        async with asyncio.timeout(90):
            while wanted not in [event[:2] for event in self.events]:
                self.changed.clear()
                await self.changed.wait()


async def echo(reader, writer):
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()


def run(main):
    asyncio.run(asyncio.wait_for(main(), 60))


async def say(stream, text):
    await stream.send(text)
    return await stream.receive_some()


def test_connections_ride_on_a_session(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway:
            async with gateway.session() as link:
                streams = [await link.connect(FAR, gateway.far_port) for _ in range(5)]
                for stream in streams:
                    assert await say(stream, b"hello") == b"hello"
                assert gateway.events == [("connect", "pilot", "127.0.0.1")]
                assert len(gateway.outside.usage["pilot"].open) == 5
                for stream in streams:
                    await stream.end()
                    assert await stream.receive_some() == b""
                    stream.close()
            await gateway.event("end", "pilot")

    run(main)


def test_signs_of_life_come_as_often_as_they_are_asked_for(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.tickets.add("pilot", "password")
            link = gateway.link(beat=0.01)
            await link.open()
            send, beats, thrice = link._session.send, [], asyncio.Event()

            async def beat(data):
                await send(data)
                beats.append(data)
                if len(beats) == 3:
                    thrice.set()

            link._session.send = beat
            await thrice.wait()
            await link.close()
            assert not link.lost.done()

    run(main)


def test_a_password_is_good_once_and_a_second_use_is_logged(tmp_path, caplog):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session():
            with pytest.raises(TunnelError, match="good for one login"):
                await gateway.link().open()
            with pytest.raises(TunnelError, match="refused the credential"):
                await gateway.link(password="guess").open()
        assert "a spent password for 'pilot'" in caplog.text
        assert "a wrong password for 'pilot'" in caplog.text
        assert "guess" not in caplog.text

    run(main)


def test_who_comes_before_the_word_of_it_was_read_is_let_in(tmp_path, caplog):
    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.catch_up = lambda: gateway.service.tickets.add("pilot", "password")
            link = gateway.link()
            await link.open()
            await link.close()
            with pytest.raises(TunnelError, match="refused the credential"):
                await gateway.link(password="guess").open()
        assert caplog.text.count("password for") == 1

    run(main)


def test_wrong_passwords_are_slowed_and_others_are_not(tmp_path, monkeypatch):
    def guess(gateway):
        return [asyncio.create_task(gateway.link(password=str(n)).open()) for n in range(3)]

    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            began = time.monotonic()
            for result in await asyncio.gather(*guess(gateway), return_exceptions=True):
                assert isinstance(result, TunnelError)
            assert time.monotonic() - began >= 0.5 * 2**2  # the third waited twice as long as the second
            monkeypatch.setattr(tickets, "LONGEST_DELAY", 600.0)
            monkeypatch.setattr(tickets, "FIRST_DELAY", 600.0)
            guesses = guess(gateway)
            (await link.connect(FAR, gateway.far_port)).close()
            assert not any(one.done() for one in guesses)
            for one in guesses:
                one.cancel()
            await asyncio.gather(*guesses, return_exceptions=True)

    run(main)


def test_a_key_that_is_not_the_pinned_one_is_told_nothing(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.tickets.add("pilot", "password")
            with pytest.raises(TunnelError, match="not the pinned one"):
                await gateway.link(pin="pin-sha256:" + "A" * 43 + "=").open()
            link = gateway.link()
            await link.open()  # the password was not spent
            await link.close()

    run(main)


def test_what_cannot_be_reached_has_the_errno_of_connect(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            for host, port, code in (
                (FAR, 1, errno.ECONNREFUSED),
                ("127.0.0.1", 22, errno.EACCES),
                ("10.0.0.1", 22, errno.EACCES),
                ("localhost", 22, errno.EACCES),
                ("no-such-name.invalid", 22, errno.EHOSTUNREACH),
            ):
                with pytest.raises(OSError, match=host) as refused:
                    await link.connect(host, port)
                assert refused.value.errno == code, host

    run(main)


def test_revoking_ends_everything_of_a_pilot_and_nothing_of_another(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session("other") as other:
            gateway.service.tickets.add("pilot", "password")
            link = gateway.link()
            await link.open()
            mine, theirs = [await each.connect(FAR, gateway.far_port) for each in (link, other)]
            gateway.service.revoke("pilot")
            with pytest.raises(OSError):  # noqa: PT011  (reset, or the end of the encryption)
                await say(mine, b"x")
            error = await asyncio.wait_for(link.lost, 90)
            assert "ended the session" in str(error)
            with pytest.raises(TunnelError):
                await link.connect(FAR, gateway.far_port)
            assert await say(theirs, b"x") == b"x"
            theirs.close()
            mine.close()
            await link.close()

    run(main)


def test_a_session_that_breaks_comes_back_and_its_connections_stay(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            stream = await link.connect(FAR, gateway.far_port)
            link._session.sock.shutdown(socket.SHUT_RDWR)
            await gateway.event("disconnect", "pilot")
            gateway.events.clear()
            await gateway.event("connect", "pilot")
            assert await say(stream, b"still") == b"still"
            another = await link.connect(FAR, gateway.far_port)
            assert await say(another, b"new") == b"new"
            stream.close()
            another.close()
            assert not link.lost.done()

    run(main)


@pytest.mark.parametrize("answers", [True, False])
def test_a_gateway_that_is_gone_loses_the_session_in_time(tmp_path, monkeypatch, answers):
    async def swallowed(*_):
        await asyncio.Event().wait()

    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.tickets.add("pilot", "password")
            session = gateway.link(reconnect_timeout=1)
            await session.open()
            gateway.accepting.cancel()
            await asyncio.gather(gateway.accepting, return_exceptions=True)
            gateway.listener.close()  # its machine answers that nobody listens, or not at all
            if not answers:
                monkeypatch.setattr(link, "CONNECT_DEADLINE", 1e6)
                monkeypatch.setattr(link, "REDIAL", 0.1)
                monkeypatch.setattr(link, "first_connected", swallowed)
            session._session.sock.shutdown(socket.SHUT_RDWR)
            error = await asyncio.wait_for(session.lost, 90)
            assert "no relay answers" in str(error)
        await session.close()

    run(main)


def test_a_gateway_that_ends_in_order_says_so(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.tickets.add("pilot", "password")
            link = gateway.link()
            await link.open()
        error = await asyncio.wait_for(link.lost, 90)
        assert "ended the session" in str(error)
        await link.close()

    run(main)


def test_a_gateway_that_was_started_again_takes_the_password_once_more(tmp_path):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            gateway.service.tickets.remove("pilot")
            gateway.service.tickets.add("pilot", "password")
            gateway.events.clear()
            link._session.sock.shutdown(socket.SHUT_RDWR)
            await gateway.event("connect", "pilot")
            stream = await link.connect(FAR, gateway.far_port)
            assert await say(stream, b"again") == b"again"
            stream.close()

    run(main)


def test_through_a_pump_with_half_close(tmp_path):
    async def main():
        data = os.urandom(20_000_000)
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            stream = await link.connect(FAR, gateway.far_port)
            program, inner = socket.socketpair()
            carrying = asyncio.create_task(pump(ready(inner), stream))
            loop = asyncio.get_running_loop()
            program.setblocking(False)

            async def send():
                await loop.sock_sendall(program, data)
                program.shutdown(socket.SHUT_WR)

            sending, back = asyncio.create_task(send()), b""
            while piece := await loop.sock_recv(program, 1 << 20):
                back += piece
            await sending
            assert back == data
            carried = await carrying
            assert (carried.up, carried.down, carried.error) == (len(data), len(data), "")
            for each in (program, inner, stream):
                each.close()

    run(main)


def test_an_end_without_a_word_is_not_taken_for_an_end(tmp_path):
    """Cut TLS short: what was received must not look complete."""

    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            stream = await link.connect(FAR, gateway.far_port)
            program, inner = socket.socketpair()
            carrying = asyncio.create_task(pump(ready(inner), stream))
            stream.sock.shutdown(socket.SHUT_RD)
            carried = await carrying
            assert "cut off" in carried.error
            for each in (program, inner, stream):
                each.close()

    run(main)


def encrypted(gateway):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(socket.create_connection((HOST, gateway.port), timeout=90))


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\xff\xff" + bytes(70000),
    b"\x05\x01\x00",
    b"",
    bytes(200_000),
]
SPOKEN = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"\x04\x01",
    b"\x05\x00",
    b"\x05\x01\x00",
    b"\x05\x01\x02\x01\x00\x00",
    b"\x05\x01\x02\x01\xff" + b"x" * 255 + b"\xff" + b"y" * 255 + b"\x05\x01\x00\x03\xff" + b"z" * 300,
    b"\x05" * 200_000,
]


@pytest.mark.parametrize("inside_tls", [False, True])
def test_garbage_is_survived(tmp_path, inside_tls, monkeypatch, caplog):
    def attack(gateway, data):
        with contextlib.suppress(OSError):  # it may be over before the handshake is
            sock = encrypted(gateway) if inside_tls else socket.create_connection((HOST, gateway.port), timeout=90)
            with sock:
                sock.sendall(data)
                while sock.recv(4096):
                    pass

    async def main():
        async with Gateway(tmp_path) as gateway:
            with monkeypatch.context() as patch:
                patch.setattr(socks, "LOGIN_DEADLINE", 2.0)
                for each in SPOKEN if inside_tls else GARBAGE:
                    await asyncio.to_thread(attack, gateway, each)
            async with gateway.session() as link:
                stream = await link.connect(FAR, gateway.far_port)
                assert await say(stream, b"alive") == b"alive"
                stream.close()
            assert not gateway.service._strangers
        assert "an error of our own" not in caplog.text

    run(main)


def test_those_who_never_speak_do_not_keep_pilots_out(tmp_path, monkeypatch):
    monkeypatch.setattr(socks, "STRANGERS", 20)

    async def main():
        async with Gateway(tmp_path) as gateway:
            silent = [socket.create_connection((HOST, gateway.port)) for _ in range(100)]
            async with gateway.session() as link:
                stream = await link.connect(FAR, gateway.far_port)
                assert await say(stream, b"in") == b"in"
                stream.close()
                assert len(gateway.service._strangers) <= 20
            for sock in silent:
                sock.close()

    run(main)


def test_who_logs_in_too_slowly_is_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(socks, "LOGIN_DEADLINE", 2.0)

    async def main():
        async with Gateway(tmp_path) as gateway:
            # It may be dropped in the handshake already.
            with contextlib.suppress(OSError), await asyncio.to_thread(encrypted, gateway) as sock:
                sock.sendall(b"\x05")
                assert await asyncio.to_thread(sock.recv, 10) == b""
            assert not gateway.service._strangers

    run(main)


def test_an_ordinary_client_may_use_a_password_for_one_connection(tmp_path):
    def client(gateway):
        with encrypted(gateway) as sock:
            sock.sendall(socks5.give_greeting(0, 2))
            assert sock.recv(2) == b"\5\2"
            sock.sendall(socks5.give_login("pilot", "password"))
            assert sock.recv(2) == b"\1\0"
            sock.sendall(socks5.give_request(Command.CONNECT, Target(FAR, gateway.far_port)))
            assert sock.recv(100)[:2] == b"\5\0"
            sock.sendall(b"hi")
            assert sock.recv(2) == b"hi"

    async def main():
        async with Gateway(tmp_path) as gateway:
            gateway.service.tickets.add("pilot", "password")
            await asyncio.to_thread(client, gateway)
            await gateway.event("end", "pilot")

    run(main)


@pytest.mark.parametrize("command", [Command.BIND, 0x42])
def test_other_commands_are_refused(tmp_path, command):
    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            stream, reply = await link._ask(command, Target(FAR, 1))
            assert reply.answer == socks5.Answer.COMMAND_UNKNOWN
            stream.close()

    run(main)


def test_a_pilot_has_a_limit_of_connections(tmp_path):
    async def main():
        async with Gateway(tmp_path, OutsideLimits(connections_per_client=3)) as gateway, gateway.session() as link:
            streams = [await link.connect(FAR, gateway.far_port) for _ in range(3)]
            with pytest.raises(OSError):  # noqa: PT011
                await link.connect(FAR, gateway.far_port)
            last = streams.pop()
            await last.end()
            assert await last.receive_some() == b""  # the service has ended it, and counted it out
            last.close()
            streams.append(await link.connect(FAR, gateway.far_port))
            for stream in streams:
                stream.close()

    run(main)


def test_udp(tmp_path):
    class Echo(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, where):
            self.transport.sendto(data[::-1], where)

    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(Echo, (FAR, 0))
            target = Target(FAR, transport.get_extra_info("sockname")[1])
            stream = await link.associate()
            for data in (b"abc", b"x" * 60000):
                await stream.send(socks5.give_datagram(Datagram(target, data)))
                answer = await stream.receive(socks5.take_datagram, 70000)
                assert answer == Datagram(target, data[::-1])
            for nowhere in (Target("127.0.0.1", 53), Target(FAR, 1)):
                await stream.send(socks5.give_datagram(Datagram(nowhere, b"x")))
                answer = await stream.receive(socks5.take_datagram, 70000)
                assert answer == Datagram(nowhere, b"", True)
            await stream.send(b"\0\0\7garbage")
            with pytest.raises(OSError):  # noqa: PT011
                await stream.receive(socks5.take_datagram)
            stream.close()
            transport.close()

    run(main)


@pytest.mark.parametrize("way", ["up", "down"])
def test_udp_is_limited_and_counted(tmp_path, way):
    """The limit lets a burst pass and, for all the time this takes, nothing after it: the rest is dropped."""
    size, fit = 1000, QUANTUM // 1000
    question, answer = (b"?" * size, b"!") if way == "up" else (b"?", b"!" * size)

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport, self.heard, self.all = transport, 0, asyncio.Event()

        def datagram_received(self, data, where):
            self.heard += 1
            if self.heard == fit + 3:
                self.all.set()
            self.transport.sendto(answer, where)

    async def main():
        limits = OutsideLimits(rate_per_client=0.001)
        async with Gateway(tmp_path, limits) as gateway, gateway.session() as link:
            transport, server = await asyncio.get_running_loop().create_datagram_endpoint(Server, (FAR, 0))
            target = Target(FAR, transport.get_extra_info("sockname")[1])
            stream = await link.associate()
            for _ in range(fit):
                await stream.send(socks5.give_datagram(Datagram(target, question)))
                assert await stream.receive(socks5.take_datagram, 70000) == Datagram(target, answer)
            await stream.send(socks5.give_datagram(Datagram(target, question)) * 3)  # too many
            if way == "down":
                await server.all.wait()
            nowhere = Target("127.0.0.1", 53)
            await stream.send(socks5.give_datagram(Datagram(nowhere, b"")))
            assert await stream.receive(socks5.take_datagram, 70000) == Datagram(nowhere, b"", True)
            used = gateway.outside.usage["pilot"]
            assert used.total()[way == "down"] == fit * size
            if way == "up":
                assert server.heard == fit
            stream.close()
            transport.close()

    run(main)


def test_names_are_asked_by_the_gateway_and_remembered_for_its_rules(tmp_path, monkeypatch):
    def answer(data):
        reply = DNSRecord.parse(data).reply()
        reply.add_answer(RR(reply.q.qname, QTYPE.A, rdata=A("127.0.0.4"), ttl=60))
        return bytes(reply.pack())

    class Server(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, where):
            self.transport.sendto(b"garbage", where)
            self.transport.sendto(answer(data[:2] + data[2:]), where)

    async def main():
        async with Gateway(tmp_path) as gateway, gateway.session() as link:
            loop = asyncio.get_running_loop()
            transport, _ = await loop.create_datagram_endpoint(Server, (FAR, 0))
            monkeypatch.setattr(resolver, "PORT", transport.get_extra_info("sockname")[1])
            stream = await link.resolve()
            query = bytes(DNSRecord.question("www.example.org").pack())
            await stream.send(socks5.give_message(query) * 3 + socks5.give_message(b"no query"))
            for _ in range(3):
                said = await stream.receive(socks5.take_message, 70000)
                assert said[:2] == query[:2]
                assert str(DNSRecord.parse(said).rr[0].rdata) == "127.0.0.4"
            assert gateway.outside.names.of(ipaddress.ip_address("127.0.0.4"), time.monotonic()) == {"www.example.org"}
            stream.close()
            transport.close()

    run(main)


def test_what_ends_at_the_gateways_own_host_is_refused_unless_a_rule_names_it():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as server:
            where = server.getsockname()  # as if the address had come after the policies were made
            with pytest.raises(OutsideError, match="the gateway's own host"):
                await Outside(Policy(["127.0.0.0/8"])).connect("pilot", *where)
            (await Outside(Policy(["127.0.0.1"])).connect("pilot", *where)).close()

    run(main)
