"""Bytes to messages and back: any chunking is the same, nothing of a stranger's is believed or buffered."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq import messages as m
from hpcq.errors import ProtocolError
from hpcq.protocol import FRAME_LIMIT, LARGE_FRAME, OPENING_LIMIT, Connection, FrameReader, State, frame

HELLO = m.ClientHello(m.PROTOCOL_VERSION, "here")
UPDATE = m.Update([7], [m.TaskResult(8, "success", b"value")])

words = st.one_of(
    st.builds(m.Update, st.lists(st.integers(0, 9)), st.just([])),
    st.builds(m.Returned, st.lists(st.integers(0, 9))),
    st.builds(m.Goodbye, st.text(max_size=50)),
    st.just(m.Heartbeat()),
    st.builds(m.Update, st.just([]), st.lists(st.builds(m.TaskResult, st.integers(0, 9), st.text(), st.binary()))),
)


def manager():
    return Connection(m.FirstWord, m.FromPilot)


def receive(connection, data):
    """All messages, the first word's companions too, as a link fetches them."""
    received = []
    while messages := connection.receive(data):
        received += messages
        data = b""
    return received


def chunks(data, cuts):
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(words, max_size=6), st.lists(st.integers(0), max_size=12))
def test_any_chunking_gives_the_same_messages(sent, cuts):
    connection = manager()
    data = b"".join(map(frame, [HELLO, *sent]))
    received = [message for chunk in chunks(data, cuts) for message in receive(connection, chunk)]
    assert received == [HELLO, *sent]
    assert connection._frames.empty


def test_the_first_word_comes_alone_and_its_receiver_names_what_may_follow():
    connection = manager()
    ask = m.Ask("status")
    assert connection.receive(frame(HELLO) + frame(ask)) == [HELLO]
    connection.expect(m.FromClient)
    assert connection.receive(b"") == [ask]
    assert connection.receive(b"") == []


@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_garbage_fails_for_ever_or_is_still_incomplete(garbage, opened):
    connection = manager()
    if opened:
        receive(connection, frame(HELLO))
    try:
        received = receive(connection, garbage)
    except ProtocolError:
        assert connection.state is State.FAILED
        with pytest.raises(ProtocolError, match="already failed"):
            connection.receive(frame(HELLO))
    else:
        assert all(isinstance(message, msgspec.Struct) for message in received)


@pytest.mark.parametrize(
    "data",
    [frame(UPDATE), frame(m.Welcome(1, "q", 1.0)), b"\0\0\0\0", b"\0\0\0\1\xc1", frame(m.Run([], [], []))],
    ids=["pilot's later word", "manager's word", "empty", "no msgpack", "order"],
)
def test_a_wrong_first_word_fails(data):
    connection = manager()
    with pytest.raises(ProtocolError, match=f"not a message of protocol {m.PROTOCOL_VERSION}"):
        connection.receive(data)
    assert connection.state is State.FAILED


@pytest.mark.parametrize("data", [frame(HELLO), frame(m.Run([], [], [])), frame(m.Leave("", False))])
def test_a_word_of_the_other_direction_fails(data):
    connection = manager()
    connection.receive(frame(HELLO))
    with pytest.raises(ProtocolError):
        connection.receive(data)


def test_a_stranger_cannot_make_us_buffer():
    connection = manager()
    with pytest.raises(ProtocolError, match=f"over the limit of {OPENING_LIMIT}"):
        connection.receive((OPENING_LIMIT + 1).to_bytes(4, "big"))


def test_large_frames_pass_once_it_is_known_who_speaks():
    large = m.Update([], [m.TaskResult(1, "success", b"x" * (OPENING_LIMIT * 2))])
    connection = manager()
    assert receive(connection, frame(HELLO) + frame(large)) == [HELLO, large]


def test_announcing_a_large_frame_costs_no_memory():
    reader = FrameReader(FRAME_LIMIT)
    assert reader.feed(FRAME_LIMIT.to_bytes(4, "big") + b"x") == []
    assert not reader.empty
    assert len(reader._large) == 1


def test_a_frame_over_the_limit_fails_at_its_length():
    connection = manager()
    connection.receive(frame(HELLO))
    with pytest.raises(ProtocolError, match=f"over the limit of {FRAME_LIMIT}"):
        connection.receive((FRAME_LIMIT + 1).to_bytes(4, "big"))


def test_a_message_over_the_limit_is_not_sent(monkeypatch):
    monkeypatch.setattr("hpcq.protocol.FRAME_LIMIT", 1000)
    with pytest.raises(ProtocolError, match=r"a Goodbye message of 10\d\d bytes is over the limit of 1000"):
        frame(m.Goodbye("x" * 1001))


def test_fields_are_checked_on_receipt():
    connection = manager()
    hello = m.PilotHello(
        m.PROTOCOL_VERSION, "p", "", "", 0, "h", 1, 0, 0, 0.0, "none", "", m.Versions("3", "3", "0", "0")
    )
    with pytest.raises(ProtocolError, match=r"Expected `int` >= 1"):  # a pilot without cores
        connection.receive(frame(hello))


@given(st.integers(1, 40), st.lists(st.integers(0), max_size=8))
def test_large_frames_are_gathered_whatever_the_chunks(pieces, cuts):
    connection = manager()
    connection.receive(frame(HELLO))
    large = m.Update([], [m.TaskResult(n, "success", bytes([n]) * (LARGE_FRAME // 20 * pieces)) for n in (1, 2)])
    data = frame(large) + frame(m.Heartbeat()) + frame(large)
    assert [message for chunk in chunks(data, cuts) for message in receive(connection, bytes(chunk))] == [
        large,
        m.Heartbeat(),
        large,
    ]
    assert connection._frames.empty


def test_a_first_word_of_another_version_is_told_so():
    connection = manager()
    old = b"\x93\xa9PilotHello\x63\xa1x"  # a name and a number, then what we do not know
    with pytest.raises(ProtocolError, match="not a message"):
        connection.receive(len(old).to_bytes(4, "big") + old)
    body = msgspec.msgpack.encode(["PilotHello", 99, "whatever came later"])
    with pytest.raises(ProtocolError, match="speaks protocol 99"):
        manager().receive(len(body).to_bytes(4, "big") + body)


@given(st.lists(st.binary(max_size=20), max_size=8), st.lists(st.integers(0), max_size=8))
def test_frames_hold_at_most_one_unfinished(bodies, cuts):
    reader = FrameReader(20)
    data = b"".join(len(body).to_bytes(4, "big") + body for body in bodies)
    assert [body for chunk in chunks(data, cuts) for body in reader.feed(chunk)] == bodies
    assert reader.empty
