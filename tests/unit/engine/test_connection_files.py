"""Identities and connection files: private, whole, ours, or refused with a reason. No sockets."""

import datetime
import os
import ssl

import msgspec
import pytest

import hpcq
from hpcq import connection, state_dir
from hpcq.errors import ConnectionFileError, UsageError
from hpcq.identity import make_identity
from hpcq.lock import QueueLock


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "hpcq"


@pytest.fixture
def path(state):
    return connection.create("q")


def mode(path):
    return path.stat().st_mode & 0o777


def test_files_and_directories_are_private(path, state):
    assert [mode(p) for p in (path, state / "q" / "identity.json")] == [0o600] * 2
    assert [mode(p) for p in (state, state / "q")] == [0o700] * 2


def test_what_is_written_is_read(path):
    info = msgspec.structs.replace(connection.read(path), addresses=["10.0.0.1"], port=1234)
    assert connection.write(info) == path
    assert connection.read(path) == connection.find("q") == info


def test_no_temporary_file_is_left(path, state):
    assert {p.name for p in (state / "q").iterdir()} == {"connection.json", "identity.json"}


@pytest.mark.parametrize("bits", [0o644, 0o640, 0o604, 0o666])
def test_a_file_others_can_read_is_refused(path, bits):
    path.chmod(bits)
    with pytest.raises(ConnectionFileError, match="readable by others; its keys must be made anew: remove it"):
        connection.read(path)


def test_a_file_of_another_user_is_refused(path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConnectionFileError, match="belongs to another user"):
        connection.read(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"queue": 5}', b"\xff\xfe", b"null"])
def test_a_damaged_file_is_refused(path, content):
    state_dir.write_private(path, content)
    with pytest.raises(ConnectionFileError, match=r"connection\.json is damaged"):
        connection.read(path)


def test_a_missing_file_is_no_queue(state):
    with pytest.raises(hpcq.QueueNotFoundError, match="no program with that queue is running"):
        connection.read(state / "q" / "connection.json")
    with pytest.raises(hpcq.QueueNotFoundError, match="no queue is running here"):
        connection.find("q")


def test_an_unknown_queue_is_told_the_known_ones(path):
    with pytest.raises(hpcq.QueueNotFoundError, match="no queue named 'other'; the queues here are: q"):
        connection.find("other")


def test_a_directory_in_its_place_is_an_error_in_words(path):
    path.unlink()
    path.mkdir()
    with pytest.raises(ConnectionFileError, match="cannot read"):
        connection.read(path)


def test_a_queue_that_is_prepared_only_is_told_so(path):
    with pytest.raises(hpcq.QueueNotFoundError, match="no program has been started for it yet"):
        connection.find("q")


def test_the_identity_outlives_the_program_and_is_renewed_in_time(state):
    first = connection.own_identity("q")
    assert connection.own_identity("q") == first
    old = make_identity("q", datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=330))
    state_dir.write_private(state / "q" / "identity.json", msgspec.json.encode(old))
    assert connection.own_identity("q").expires > old.expires


def test_an_identity_others_could_read_is_made_anew(state):
    first = connection.own_identity("q")
    (state / "q" / "identity.json").chmod(0o644)
    assert connection.own_identity("q") != first
    assert mode(state / "q" / "identity.json") == 0o600


def test_no_key_is_printed(path):
    info = connection.read(path)
    assert "PRIVATE" in info.pilot.key
    assert "PRIVATE" not in repr(info)
    assert "PRIVATE" not in repr(connection.own_identity("q"))


def test_the_managers_key_is_not_in_the_connection_file(path):
    assert connection.own_identity("q").manager.key not in path.read_text()


def handshake(server, client):
    """Both sides in memory; raises what either raises."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=connection.MANAGER_NAME),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


def sides(queue="q"):
    identity = make_identity(queue)
    info = connection.ConnectionInfo(queue, 1, [], 1, "", 1, identity.authority, identity.pilot)
    return identity, info


def test_the_two_sides_of_one_queue_know_each_other():
    identity, info = sides()
    handshake(connection.manager_tls(identity), connection.pilot_tls(info))


def test_a_pilot_of_another_queue_does_not_accept_the_manager():
    identity, _ = sides()
    _, other = sides()
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(connection.manager_tls(identity), connection.pilot_tls(other))


def test_a_manager_does_not_accept_a_foreign_pilot():
    identity, info = sides()
    _, other = sides()
    with pytest.raises(ssl.SSLError):
        handshake(
            connection.manager_tls(identity), connection.pilot_tls(msgspec.structs.replace(info, pilot=other.pilot))
        )


@pytest.mark.parametrize("pretends", ["manager", "pilot"])
def test_a_key_is_good_for_its_own_role_only(pretends):
    identity, info = sides()
    if pretends == "manager":
        identity = msgspec.structs.replace(identity, manager=identity.pilot)
    else:
        info = msgspec.structs.replace(info, pilot=identity.manager)
    with pytest.raises(ssl.SSLError):
        handshake(connection.manager_tls(identity), connection.pilot_tls(info))


def test_the_lock_is_held_by_one_and_names_the_holder(state):
    path = state_dir.ensure_queue_dir("q") / "lock"
    first, second = QueueLock(path), QueueLock(path)
    first.take("q")
    with pytest.raises(UsageError, match=f"already served by process {os.getpid()} on "):
        second.take("q")
    first.release()
    first.release()
    second.take("q")
    second.release()


def test_of_two_that_make_a_queue_at_once_the_first_counts(state, monkeypatch):
    def interrupted(name, now):
        monkeypatch.undo()
        monkeypatch.setenv("XDG_STATE_HOME", str(state.parent))
        connection.create(name)  # the other one, from beginning to end
        return make_identity(name, now)

    monkeypatch.setattr("hpcq.identity.make_identity", interrupted)
    info = connection.read(connection.create("q"))
    assert info.authority == connection.own_identity("q").authority


def test_a_queue_that_is_made_again_keeps_what_its_program_has_written(path, monkeypatch):
    info = msgspec.structs.replace(connection.read(path), addresses=["192.0.2.1"], port=1234)
    path.unlink()
    own = connection.own_identity
    monkeypatch.setattr(connection, "own_identity", lambda name: connection.write(info) and own(name))
    assert connection.read(connection.create("q")) == info
