"""Pilots at a VPN server of the user's own: how it is asked for, where the password is, and where it is not."""

from __future__ import annotations

import io
import os
import stat

import pytest

from hpcq import servers, state_dir
from hpcq.batch.request import pilot_request
from hpcq.cli.main import run
from hpcq.credentials import GatewayCredentials
from hpcq.errors import UsageError
from hpcq.pilot.options import parse
from vpn import Credential, Login
from vpn import UsageError as VpnUsageError

PIN = "pin-sha256:" + "A" * 43 + "="
GIVEN = {"vpn": "openconnect", "server": "vpn.example.org", "user": "alice", "servercert": PIN}
NAME = "server:alice@vpn.example.org:443"
PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def password_file(directory, text=PASSWORD, mode=0o600):
    file = directory / "password"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def kept():
    """Everything in the queue's directory, by content."""
    root = state_dir.queue_dir("q")
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} if root.exists() else {}


@pytest.mark.parametrize(
    ("server", "name"),
    [
        ("vpn.example.org", NAME),
        ("192.0.2.1:4443", "server:alice@192.0.2.1:4443"),
        ("[2001:db8::1]:4443", "server:alice@[2001:db8::1]:4443"),
    ],
)
def test_a_pilot_is_told_where_and_who_and_no_secret(state, server, name):
    file = password_file(state)
    argv = list(pilot_request("q", "local", 1, GIVEN | {"server": server, "password_file": file}).pilot_argv)
    assert PASSWORD not in " ".join(argv)
    assert file not in argv
    told = parse(argv[argv.index("hpcq.pilot") + 1 :])
    assert (told.vpn, told.gateway) == ("openconnect", name)
    assert servers.gateways_of(told.gateway) == (name,)
    assert not kept()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vpn": "relay"}, "--server means nothing in mode relay"),
        ({"vpn": None}, "--server means nothing in mode none"),
        ({"servercert": None}, "--server needs --servercert"),
        ({"user": None}, "and --user, or"),
        ({"servercert": "sha1:x"}, "'sha1:x' is not a pin"),
        ({"server": "a b"}, "is not a host name"),
        ({"server": "h:0"}, "0 is not a port"),
        ({"server": 7}, "--server must be a text"),
        ({"user": "a\nb"}, "cannot be a user name"),
        ({"gateway": "default"}, "--gateway and --server exclude each other"),
        ({"server": None}, "--user is for --server, which is missing"),
        ({"sslkey": "/k.pem"}, "--sslkey is the key of --certificate"),
    ],
)
def test_what_is_missing_or_cannot_be(changes, words):
    with pytest.raises(UsageError, match=words):
        pilot_request("q", "local", 1, GIVEN | changes, flags=True)


def test_the_password_is_in_one_private_file_and_comes_back(state):
    servers.keep("q", GIVEN | {"password_file": password_file(state, PASSWORD + "\r\nmore")})
    (path,) = kept()
    assert PASSWORD.encode() in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    username, data = GatewayCredentials("q").issue(NAME, "p1", 30)
    found = Credential.from_bytes(data)
    assert (username, found.username, found.password.reveal()) == ("alice", "alice", PASSWORD)
    assert (found.addresses, found.port, found.relay_port) == (("vpn.example.org",), 443, 0)
    GatewayCredentials("q").revoke(NAME, "alice")  # the user's own password: it stays
    assert GatewayCredentials("q").issue(NAME, "p2", 30) == (username, data)
    servers.keep("q", GIVEN)  # as when the queue's program submits more
    servers.keep("q", GIVEN | {"user": "bob"}, lambda: "other")
    assert len(kept()) == 2


def test_a_certificate_needs_no_password(state):
    given = {name: value for name, value in GIVEN.items() if name != "user"}
    files = {"certificate": str(state / "c.pem"), "sslkey": str(state / "k.pem")}
    servers.keep("q", given | files)
    found = Credential.from_bytes(GatewayCredentials("q").issue("server:@vpn.example.org:443", "p", 30)[1])
    assert found.login == Login(False, files["certificate"], files["sslkey"])
    assert (found.username, found.password.reveal()) == ("", "")


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [(PASSWORD, 0o640, "can be read by others"), ("", 0o600, "is empty"), (None, 0, "No such file")],
)
def test_a_password_file_that_is_of_no_use(state, text, mode, words):
    file = str(state / "none") if text is None else password_file(state, text, mode)
    with pytest.raises(UsageError, match=words) as caught:
        servers.keep("q", GIVEN | {"password_file": file})
    assert PASSWORD not in str(caught.value)
    assert not kept()


def test_without_a_password(state):
    with pytest.raises(UsageError, match="password_file is missing"):
        servers.keep("q", GIVEN)
    with pytest.raises(VpnUsageError, match="no password is kept for server:alice@vpn"):
        GatewayCredentials("q").issue(NAME, "p", 30)


def typed(monkeypatch, capsys, given, *more):
    """What `hpcq submit-pilots` says and prints with this on its standard input."""
    read, write = os.pipe()
    os.write(write, given)
    os.close(write)
    saved = os.dup(0)
    os.dup2(read, 0)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    try:
        server = ["--vpn", "openconnect", "--server", "vpn.example.org", "--user", "alice", "--servercert", PIN]
        status = run(["submit-pilots", "--name", "q", "--create", *server, *more])
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(read)
    return status, capsys.readouterr()


def test_the_command_line_asks_for_it_where_it_is_needed(monkeypatch, capsys, state):
    def refuse(*_):
        raise UsageError("far enough")

    status, said = typed(monkeypatch, capsys, b"", "--dry-run")
    assert status == 0
    assert f"--gateway {NAME}" in said.out
    assert not kept()
    monkeypatch.setattr("hpcq.batch.local.LocalBatch.submit", refuse)
    status, said = typed(monkeypatch, capsys, PASSWORD.encode() + b"\nnot ours\n")
    assert (status, said.err) == (2, "hpcq: far enough\n")
    assert [path.parent.name for path, data in kept().items() if PASSWORD.encode() in data] == ["servers"]
