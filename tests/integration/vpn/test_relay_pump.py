"""The pump, between real sockets on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import pathlib
import socket
import time

import pytest

from vpn.gateway.outside import Outside, OutsideError, OutsideLimits, connect_first
from vpn.gateway.policy import Policy
from vpn.relay.bucket import Budget, TokenBucket
from vpn.relay.pump import Limits, pump, ready


async def connected():
    """Two ends of one loopback TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        one = socket.socket()
        one.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(one, server.getsockname())
        other, _ = await loop.sock_accept(server)
    return ready(one), ready(other)


class Path:
    """program, inner, pump, outer, server: two connections with a pump between them."""

    def __init__(self, **limits):
        self.limits = Limits(**limits)

    async def __aenter__(self):
        self.program, self.inner = await connected()
        self.outer, self.server = await connected()
        self.pump = asyncio.create_task(self._pump())
        return self

    async def _pump(self):
        try:
            return await pump(self.inner, self.outer, self.limits)
        finally:
            self.inner.close()
            self.outer.close()

    async def __aexit__(self, *_):
        self.program.close()
        self.server.close()
        self.pump.cancel()
        await asyncio.gather(self.pump, return_exceptions=True)


def descriptors():
    return len(list(pathlib.Path("/proc/self/fd").iterdir()))


def run(coroutine):
    return asyncio.run(coroutine)


async def read_all(sock):
    loop, digest, count = asyncio.get_running_loop(), hashlib.sha256(), 0
    while data := await loop.sock_recv(sock, 1 << 20):
        digest.update(data)
        count += len(data)
    return count, digest.hexdigest()


async def send_all(sock, data):
    await asyncio.get_running_loop().sock_sendall(sock, data)
    sock.shutdown(socket.SHUT_WR)


def test_both_ways_at_once_with_half_close():
    async def main():
        up, down = os.urandom(30_000_000), os.urandom(20_000_000)
        async with Path() as path:
            sends = asyncio.gather(send_all(path.program, up), send_all(path.server, down))
            at_server, at_program = await asyncio.gather(read_all(path.server), read_all(path.program))
            await sends
            carried = await path.pump
        assert at_server == (len(up), hashlib.sha256(up).hexdigest())
        assert at_program == (len(down), hashlib.sha256(down).hexdigest())
        assert (carried.up, carried.down, carried.error) == (len(up), len(down), "")

    run(main())


def test_an_answer_may_come_after_the_question_has_ended():
    async def main():
        loop = asyncio.get_running_loop()
        async with Path() as path:
            await send_all(path.program, b"question")
            assert (await read_all(path.server))[0] == 8
            await loop.sock_sendall(path.server, b"answer")
            assert await loop.sock_recv(path.program, 100) == b"answer"
            path.server.close()
            assert await loop.sock_recv(path.program, 100) == b""

    run(main())


@pytest.mark.parametrize("end", ["program", "server"])
def test_a_reset_is_passed_on(end):
    async def main():
        loop = asyncio.get_running_loop()
        async with Path() as path:
            broken, other = (path.program, path.server) if end == "program" else (path.server, path.program)
            await loop.sock_sendall(broken, b"x")
            assert await loop.sock_recv(other, 10) == b"x"
            broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            broken.close()
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(other, 10)

    run(main())


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


async def fill(sock):
    """Send until no more is taken, as what follows shows."""
    loop, sent = asyncio.get_running_loop(), 0
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(0.3):
                await loop.sock_sendall(sock, b"x" * 65536)
            sent += 65536
    return sent


async def read_until_reset(sock):
    loop, count = asyncio.get_running_loop(), 0
    try:
        while data := await loop.sock_recv(sock, 1 << 20):
            count += len(data)
    except ConnectionResetError:
        return count
    pytest.fail("the end is an orderly one")


def test_a_program_that_breaks_off_an_upload_ends_it_though_the_server_takes_nothing():
    async def main():
        async with Path() as path:
            sent = await fill(path.program)
            reset(path.program)
            async with asyncio.timeout(30):
                carried = await path.pump
            assert "reset" in carried.error
            assert await read_until_reset(path.server) < sent

    run(main())


