"""Which gateway is meant by a name or by HOST:PORT, and the packets of one that is asked from another host."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import GatewayError, UsageError
from vpn.gateway import control, remote, state
from vpn.gateway.choice import gateway_names
from vpn.gateway.reference import check_reference, name_of, place_of
from vpn.gateway.state import Record


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Two gateways: one of this host, one of another."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    here = Record("mine", socket.gethostname(), "b", 1, 1, ["192.0.2.1", "2001:db8::1"], 4443, "p", "c", 4444)
    there = Record("theirs", "login2.example.org", "b", 1, 1, ["192.0.2.2"], 4443, "p", "c", 4445)
    for record in (here, there):
        state.write_record(state.make_directory(record.name), record)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a", None),
        ("login1:443", ("login1", 443)),
        ("192.0.2.1:4443", ("192.0.2.1", 4443)),
        ("[2001:db8::1]:1", ("2001:db8::1", 1)),
    ],
)
def test_names_and_places(text, place):
    assert place_of(text) == place
    assert check_reference(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "a b", "-x:1", ":1", "a:", "a:0", "a:65536", "a:x", "2001:db8::1:443", "a:1:2", "[a]:1", "a/b:1", "a:\u0661"],
)
def test_what_is_neither_a_name_nor_a_place(text):
    with pytest.raises(UsageError):
        check_reference(text)


def test_names_and_places_in_one_list():
    assert gateway_names("a, login1:4443,[2001:db8::1]:1") == ("a", "login1:4443", "[2001:db8::1]:1")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mine", "mine"),
        ("unknown", "unknown"),
        (f"{socket.gethostname()}:4443", "mine"),
        ("192.0.2.1:4443", "mine"),
        ("192.0.2.1:4444", "mine"),
        ("[2001:DB8:0::1]:4444", "mine"),
        ("localhost:4443", "mine"),
        ("LOGIN2:4445", "theirs"),
        ("login2.example.org:4443", "theirs"),
        ("alias.example.org:4445", "theirs"),
    ],
)
def test_a_place_is_looked_up_among_ones_own(records, text, name):
    known = {"alias.example.org": ["192.0.2.2"], "localhost": ["127.0.0.1"], "2001:DB8:0::1": ["2001:db8::1"]}
    assert name_of(text, lambda host: known.get(host, [])) == name


@pytest.mark.parametrize("text", ["192.0.2.1:4445", "login3:4443", "localhost:4445", "192.0.2.1:22"])
def test_a_place_where_no_gateway_of_ones_own_listens(records, text):
    known = {"login3": ["192.0.2.3"], "localhost": ["127.0.0.1"]}
    with pytest.raises(GatewayError, match=f"no gateway of yours listens at {text} .there are mine at .*:4444"):
        name_of(text, lambda host: known.get(host, []))


def test_no_gateway_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(GatewayError, match=r"\(there is none\); start one on login1 with .* --port 4443"):
        name_of("login1:4443")


@given(st.lists(st.binary(max_size=300)), st.binary(max_size=3))
def test_packets_in_a_stream(packets, beginning):
    stream, found = b"".join(map(remote.give_packet, packets)) + beginning, []
    while (taken := remote.take_packet(stream)) is not None:
        found.append(taken[0])
        stream = stream[taken[1] :]
    assert (found, stream) == (packets, beginning)


def test_a_packet_that_is_too_long_is_refused_before_it_has_come():
    with pytest.raises(ValueError, match="a packet of"):
        remote.take_packet((control.PACKET_LIMIT + 1).to_bytes(4, "big"))


def test_who_knows_the_key_is_the_owner_and_the_key_stays(tmp_path):
    first = remote.Remote(tmp_path)
    path = tmp_path / remote.KEY_NAME
    key = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    again = remote.open_remote(tmp_path)
    for side in (first, again):
        assert side.admits(remote.USER, key)
        assert not side.admits(remote.USER, key[:-1])
        assert not side.admits(remote.USER, b"")
        assert not side.admits("pilot", key)


def test_without_a_key_the_gateway_is_of_its_host_only(tmp_path, caplog):
    assert remote.open_remote(tmp_path / "absent") is None
    assert "can be asked on this host only" in caplog.text
    record = Record("g", "login2", "b", 1, 1, ["192.0.2.2"], 1, "p", "c", 2)
    with pytest.raises(GatewayError, match="gateway 'g' on login2 can be asked on login2 only"):
        remote.connect(tmp_path, record, record.addresses, 1.0)
