"""The directory that tasks of one interpreter share: always empty for the next, looked through only when it changed."""

import os
import time
from pathlib import Path

import pytest

from hpcq.pilot import runner as module
from hpcq.pilot.runner import Runner


@pytest.fixture
def home(tmp_path):
    (tmp_path / "home").mkdir(0o700)
    return tmp_path / "home"


@pytest.fixture
def runner(home, tmp_path, monkeypatch):
    """One that has a home and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "end_children", lambda: False)
    runner = Runner.__new__(Runner)
    runner._home, runner._empty_since = str(home), 0
    return runner


@pytest.fixture
def listed(monkeypatch):
    """The directories that were listed."""
    found = []
    list_directory = os.listdir

    def noted(path):
        found.append(path)
        return list_directory(path)

    monkeypatch.setattr(os, "listdir", noted)
    return found


@pytest.fixture
def later(monkeypatch):
    """Whatever has a time of change has had it for long."""
    then = time.time_ns() + 2 * module.SETTLED_NS
    monkeypatch.setattr(module.time, "time_ns", lambda: then)


def changed(home):
    """Wait until its time of change is another one, as it is when it was old before: its clock may be coarse."""
    before = home.stat().st_ctime_ns
    while home.stat().st_ctime_ns == before:
        (home / "for-a-moment").touch()
        (home / "for-a-moment").unlink()


def test_what_a_task_leaves_is_removed_each_time(runner, home, later):
    for name in ("a", "b", "c"):
        runner._clean_up()
        (home / name).write_bytes(b"x" * 10_000)
        (home / f"{name}-directory" / "deep").mkdir(parents=True)
        changed(home)
        runner._clean_up()
        assert not list(home.iterdir())
        assert runner._disk >= 10_000


def test_a_directory_that_has_not_changed_is_not_listed_again(runner, home, later, listed):
    for _ in range(5):
        runner._clean_up()
    assert len(listed) == 1
    changed(home)
    runner._clean_up()
    assert len(listed) == 2


def test_a_new_time_of_change_proves_nothing(runner, home, listed, monkeypatch):
    monkeypatch.setattr(module.time, "time_ns", lambda: home.stat().st_ctime_ns + module.SETTLED_NS)
    for _ in range(5):
        runner._clean_up()
    assert len(listed) == 5


def test_a_home_that_nobody_may_write_to_is_made_writable(runner, home, later):
    runner._clean_up()
    (home / "left").touch()
    home.chmod(0o500)
    runner._clean_up()
    assert not list(home.iterdir())
    assert home.stat().st_mode & 0o7777 == 0o700


def test_what_cannot_be_removed_keeps_nothing_else(runner, home, later, monkeypatch):
    def refused(path):
        if path.endswith("/b"):
            raise PermissionError(path)
        Path(path).unlink()

    for name in ("a", "b", "c"):
        (home / name).touch()
    monkeypatch.setattr(module, "remove", lambda path: refused(path) or 0)
    runner._clean_up()
    assert [left.name for left in home.iterdir()] == ["b"]


def test_a_home_that_was_removed_is_made_again(runner, home, later):
    runner._clean_up()
    home.rmdir()
    runner._clean_up()
    assert Path.cwd() == home
