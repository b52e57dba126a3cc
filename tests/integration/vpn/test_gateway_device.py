"""The gateway's device on loopback: a pair of sockets stands for it, servers are real ones."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import socket

import pytest

from vpn.gateway import device, openings, ways
from vpn.gateway.accesslog import AccessLog
from vpn.gateway.device import Device
from vpn.gateway.outside import Outside, OutsideError, OutsideLimits
from vpn.gateway.plane import Owners
from vpn.gateway.policy import Policy
from vpn.relay import packets
from vpn.relay.bucket import QUANTUM
from vpn.relay.packets import Endpoint

FAR = "127.0.0.3"
TUNNEL = ipaddress.ip_address("198.18.0.2").packed


class Tunnel:
    """A device, and the kernel's end of it."""

    def __init__(self, directory, limits=None, client="pilot"):
        self.path = directory / "access.log"
        self.log = AccessLog(self.path)
        self.outside = Outside(Policy([FAR, "127.0.0.0/8:1-9"]), self.log, limits)
        self.owners = Owners()
        if client:
            self.owners.arrived("198.18.0.2", client)
        self.inner, self.outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.inner.setblocking(False)
        self.far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.far.bind((FAR, 0))
        self.far.setblocking(False)
        self.port = self.far.getsockname()[1]

    async def __aenter__(self):
        self.device = Device(self.outer.fileno(), self.outside, self.owners.known)
        self.task = asyncio.create_task(self.device.run())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.log.close()
        for sock in (self.inner, self.outer, self.far):
            sock.close()

    async def send(self, data, port=0, *, source=4000, host=FAR):
        target = Endpoint(ipaddress.ip_address(host).packed, port or self.port)
        await self.put(packets.build(Endpoint(TUNNEL, source), target, data))

    async def put(self, raw):
        await asyncio.get_running_loop().sock_sendall(self.inner, raw)

    async def receive(self):
        async with asyncio.timeout(60):
            return await asyncio.get_running_loop().sock_recv(self.inner, 65535)

    async def at_far(self):
        async with asyncio.timeout(60):
            return await asyncio.get_running_loop().sock_recvfrom(self.far, 65535)

    async def echo(self, data=b"hello", **options):
        """There and back."""
        await self.send(data, **options)
        assert (await self.at_far())[0] == data

    async def caught_up(self):
        """All that was sent before was read: what a neighbour sends after it has arrived."""
        self.owners.arrived("198.18.0.9", "neighbour")
        target = Endpoint(ipaddress.ip_address(FAR).packed, self.port)
        await self.put(packets.build(Endpoint(ipaddress.ip_address("198.18.0.9").packed, 1), target, b"caught up"))
        while (await self.at_far())[0] != b"caught up":
            pass

    def lines(self):
        self.log.flush()
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def run(main):
    asyncio.run(asyncio.wait_for(main(), 90))


def code_of(message):
    assert message[9] == packets.ICMP
    return message[20], message[21]


def test_answers_come_from_where_they_were_asked_for_and_are_counted(tmp_path):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            for data in (b"", b"hello", bytes(60_000)):
                await tunnel.send(data)
                came, where = await tunnel.at_far()
                assert came == data
                tunnel.far.sendto(data[::-1], where)
                answer = packets.parse(await tunnel.receive())
                assert (answer.source.host, answer.source.port) == (FAR, tunnel.port)
                assert (answer.target, answer.data) == (Endpoint(TUNNEL, 4000), data[::-1])
            assert tunnel.outside.usage["pilot"].total() == (60_005, 60_005)
            assert tunnel.lines() == []
            tunnel.device.cut("pilot")
            (line,) = tunnel.lines()
            assert (line["client"], line["host"], line["address"], line["port"]) == ("pilot", FAR, FAR, tunnel.port)
            assert (line["protocol"], line["outcome"], line["up"], line["down"]) == ("udp", "ok", 60_005, 60_005)
            await tunnel.echo()  # it is not revoked: its next datagram makes another way

    run(main)


