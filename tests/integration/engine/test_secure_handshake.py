"""How TLS begins, or does not: whoever is not of the queue stays outside, and costs nothing that lasts."""

import asyncio
import os
import socket
import ssl
import threading

import pytest
from secured import Bare, End, Keys, as_manager, as_pilot, let_all_run, plain, play, reset

from hpcq import secure
from hpcq.connection import MANAGER_NAME


@pytest.fixture(scope="module")
def keys():
    return Keys()


@pytest.fixture(scope="module")
def others():
    """Of another queue."""
    return Keys()


def watched(sock):
    """Whether the loop still waits for something of it; ends that."""
    loop = asyncio.get_running_loop()
    return loop.remove_reader(sock) or loop.remove_writer(sock)


def test_a_manager_of_another_queue_is_not_believed(keys, others):
    async def scenario():
        ours, theirs = plain("tcp")
        with ours, theirs:
            found = await asyncio.gather(as_pilot(ours, keys), as_manager(theirs, others), return_exceptions=True)
            assert [isinstance(error, ssl.SSLError) for error in found] == [True, True]
            assert "alert" in str(found[1]).lower()  # it was told why
            assert not watched(ours)
            assert not watched(theirs)

    assert not play(scenario())


def test_a_pilot_of_another_queue_is_not_let_in_and_learns_of_it(keys, others):
    async def scenario():
        ours, theirs = plain("tcp")
        forged = keys.of_pilot(others.identity)
        with theirs:
            pilot, error = await asyncio.gather(
                as_pilot(ours, keys, End, forged), as_manager(theirs, keys), return_exceptions=True
            )
            assert isinstance(error, ssl.SSLError)
        assert isinstance(await pilot.gone(), ssl.SSLError)
        assert pilot.calls == ["made", "lost"]

    assert not play(scenario())


def test_one_without_a_certificate_is_not_let_in(keys):
    async def scenario():
        ours, theirs = plain()
        stranger = ssl.create_default_context(cadata=keys.identity.authority)
        with ours, theirs:
            _, error = await asyncio.gather(
                Bare(ours, stranger, MANAGER_NAME).shake_hands(), as_manager(theirs, keys), return_exceptions=True
            )
        assert isinstance(error, ssl.SSLError)
        assert "certificate" in str(error)

    assert not play(scenario())


@pytest.mark.parametrize("side", [as_manager, as_pilot])
@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"GET / HTTP/1.0\r\n\r\n", ssl.SSLError),
        (os.urandom(100_000), ssl.SSLError),
        (b"", ConnectionResetError),
        (b"\x16\x03\x01\x02\x00\x01", ConnectionResetError),
        (b"\x14\x03\x03\x00\x01\x01" * 20_000, (ssl.SSLError, ConnectionResetError)),
    ],
    ids=["http", "noise", "nothing", "the beginning of a hello", "a flood of change-cipher-spec"],
)
def test_nonsense_in_place_of_a_handshake(said, error, side, keys):
    async def scenario():
        ours, theirs = plain()
        sender = threading.Thread(target=_say_and_end, args=(theirs, said))
        sender.start()
        with ours:
            with pytest.raises(error):
                await side(ours, keys)
            assert not watched(ours)
        await asyncio.to_thread(sender.join)

    assert not play(scenario())


def _say_and_end(sock, data):
    with sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except OSError:
            pass  # it was hung up on before it had said all


def test_a_reset_in_the_handshake(keys):
    async def scenario():
        ours, theirs = plain("tcp")
        reset(theirs)
        with ours, pytest.raises(ConnectionError):
            await as_manager(ours, keys)

    assert not play(scenario())


def test_who_keeps_silent_is_not_waited_for_longer_than_said(keys):
    async def scenario():
        ours, theirs = plain()
        with ours, theirs:
            with pytest.raises(TimeoutError, match=r"no TLS handshake within 0\.01 s"):
                await secure.secure(ours, keys.manager, End, timeout=0.01)
            assert not watched(ours)

    assert not play(scenario())


def test_a_handshake_lets_others_run_however_much_of_it_is_there(keys, monkeypatch):
    monkeypatch.setattr(secure, "RECORD", 1)

    async def scenario():
        ours, theirs = plain()
        with ours, theirs:
            pilot = asyncio.ensure_future(Bare(ours, keys.pilot, MANAGER_NAME).shake_hands())
            await let_all_run()
            task, turns = asyncio.ensure_future(as_manager(theirs, keys)), 0
            while not pilot.done():
                await asyncio.sleep(0)
                turns += 1
            assert turns > 200
            (await task).transport.abort()

    assert not play(scenario())


@pytest.mark.parametrize("side", [as_manager, as_pilot])
def test_a_handshake_can_be_cancelled(side, keys):
    async def scenario():
        ours, theirs = plain()
        with ours, theirs:
            task = asyncio.ensure_future(side(ours, keys))
            await let_all_run()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not watched(ours)

    assert not play(scenario())


def test_a_protocol_that_cannot_be_made_leaves_the_socket_to_the_caller(keys):
    def make():
        raise LookupError("none")

    async def scenario():
        ours, theirs = plain()
        with theirs:
            pilot, error = await asyncio.gather(
                as_pilot(ours, keys), as_manager(theirs, keys, make), return_exceptions=True
            )
            assert isinstance(error, LookupError)
            assert not watched(theirs)
        assert await pilot.gone() is None

    assert not play(scenario())
