"""Starting a program, where that fails: it is said, and nothing is left open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vpn import spawn
from vpn.messages import Spawn


def request(argv=(b"/bin/true",), env=None):
    return Spawn(1, list(argv), env or {}, b"/", [])


def test_at_the_limit_of_processes_nothing_stays_open(monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BlockingIOError):
        spawn.spawn(request(), {})
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("bad", [request([b"/bin/true", b"a\0b"]), request(env={b"a=b": b"c"})])
def test_what_no_program_can_be_given_is_an_error(bad):
    with pytest.raises(OSError, match="Invalid argument"):
        spawn.spawn(bad, {})