def test_the_last_words_of_a_program_that_breaks_off_arrive():
    async def main():
        loop = asyncio.get_running_loop()
        async with Path() as path:
            await loop.sock_sendall(path.program, b"last words")
            reset(path.program)  # the pump learns of both at once
            assert await loop.sock_recv(path.server, 100) == b"last words"
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(path.server, 100)

    run(main())


def test_a_program_that_breaks_off_while_its_limit_holds_it_up():
    async def main():
        budget = Budget([TokenBucket(1.0, now=asyncio.get_running_loop().time())])  # a byte a second
        async with Path(up=budget) as path:
            await fill(path.program)
            reset(path.program)
            async with asyncio.timeout(30):
                assert "reset" in (await path.pump).error

    run(main())


def test_a_program_that_breaks_off_after_its_question_ends_the_wait_for_an_answer():
    async def main():
        loop = asyncio.get_running_loop()
        async with Path() as path:
            await send_all(path.program, b"question")
            assert (await read_all(path.server))[0] == 8
            reset(path.program)
            async with asyncio.timeout(30):
                assert (await path.pump).error
            with pytest.raises(ConnectionError):
                await loop.sock_sendall(path.server, b"an answer that nobody hears")

    run(main())


def test_a_reader_that_stops_stops_the_sender_and_nothing_is_lost():
    async def main():
        data = os.urandom(40_000_000)
        async with Path() as path:
            sending = asyncio.create_task(send_all(path.program, data))
            done, _ = await asyncio.wait([sending], timeout=0.5)
            assert not done  # nobody reads: it must be held back
            assert (await read_all(path.server)) == (len(data), hashlib.sha256(data).hexdigest())
            await sending

    run(main())


def test_a_limit_holds():
    async def main():
        rate = 4_000_000
        budget = Budget([TokenBucket(rate, now=asyncio.get_running_loop().time())])
        data = os.urandom(2_000_000)
        async with Path(up=budget) as path:
            began = time.monotonic()
            sending = asyncio.create_task(send_all(path.program, data))
            assert (await read_all(path.server))[0] == len(data)
            await sending
            assert time.monotonic() - began > 0.8 * (len(data) - rate * 0.05) / rate

    run(main())


def test_thousands_of_connections_hold_no_pipes():
    async def main():
        before = descriptors()
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            paths = [await stack.enter_async_context(Path()) for _ in range(50)]
            for path in paths:
                await loop.sock_sendall(path.program, b"x" * 1000)
            for path in paths:
                assert len(await loop.sock_recv(path.server, 2000)) == 1000
            assert descriptors() - before <= 50 * 4 + 2 * 16
        assert descriptors() - before <= 2 * 16

    run(main())


def test_outside_connects_and_explains():
    async def main():
        outside = Outside(Policy(("127.0.0.2", "default")))
        with socket.create_server(("127.0.0.2", 0)) as server:
            port = server.getsockname()[1]
            (await outside.connect("pilot", "127.0.0.2", port)).close()
        with pytest.raises(OutsideError) as refused:
            await outside.connect("pilot", "127.0.0.2", port)
        assert refused.value.kind == "refused"
        for host, kind in (("10.0.0.1", "denied"), ("localhost", "denied"), ("name.invalid", "unresolved")):
            with pytest.raises(OutsideError) as refused:
                await outside.connect("pilot", host, 80)
            assert refused.value.kind == kind, refused.value

    run(main())


def test_outside_limits_connections():
    async def main():
        limits = OutsideLimits(connections=3, connections_per_client=2)
        outside = Outside(Policy(("127.0.0.1",)), limits=limits)
        with outside.slot("a", "x", 1), outside.slot("a", "x", 1):
            with pytest.raises(OutsideError) as refused:
                await outside.connect("a", "127.0.0.1", 1)
            assert refused.value.kind == "busy"
            with outside.slot("b", "x", 1):
                with pytest.raises(OutsideError) as refused:
                    await outside.connect("b", "127.0.0.1", 1)
                assert refused.value.kind == "busy"
        assert outside.usage["a"].connections == 3

    run(main())


def test_the_second_address_is_used_when_the_first_does_not_answer():
    async def main():
        with socket.create_server(("127.0.0.2", 0)) as server:
            addresses = [ipaddress.ip_address(text) for text in ("127.0.0.3", "127.0.0.2")]
            sock = await connect_first(addresses, server.getsockname()[1])
            assert sock.getpeername()[0] == "127.0.0.2"
            sock.close()

    run(main())
