"""How a connection with TLS ends: told once, with a reason, and nothing said is lost."""

import asyncio
import contextlib
import gc
import os
import socket
import ssl

import pytest
from secured import Bare, End, Keys, as_manager, bare, let_all_run, pair, plain, play, reset

from hpcq import secure
from hpcq.connection import MANAGER_NAME


@pytest.fixture(scope="module")
def keys():
    return Keys()


CALLS = ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing"]


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Nothing may end only because somebody has lost patience."""
    monkeypatch.setattr(secure, "GOODBYE", 3600.0)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_the_first_to_close_and_the_other_both_end_without_error(kind, keys):
    async def scenario():
        pilot, manager = await pair(keys, kind)
        pilot.transport.write(b"last words")
        pilot.transport.close()
        pilot.transport.write(b"after that")
        assert await manager.gone() is None
        assert await pilot.gone() is None
        assert manager.received == b"last words"
        assert (pilot.calls, manager.calls) == (["made", "lost"], ["made", "eof", "lost"])

    assert not play(scenario())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_both_close_at_once(kind, keys):
    async def scenario():
        ends = await pair(keys, kind)
        for end in ends:
            end.transport.write(bytes(100_000))
            end.transport.close()
        assert [await end.gone() for end in ends] == [None, None]
        assert [end.calls for end in ends] == [["made", "lost"]] * 2

    assert not play(scenario())


def test_who_takes_nothing_can_close_and_learns_of_the_end(keys):
    async def scenario():
        pilot, manager = await pair(keys)
        pilot.transport.pause_reading()
        manager.transport.write(bytes(8_000_000))
        pilot.transport.close()
        assert not pilot.transport.is_reading()
        await manager.gone()
        assert await pilot.gone() is None
        assert pilot.received == b""

    assert not play(scenario())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_what_was_not_sent_yet_at_close_arrives_whole(kind, keys):
    data = os.urandom(1_000_000) * 8

    async def scenario():
        pilot, manager = await pair(keys, kind)
        manager.transport.pause_reading()
        manager.transport.write(b"what the closing side does not hear any more")
        pilot.transport.write(data)
        assert pilot.transport.get_write_buffer_size()
        pilot.transport.close()
        await let_all_run()
        assert not pilot.lost
        manager.transport.resume_reading()
        assert await manager.gone() is None
        assert await pilot.gone() is None
        assert manager.received == data
        assert pilot.received == b""

    assert not play(scenario())


def test_close_with_something_received_but_not_taken_loses_nothing_that_was_said(keys):
    """An SSL_shutdown that finds data breaks the connection for TLS; what was said before must leave all the same."""
    data = bytes(8_000_000)

    class Closes(End):
        def connection_made(self, transport):
            super().connection_made(transport)
            transport.write(data)
            transport.close()

    async def scenario():
        ours, theirs = plain()
        with ours:
            pilot = Bare(ours, keys.pilot, MANAGER_NAME)
            unheard = bytes(10_000)
            manager, _ = await asyncio.gather(
                as_manager(theirs, keys, Closes), pilot.shake_hands(unheard, unheard, unheard)
            )
            assert manager.transport.get_write_buffer_size()
            assert await pilot.read() == data
        assert await manager.gone() is None
        assert manager.received == b""

    assert not play(scenario())


def test_who_has_said_all_still_hears_the_rest(keys):
    data = bytes(8_000_000)

    class Answers(End):
        def eof_received(self):
            super().eof_received()
            self.transport.write(b"the end")

    async def scenario():
        async with bare(keys, end=Answers) as (pilot, other):
            pilot.transport.write(data)
            await other.send(other.seal_end())
            other.sock.shutdown(socket.SHUT_WR)
            await pilot.until(lambda: "eof" in pilot.calls)
            assert not pilot.lost
            assert not asyncio.get_running_loop().remove_reader(pilot.transport.get_extra_info("socket"))
            assert await other.read() == data + b"the end"
            assert await pilot.gone() is None

    assert not play(scenario())


def test_an_end_without_close_notify_is_an_end(keys):
    """Who was killed says none; a frame that was cut off is none."""

    async def scenario():
        async with bare(keys) as (pilot, other):
            whole, cut = other.seal(b"whole"), other.seal(b"cut off")
            await other.send(whole + cut[:-1])
        assert await pilot.gone() is None
        assert pilot.received == b"whole"
        assert pilot.calls == ["made", "eof", "lost"]

    assert not play(scenario())


def test_what_comes_after_close_notify_is_not_heard(keys):
    async def scenario():
        async with bare(keys) as (pilot, other):
            ciphertext = other.seal(b"before") + other.seal_end()
            await other.send(ciphertext + b"in the clear")
            assert await pilot.gone() is None
        assert pilot.received == b"before"

    assert not play(scenario())


def test_an_altered_record_ends_it_and_what_came_before_is_heard(keys):
    async def scenario():
        async with bare(keys) as (pilot, other):
            good, bad, after = other.seal(b"good"), bytearray(other.seal(b"bad")), other.seal(b"after")
            bad[-1] ^= 1
            await other.send(good + bad + after)
            assert isinstance(await pilot.gone(), ssl.SSLError)
        assert pilot.received == b"good"
        assert pilot.calls == ["made", "lost"]

    assert not play(scenario())


def test_what_is_not_tls_any_more_ends_it(keys):
    async def scenario():
        async with bare(keys) as (pilot, other):
            with contextlib.suppress(BrokenPipeError):  # it is hung up on before it has said all
                await other.send(os.urandom(300_000))
            assert isinstance(await pilot.gone(), ssl.SSLError)
        assert pilot.received == b""

    assert not play(scenario())


@pytest.mark.parametrize("doing", ["nothing", "writing", "closing", "closed"])
def test_a_reset_is_told_whatever_is_done_meanwhile(doing, keys):
    async def scenario():
        async with bare(keys, "tcp") as (pilot, other):
            if doing in {"writing", "closing"}:
                pilot.transport.write(bytes(20_000_000))
            if doing in {"closing", "closed"}:
                pilot.transport.close()
            await let_all_run()
            reset(other.sock)
            assert isinstance(await pilot.gone(), ConnectionError)
        assert pilot.calls[-1] == "lost"

    assert not play(scenario())


def test_a_write_to_one_who_has_gone_loses_the_connection_once(keys):
    class Stubborn(End):
        def eof_received(self):
            super().eof_received()
            for _ in range(10):
                self.transport.write(b"still there?")

    async def scenario():
        async with bare(keys, end=Stubborn) as (pilot, other):
            other.sock.close()
            assert isinstance(await pilot.gone(), BrokenPipeError)

    assert not play(scenario())


@pytest.mark.parametrize("unsent", [False, True])
def test_who_vanishes_is_not_waited_for_for_ever(unsent, keys, monkeypatch):
    monkeypatch.setattr(secure, "GOODBYE", 0.05)

    async def scenario():
        async with bare(keys) as (pilot, _):
            if unsent:
                pilot.transport.write(bytes(8_000_000))
            pilot.transport.close()
            pilot.transport.close()
            error = await pilot.gone()
        if unsent:
            assert isinstance(error, TimeoutError)
            assert "bytes were not taken within 0.05 s" in str(error)
        else:
            assert error is None

    assert not play(scenario())


@pytest.mark.parametrize("before", ["nothing", "writing", "paused", "closing"])
def test_abort_says_nothing_more_and_is_an_end_for_the_other_side(before, keys):
    async def scenario():
        pilot, manager = await pair(keys)
        if before == "writing":
            pilot.transport.write(bytes(8_000_000))
        elif before == "paused":
            pilot.transport.pause_reading()
            manager.transport.write(b"unheard")
            await let_all_run()
        elif before == "closing":
            pilot.transport.close()
        pilot.transport.abort()
        assert pilot.transport.is_closing()
        assert not pilot.lost  # not before its caller has returned
        assert await pilot.gone() is None
        assert isinstance(await manager.gone(), ConnectionError if before == "paused" else type(None))
        assert manager.calls[0] == "made"
        assert len(manager.received) < 8_000_000

    assert not play(scenario())


def test_the_number_of_a_lost_connection_is_free_for_another(keys):
    """What the loop was told of a socket ends with it: else the next with its number would be mistaken for it."""

    async def scenario():
        numbers = set()
        for _ in range(5):
            pilot, manager = await pair(keys)
            numbers.add(pilot.transport.get_extra_info("socket").fileno())
            pilot.transport.write(bytes(8_000_000))
            pilot.transport.abort()
            assert await pilot.gone() is None
            manager.transport.abort()
            await manager.gone()
        assert len(numbers) < 5

    assert not play(scenario())


@pytest.mark.parametrize("what", CALLS)
def test_what_the_protocol_raises_costs_its_connection_and_is_told(what, keys):
    def fails(self, *_):
        raise LookupError(what)

    async def scenario():
        pilot, manager = await pair(keys, manager=type("Fails", (End,), {what: made_then(fails, what)}))
        if what == "eof_received":
            pilot.transport.close()
        elif what == "data_received":
            pilot.transport.write(b"hello")
        elif what.endswith("writing"):
            manager.transport.write(bytes(8_000_000))
        error = await manager.gone()
        assert isinstance(error, LookupError)
        await pilot.gone()

    told = play(scenario())
    assert [str(context["exception"]) for context in told] == [what]
    assert "protocol" in told[0]["message"]


def made_then(fails, what):
    """The test needs to know the transport, also of a protocol that fails at once."""

    def first(self, transport):
        End.connection_made(self, transport)
        fails(self)

    return first if what == "connection_made" else fails


def test_what_connection_lost_raises_is_told_and_the_socket_is_closed(keys):
    class Fails(End):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            raise LookupError("at the end")

    async def scenario():
        pilot, manager = await pair(keys, manager=Fails)
        manager.transport.abort()
        await manager.gone()
        assert await pilot.gone() is None

    assert [str(context["exception"]) for context in play(scenario())] == ["at the end"]


@pytest.mark.parametrize("way", ["close", "abort"])
@pytest.mark.parametrize("what", CALLS)
def test_a_protocol_may_end_its_connection_in_whatever_it_is_told(what, way, keys):
    def ends(self, *args):
        getattr(End, what)(self, *args)
        getattr(self.transport, way)()

    async def scenario():
        pilot, manager = await pair(keys, manager=type("Ends", (End,), {what: ends}))
        pilot.transport.write(b"hello")
        if what == "eof_received":
            pilot.transport.close()
        elif what.endswith("writing"):
            manager.transport.write(bytes(8_000_000))
        await manager.gone()
        await pilot.gone()

    assert not play(scenario())


def test_a_loop_that_is_closed_leaves_the_socket_to_the_collector(keys):
    """Nobody is told, as with asyncio's own: a warning says so."""

    async def scenario():
        return await pair(keys)

    ends = list(asyncio.run(scenario()))
    with pytest.warns(ResourceWarning, match="unclosed"):
        _forget(ends)


def _forget(ends):
    ends.clear()
    gc.collect()