def test_what_is_not_allowed_is_refused_at_once_each_time_and_logged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(openings, "REFUSED_FOR", 600.0)

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            for source in range(4000, 4100):
                await tunnel.send(b"x", 53, host="10.1.2.3", source=source)
                message = await tunnel.receive()
                assert code_of(message) == (3, 3)
                assert int.from_bytes(message[28 + 20 : 28 + 22]) == source
            (line,) = tunnel.lines()
            assert line["outcome"].startswith("denied: ")
            assert line["protocol"] == "udp"

    run(main)


def test_a_target_that_is_not_there_is_refused_in_its_name(tmp_path):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            tunnel.far.close()
            await tunnel.send(b"x")
            message = await tunnel.receive()
            assert code_of(message) == (3, 3)
            assert message[12:16] == ipaddress.ip_address(FAR).packed

    run(main)


def test_a_packet_that_is_faster_than_the_word_of_its_client_waits_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "PATIENCE", 600.0)

    async def main():
        async with Tunnel(tmp_path, client="") as tunnel:
            for number in range(1000):
                await tunnel.send(b"%d" % number)
            await tunnel.caught_up()
            tunnel.owners.arrived("198.18.0.2", "pilot")
            await tunnel.device.arrived("198.18.0.3")
            await tunnel.device.arrived("198.18.0.2")
            assert (await tunnel.at_far())[0] == b"%d" % (1000 - device.EARLY)
            assert set(tunnel.outside.usage) == {"pilot", "neighbour"}

    run(main)


def test_a_revoked_client_has_nothing_open_and_sends_nothing(tmp_path):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            await tunnel.echo()
            tunnel.owners.left("pilot")
            tunnel.device.cut("pilot")
            tunnel.outside.forget("pilot")
            await tunnel.send(b"late")
            await tunnel.caught_up()
            tunnel.owners.arrived("198.18.0.2", "other")
            await tunnel.echo(b"other's")
            assert set(tunnel.outside.usage) == {"other", "neighbour"}

    run(main)


def test_ways_are_bounded_and_the_least_recently_used_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "FLOWS", 10)

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            await tunnel.echo(source=1)
            for source in range(2, 100):
                await tunnel.echo(source=source)
                await tunnel.echo(source=1)
            assert len(tunnel.outside.usage["pilot"].open) == 10
            lines = tunnel.lines()
            assert len(lines) == 99 - 10
            assert all(line["up"] == 5 for line in lines)  # not the one that was used again and again

    run(main)


def test_whoever_sends_to_ten_thousand_targets_gets_some_and_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(device.log, "warning", lambda *_: None)

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            await tunnel.echo()
            for number in range(10_000):
                await tunnel.send(b"x", 9, host=f"127.1.{number // 250}.{number % 250}", source=number % 1000 + 1)
            await tunnel.caught_up()
            assert len(tunnel.outside.usage["pilot"].open) <= device.FLOWS
            tried = len(tunnel.lines()) + len(tunnel.outside.usage["pilot"].open)
            lost = tunnel.device._clients["pilot"].openings.lost
            assert tried + lost >= 10_000 > lost > 0

    run(main)


def test_ways_that_are_not_used_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "IDLE", 0.01)

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            closed, close = asyncio.Event(), ways.Ways._close
            monkeypatch.setattr(ways.Ways, "_close", lambda *args: (close(*args), closed.set()))
            await tunnel.send(b"x")
            async with asyncio.timeout(60):
                await closed.wait()
            assert tunnel.lines()[0]["outcome"] == "ok"
            assert not tunnel.outside.usage["pilot"].open

    run(main)


def test_what_exceeds_the_limit_is_lost(tmp_path):
    async def main():
        rate = 1000.0
        async with Tunnel(tmp_path, OutsideLimits(rate_per_client=rate)) as tunnel:
            loop = asyncio.get_running_loop()
            began = loop.time()
            for _ in range(500):
                await tunnel.send(bytes(1000))
            await tunnel.caught_up()
            up, _ = tunnel.outside.usage["pilot"].total()
            assert 0 < up <= rate * (loop.time() - began) + QUANTUM + 1000  # a burst, and one that is owed

    run(main)


