"""TLS as one transport: what is written arrives, whole and in order, whatever either side does meanwhile."""

import array
import asyncio
import errno
import fcntl
import random
import resource
import socket
import ssl
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secured import Bare, End, Keys, as_manager, as_pilot, bare, pair, plain, play

from hpcq import secure
from hpcq.connection import MANAGER_NAME


@pytest.fixture(scope="module")
def keys():
    return Keys()


class Echo(End):
    """Says what it hears, and hears no more while that is not taken."""

    def data_received(self, data):
        self.transport.write(data)

    def pause_writing(self):
        super().pause_writing()
        self.transport.pause_reading()

    def resume_writing(self):
        super().resume_writing()
        self.transport.resume_reading()


async def say(end, data):
    """Write it piece by piece, as fast as it is taken."""
    for start in range(0, len(data), 300_000):
        await end.until(lambda: end.calls.count("pause") == end.calls.count("resume"))
        end.transport.write(data[start : start + 300_000])


async def hang_up(*ends):
    ends[0].transport.close()
    assert [await end.gone() for end in ends] == [None] * len(ends)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@pytest.mark.parametrize("size", [1, 16_384, 16_385, 100_000, 50_000_000])
def test_what_is_said_comes_back_from_an_echo(size, kind, keys):
    data = random.Random(size).randbytes(min(size, 1_000_003)) * (size // 1_000_003 + 1)
    data = data[:size]

    async def scenario():
        pilot, manager = await pair(keys, kind, manager=Echo)
        await asyncio.gather(say(pilot, data), pilot.until(lambda: len(pilot.received) == size))
        assert pilot.received == data
        for end in (pilot, manager):
            assert end.calls.count("pause") == end.calls.count("resume")
            assert end.transport.get_write_buffer_size() == 0
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_the_writer_is_told_to_pause_while_the_reader_takes_nothing(keys):
    class Writer(End):
        def resume_writing(self):
            super().resume_writing()
            self.left = self.transport.get_write_buffer_size()

    async def scenario():
        pilot, manager = await pair(keys, pilot=Writer)
        manager.transport.pause_reading()
        assert not manager.transport.is_reading()
        while "pause" not in pilot.calls:
            pilot.transport.write(bytes(100_000))
        low, high = pilot.transport.get_write_buffer_limits()
        written = pilot.transport.get_write_buffer_size()
        assert low < high < written < high + 200_000
        assert manager.received == b""
        manager.transport.resume_reading()
        await pilot.until(lambda: "resume" in pilot.calls)
        assert pilot.left <= low
        pilot.transport.write(b"the end")
        await manager.until(lambda: manager.received.endswith(b"the end"))
        assert pilot.calls.count("pause") == 1
        await hang_up(manager, pilot)

    assert not play(scenario())


def test_a_huge_write_is_taken_whole(keys):
    data = memoryview(bytearray(20_000_000))

    async def scenario():
        pilot, manager = await pair(keys)
        pilot.transport.write(data)
        assert pilot.calls == ["made", "pause"]
        await manager.until(lambda: len(manager.received) == len(data))
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_anything_that_holds_bytes_can_be_written(keys):
    numbers = array.array("I", range(1_000_000))

    async def scenario():
        pilot, manager = await pair(keys)
        for data in (b"a", bytearray(b"b"), memoryview(b"xcx")[1:2], b"", memoryview(b"defghijk").cast("I")):
            pilot.transport.write(data)
        pilot.transport.writelines([b"l", b"m"])
        await manager.until(lambda: manager.received == b"abcdefghijklm")
        pilot.transport.write(memoryview(numbers))
        await manager.until(lambda: len(manager.received) == 13 + 4_000_000)
        assert manager.received[13:] == numbers.tobytes()
        with pytest.raises(TypeError):
            pilot.transport.write("text")
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_the_transport_says_what_protocols_ask_for(keys):
    async def scenario():
        pilot, manager = await pair(keys, "tcp")
        ask = pilot.transport.get_extra_info
        assert ask("socket").getsockname() == manager.transport.get_extra_info("peername")
        assert ask("sslcontext") is keys.pilot
        assert ask("ssl_object").version() == "TLSv1.3"
        assert pilot.transport.get_protocol() is pilot
        assert pilot.transport.is_reading()
        assert not pilot.transport.can_write_eof()
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_the_other_side_may_have_gone_before_it_is_asked_for_its_address(keys):
    class Gone(socket.socket):
        def getpeername(self):
            raise OSError(errno.ENOTCONN, "not connected")

    async def scenario():
        ours, theirs = plain("tcp")
        pilot, manager = await asyncio.gather(as_pilot(ours, keys), as_manager(Gone(fileno=theirs.detach()), keys))
        assert manager.transport.get_extra_info("peername") is None
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_a_small_message_does_not_wait_for_an_acknowledgement(keys):
    async def scenario():
        pilot, manager = await pair(keys, "tcp")
        for end in (pilot, manager):
            sock = end.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await hang_up(pilot, manager)

    assert not play(scenario())


def test_what_pause_writing_writes_comes_after_what_it_interrupts(keys):
    class Late(End):
        def pause_writing(self):
            super().pause_writing()
            self.transport.write(b"after")

    async def scenario():
        pilot, manager = await pair(keys, pilot=Late)
        pilot.transport.write(b"." * 3_000_000)
        await manager.until(lambda: len(manager.received) == 3_000_005)
        assert manager.received.endswith(b".after")
        await hang_up(pilot, manager)

    assert not play(scenario())


@pytest.mark.parametrize("paused", ["", "at once", "a moment later"])
def test_what_came_with_the_handshake_is_given_up_when_it_is_wanted(paused, keys):
    class Reserved(End):
        def connection_made(self, transport):
            super().connection_made(transport)
            if paused == "at once":
                transport.pause_reading()

    async def reserved(sock):
        manager = await as_manager(sock, keys, Reserved)
        if paused:
            manager.transport.pause_reading()
        return manager

    async def scenario():
        ours, theirs = plain()
        with ours:
            pilot = Bare(ours, keys.pilot, MANAGER_NAME)
            manager, _ = await asyncio.gather(reserved(theirs), pilot.shake_hands(b"at once"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert manager.received == (b"" if paused else b"at once")
            manager.transport.resume_reading()
            await manager.until(lambda: manager.received == b"at once")
        assert await manager.gone() is None

    assert not play(scenario())


def test_a_protocol_may_give_way_to_another_between_two_messages(keys):
    class First(End):
        def data_received(self, data):
            super().data_received(data)
            self.reader = asyncio.StreamReader()
            protocol = asyncio.StreamReaderProtocol(self.reader)
            self.transport.set_protocol(protocol)
            protocol.connection_made(self.transport)
            self.writer = asyncio.StreamWriter(self.transport, protocol, self.reader, asyncio.get_running_loop())

    async def scenario():
        pilot, manager = await pair(keys, manager=First)
        pilot.transport.write(b"first")
        await manager.until(lambda: manager.received)
        data = bytes(range(256)) * 20_000
        back = asyncio.ensure_future(manager.reader.readexactly(len(data)))
        await say(pilot, data)
        assert await back == data
        for start in range(0, len(data), 100_000):
            manager.writer.write(data[start : start + 100_000])
            await manager.writer.drain()
        await pilot.until(lambda: pilot.received == data)
        pilot.transport.close()
        assert await manager.reader.read() == b""
        await manager.writer.wait_closed()
        assert await pilot.gone() is None

    assert not play(scenario())


def test_session_tickets_do_no_harm(keys):
    keys.manager.num_tickets = 2
    try:

        async def scenario():
            pilot, manager = await pair(keys, manager=Echo)
            pilot.transport.write(b"hello")
            await pilot.until(lambda: pilot.received == b"hello")
            await hang_up(manager, pilot)

        assert not play(scenario())
    finally:
        keys.manager.num_tickets = 0


def asks_again(keys):
    """A manager's bare end that asks for the certificate again, which TLS answers without the protocol."""
    keys.pilot.post_handshake_auth = True
    return bare(keys)


def test_what_tls_itself_is_asked_is_answered(keys):
    async def scenario():
        async with asks_again(keys) as (pilot, other):
            other.tls.verify_client_post_handshake()
            await other.send(other.seal(b"and data"))
            await pilot.until(lambda: pilot.received == b"and data")
            answer = await asyncio.get_running_loop().sock_recv(other.sock, 1 << 16)
            other.incoming.write(answer)
            with pytest.raises(ssl.SSLWantReadError):
                other.tls.read(1)
            assert len(answer) > 500
            pilot.transport.abort()
            await pilot.gone()

    assert not play(scenario())


def test_who_asks_tls_and_takes_no_answer_is_hung_up_on(keys, monkeypatch):
    monkeypatch.setattr(secure, "REPLIES", 100_000)

    async def scenario():
        async with asks_again(keys) as (pilot, other):
            while pilot.transport.get_write_buffer_size() <= secure.REPLIES:
                pilot.transport.write(bytes(10_000))
            other.tls.verify_client_post_handshake()
            await other.send(other.seal(b"heard"))
            assert "more of TLS than it takes" in str(await pilot.gone())
            assert pilot.received == b"heard"

    assert not play(scenario())


def test_two_loops_in_two_threads_do_not_meet(keys):
    """A program may have several queues, each with a thread of its own."""
    data = random.Random(0).randbytes(3_000_000)
    done = []

    async def scenario():
        pilot, manager = await pair(keys, manager=Echo)
        for _ in range(5):
            pilot.received.clear()
            await asyncio.gather(say(pilot, data), pilot.until(lambda: len(pilot.received) == len(data)))
            assert pilot.received == data
        await hang_up(pilot, manager)
        done.append(True)

    threads = [threading.Thread(target=play, args=(scenario(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, True]


def test_many_open_files(keys):
    """Numbers select(2) could not wait for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))

    def lifted(sock):
        with sock:
            return socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 1100))

    async def scenario():
        ours, theirs = (lifted(sock) for sock in plain())
        assert min(ours.fileno(), theirs.fileno()) >= 1100
        pilot, manager = await asyncio.gather(as_pilot(ours, keys), as_manager(theirs, keys, Echo))
        await asyncio.gather(say(pilot, bytes(2_000_000)), pilot.until(lambda: len(pilot.received) == 2_000_000))
        await hang_up(pilot, manager)

    try:
        assert not play(scenario())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


STEPS = st.tuples(
    st.booleans(),
    st.one_of(st.integers(1, 70_000), st.integers(200_000, 900_000), st.sampled_from(["pause", "resume", "turn"])),
)


@settings(max_examples=40)
@given(steps=st.lists(STEPS, max_size=20), closer=st.booleans())
def test_any_order_of_writes_and_pauses_changes_nothing(keys, steps, closer):
    """Both sides write, pause and go on as they like, then one closes and the other has all it said."""
    source = random.Random(0).randbytes(1_000_000)

    async def scenario():
        ends = await pair(keys)
        said = [bytearray(), bytearray()]
        for side, step in steps:
            end = ends[side]
            if step == "pause":
                end.transport.pause_reading()
            elif step == "resume":
                end.transport.resume_reading()
            elif step == "turn":
                await asyncio.sleep(0)
            else:
                start = len(said[side]) % 100_000
                data = source[start : start + step]
                end.transport.write(data)
                said[side] += data
        closing, other = ends[closer], ends[not closer]
        closing.transport.resume_reading()
        await closing.until(lambda: closing.received == said[not closer])
        closing.transport.close()
        other.transport.resume_reading()
        await hang_up(closing, other)
        assert other.received == said[closer]

    assert not play(scenario())
