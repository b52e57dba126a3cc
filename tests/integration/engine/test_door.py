"""Many at the manager's door: in order, a few at a time, and strangers who keep silent do not shut it."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl

import pytest
from running import DEADLINE, eventually

from hpcq import benchmark_pilots, connection, door, state_dir
from hpcq.identity import make_identity


class Guest(asyncio.Protocol):
    """Says hello, and remembers whether it was hung up on."""

    def __init__(self, guests):
        self.guests = guests
        self.open = True

    def connection_made(self, transport):
        self.guests.append(self)
        self.transport = transport
        transport.write(b"hello")

    def connection_lost(self, exc):
        self.open = False

    def abort(self, reason):
        self.transport.abort()


@pytest.fixture
def keys():
    identity = make_identity("q")
    info = connection.ConnectionInfo("q", 1, ["127.0.0.1"], 0, "", 0, identity.authority, identity.pilot)
    return connection.manager_tls(identity), connection.pilot_tls(info)


def talk(keys, scenario, listener=None):
    """Run ``scenario(door, guests, visit)`` with a door; ``visit()`` comes in and returns what it is told."""

    async def run():
        guests = []
        one = door.Door(listener or door.listener("127.0.0.1", 0), keys[0], lambda: Guest(guests))

        async def visit():
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", one.port, ssl=keys[1], server_hostname=connection.MANAGER_NAME
            )
            try:
                return await reader.read(5)
            finally:
                writer.transport.abort()

        try:
            async with asyncio.timeout(DEADLINE):
                await scenario(one, guests, visit)
        finally:
            await one.close()

    asyncio.run(run())


def silent(one, count):
    return [socket.create_connection(("127.0.0.1", one.port)) for _ in range(count)]


async def hung_up(channel):
    """Whether the other side has closed; waits for it."""
    channel.setblocking(False)
    try:
        return await asyncio.get_running_loop().sock_recv(channel, 1) == b""
    except ConnectionResetError:
        return True


def test_all_come_in_though_only_a_few_at_a_time(keys, monkeypatch):
    monkeypatch.setattr(door, "AT_ONCE", 2)

    async def scenario(one, guests, visit):
        assert await asyncio.gather(*(visit() for _ in range(30))) == [b"hello"] * 30

    talk(keys, scenario)


def test_nothing_waits_for_an_acknowledgement(keys):
    async def scenario(one, guests, visit):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", one.port, ssl=keys[1], server_hostname=connection.MANAGER_NAME
        )
        assert await reader.read(5) == b"hello"
        inside = guests[0].transport.get_extra_info("socket")
        assert inside.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.transport.abort()

    talk(keys, scenario)


def test_silent_strangers_are_passed_by(keys, monkeypatch):
    monkeypatch.setattr(door, "AT_ONCE", 4)
    monkeypatch.setattr(door, "PATIENCE", 0.05)

    async def scenario(one, guests, visit):
        strangers = silent(one, 40)
        assert await visit() == b"hello"
        assert len(guests) == 1
        await one.close()
        assert all([await hung_up(channel) for channel in strangers])
        for channel in strangers:
            channel.close()

    talk(keys, scenario)


def test_the_oldest_unfinished_makes_room(keys, monkeypatch):
    monkeypatch.setattr(door, "UNFINISHED", 8)
    monkeypatch.setattr(door, "AT_ONCE", 4)
    monkeypatch.setattr(door, "PATIENCE", 0.05)

    async def scenario(one, guests, visit):
        strangers = silent(one, 9)
        assert await hung_up(strangers[0])
        assert await visit() == b"hello"
        assert await hung_up(strangers[1])
        for channel in strangers:
            channel.close()

    talk(keys, scenario)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EPROTO, errno.EPERM, errno.ENETDOWN])
def test_what_cannot_be_accepted_now_is_tried_again(number, keys, monkeypatch):
    class Full(socket.socket):
        refusals = 2

        def accept(self):
            if self.refusals:
                self.refusals -= 1
                raise OSError(number, os.strerror(number))
            return super().accept()

    monkeypatch.setattr(door, "RETRY", 0.01)
    inner = door.listener("127.0.0.1", 0)
    listener = Full(fileno=inner.detach())

    async def scenario(one, guests, visit):
        assert await visit() == b"hello"
        assert listener.refusals == 0

    talk(keys, scenario, listener)


def test_shut_keeps_those_who_are_in(keys):
    async def scenario(one, guests, visit):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", one.port, ssl=keys[1], server_hostname=connection.MANAGER_NAME
        )
        assert await reader.read(5) == b"hello"
        one.shut()
        with pytest.raises(OSError, match="Connect call failed"):
            await visit()
        assert guests[0].open
        await one.close()
        assert not guests[0].open
        writer.transport.abort()

    talk(keys, scenario)


def test_somebody_without_our_key_is_not_let_in(keys):
    async def scenario(one, guests, visit):
        other = ssl.create_default_context()
        other.check_hostname, other.verify_mode = False, ssl.CERT_NONE
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, ssl=other)
        with contextlib.suppress(ssl.SSLError, ConnectionError):  # it depends on what arrives first
            assert await reader.read(5) == b""
        writer.transport.abort()
        assert not guests

    talk(keys, scenario)


def test_simulated_pilots_all_serve_and_work(place, monkeypatch):
    monkeypatch.setattr(benchmark_pilots, "IDLE_SECONDS", 0.1)
    figures = benchmark_pilots.measure_pilots(40, 2)
    assert figures["pilots_that_worked"] == figures["pilots"] == 40
    assert figures["tasks"] == 400
    assert figures["seconds_until_all_serve"] > 0
    assert figures["idle_core_share"] >= 0
    assert figures["memory_before"] > 0
    assert figures["memory_after_tasks"] > 0
    eventually(lambda: not state_dir.known_queues(), "its queue is gone")