@pytest.mark.parametrize("protocol", [2, 6, 47, 50, 132])
def test_other_protocols_are_refused_as_prohibited(tmp_path, protocol):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            raw = packets.build(Endpoint(TUNNEL, 1), Endpoint(ipaddress.ip_address(FAR).packed, 2), bytes(20))
            await tunnel.put(raw[:9] + bytes([protocol]) + raw[10:])
            assert code_of(await tunnel.receive()) == (3, 13)

    run(main)


def test_garbage_and_what_is_for_many_is_dropped_in_silence(tmp_path):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            good = packets.build(Endpoint(TUNNEL, 1), Endpoint(ipaddress.ip_address(FAR).packed, 2), b"12345678")
            for size in range(1, len(good)):
                await tunnel.put(good[:size])
            six = bytes.fromhex("60000000000811ff") + ipaddress.ip_address("fe80::1").packed * 2 + bytes(8)
            error = packets.unreachable(good)
            for raw in (b"\0" * 40, b"\xff" * 40, b"\x45" * 2000, six, good[:20] + b"\0\1\0\2\xff\xff\0\0", error):
                await tunnel.put(raw)
            for host in ("255.255.255.255", "224.0.0.1", "0.0.0.0"):
                await tunnel.send(b"x", 9, host=host)
            await tunnel.send(b"x", 9, host="10.0.0.1", source=7)
            message = await tunnel.receive()  # of the last one: all others were dropped
            assert int.from_bytes(message[28 + 20 : 28 + 22]) == 7
            assert [line["host"] for line in tunnel.lines()] == ["10.0.0.1"]

    run(main)


def test_an_error_of_ours_ends_nothing(tmp_path, monkeypatch, caplog):
    def broken(*_args):
        raise RuntimeError("broken")

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            await tunnel.echo()
            with monkeypatch.context() as patch:
                patch.setattr(packets, "take_echo", broken)
                ping = packets.build_echo(Endpoint(TUNNEL, 1), Endpoint(bytes(4), 0), bytes(2), 1, reply=False)
                await tunnel.put(ping[:16] + ipaddress.ip_address(FAR).packed + ping[20:])
                await tunnel.echo()
        assert "a packet cannot be carried" in caplog.text

    run(main)


def test_there_are_no_sockets_left(tmp_path, monkeypatch):
    async def main():
        async with Tunnel(tmp_path) as tunnel:
            with monkeypatch.context() as patch:

                def none(*_args):
                    raise OutsideError("busy", "no socket: Too many open files")

                patch.setattr(ways, "_connected", none)
                await tunnel.send(b"x")
                assert code_of(await tunnel.receive()) == (3, 3)
            assert tunnel.lines()[0]["outcome"].startswith("busy: ")

    run(main)


def may_ping():
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except PermissionError:
        return False
    return True


def test_ping(tmp_path):
    """By a ping socket where this host gives us one, else refused as prohibited."""

    async def main():
        async with Tunnel(tmp_path) as tunnel:
            target = Endpoint(ipaddress.ip_address(FAR).packed, 0)
            rest = b"\0\1" + os.urandom(1000)
            await tunnel.put(packets.build_echo(Endpoint(TUNNEL, 77), target, rest, 1, reply=False))
            answer = await tunnel.receive()
            tunnel.device.cut("pilot")
            (line,) = tunnel.lines()
            assert (line["host"], line["port"], line["protocol"]) == (FAR, 0, "icmp")
            if may_ping():
                assert answer[:20] + answer[24:] == packets.build_echo(target, Endpoint(TUNNEL, 77), rest, 0)
                assert (line["outcome"], line["up"], line["down"]) == ("ok", len(rest) + 6, len(rest) + 6)
            else:
                assert code_of(answer) == (3, 13)
                assert "ping_group_range" in line["outcome"]

    run(main)
