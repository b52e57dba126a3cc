"""Paths, names and private files."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq import state_dir
from hpcq.errors import StateError, UsageError
from hpcq.state_dir import write_private


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "hpcq"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_paths(root):
    assert state_dir.connection_file("q") == root / "q" / "connection.json"
    assert state_dir.jobs_dir("q") == root / "q" / "jobs"
    assert not root.exists()


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_home_when_the_variable_is_not_usable(monkeypatch, value):
    monkeypatch.setenv("XDG_STATE_HOME", value)
    monkeypatch.setenv("HOME", "/home/u")
    assert state_dir.state_root() == Path("/home/u/.local/state/hpcq")


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a b", "é", "a\n", "x" * 65, "$x", "\x00"])
def test_names_that_no_queue_may_have(name):
    with pytest.raises(UsageError, match="queue name"):
        state_dir.queue_dir(name)


@given(st.text())
def test_a_queue_never_leaves_the_root(name):
    try:
        path = state_dir.queue_dir(name)
    except UsageError:
        return
    assert path.parent == state_dir.state_root()
    assert path.name == name


def test_known_queues(root):
    assert state_dir.known_queues() == []
    state_dir.ensure_queue_dir("b")
    state_dir.ensure_queue_dir("a")
    (root / "file").touch()
    (root / ".hidden").mkdir()
    assert state_dir.known_queues() == ["a", "b"]


def test_directories_are_private(root):
    assert mode(state_dir.ensure_jobs_dir("q")) == 0o700
    assert mode(root) == mode(root / "q") == 0o700
    (root / "q").chmod(0o755)
    state_dir.ensure_jobs_dir("q")
    assert mode(root / "q") == 0o700


def test_a_place_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="HPCQ_STATE_DIR"):
        state_dir.ensure_queue_dir("q")


def test_write_private_replaces_whole_and_leaves_nothing(tmp_path):
    path = tmp_path / "x"
    state_dir.write_private(path, b"one")
    state_dir.write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert mode(path) == 0o600
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "y").touch()
    with pytest.raises(OSError, match="directory"):
        state_dir.write_private(tmp_path / "d", b"three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "x"]


def test_the_first_of_several_writers_wins(tmp_path):
    path = tmp_path / "x"
    write_private(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_private(path, b"second", replace=False)
    assert [(one.name, one.read_bytes(), one.stat().st_mode & 0o777) for one in tmp_path.iterdir()] == [
        ("x", b"first", 0o600)
    ]


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    test_the_first_of_several_writers_wins(tmp_path)


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError) as caught:
        write_private(tmp_path / "x", b"data")
    words = f"cannot write {tmp_path}/x: No space left on device; make room, or set HPCQ_STATE_DIR to another place"
    assert str(caught.value) == words
    assert list(tmp_path.iterdir()) == []


def test_write_private_says_where_it_cannot_even_begin(tmp_path):
    with pytest.raises(StateError, match=r"cannot write .*/gone/f: No such file"):
        write_private(tmp_path / "gone" / "f", b"x")


@pytest.fixture
def elsewhere(root, tmp_path, monkeypatch):
    """A directory of the user's; what a test says of it is forgotten at its end."""
    monkeypatch.setattr(state_dir, "_used", None)
    monkeypatch.setattr(state_dir, "_placed", {})
    monkeypatch.setattr(state_dir, "_open", set())
    monkeypatch.delenv("HPCQ_STATE_DIR", raising=False)
    return tmp_path / "elsewhere"


def test_the_variable_and_the_flag_say_where(root, elsewhere, monkeypatch):
    monkeypatch.setenv("HPCQ_STATE_DIR", "~/by-variable")
    monkeypatch.setenv("HOME", "/home/u")
    assert state_dir.queue_dir("q") == Path("/home/u/by-variable/q")
    state_dir.use(elsewhere)
    assert state_dir.queue_dir("q") == elsewhere / "q"
    state_dir.use(None)
    monkeypatch.delenv("HPCQ_STATE_DIR")
    assert state_dir.queue_dir("q") == root / "q"


@pytest.mark.parametrize("bad", ["", 5, b"/bytes", "~no-such-user-here/x"])
def test_what_is_no_directory_for_state(bad):
    with pytest.raises(UsageError, match="state directory"):
        state_dir.absolute(bad)


def test_a_queue_of_this_process_is_found_where_it_was_put(root, elsewhere):
    state_dir.place("q", elsewhere)
    assert state_dir.jobs_dir("q") == elsewhere / "q" / "jobs"
    assert state_dir.queue_dir("other") == root / "other"
    with pytest.raises(UsageError, match=f"serves a queue 'q' already, in {elsewhere}/q"):
        state_dir.place("q", None)
    state_dir.leave("q")
    assert state_dir.queue_dir("q") == elsewhere / "q"  # its jobs may still be asked about
    state_dir.place("q", None)
    assert state_dir.queue_dir("q") == root / "q"


def test_only_the_queues_own_directory_is_made_private(root, elsewhere):
    elsewhere.mkdir()
    elsewhere.chmod(0o755)
    assert mode(state_dir.ensure_queue_dir("q", elsewhere)) == 0o700
    assert mode(elsewhere) == 0o755
    state_dir.ensure_queue_dir("q")
    assert mode(root) == 0o700


def test_somebody_elses_directory_is_refused(root, elsewhere, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: elsewhere.parent.stat().st_uid + 1)
    with pytest.raises(UsageError, match=f"{elsewhere}/q belongs to another user"):
        state_dir.ensure_queue_dir("q", elsewhere)
