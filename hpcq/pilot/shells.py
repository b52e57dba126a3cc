"""A shell that is ready: started once, and forked for each command instead of being started for each.

The start of a shell, its libraries mapped and relocated, takes several times longer than all that a short command does.
So one is started with ``preload/ready_shell.c`` in it, which stops it before its own first step; for each command it
makes a copy of itself there, a child of *ours*, which goes on as ``sh -c COMMAND``. Where this cannot be done (no such
library, another C library, a static shell, a kernel without what it takes) there is none, and commands start shells of
their own, which do the same more slowly. The shell leads a process group in which its commands are, so that ``kill 0``,
which scripts end with, ends the shell too and not us. May not live here: what becomes of a command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1] / "preload" / "ready_shell.so"

DEFAULTS = (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ)
"""Signals that Python, or we, ignore and a command should not."""

REQUEST_LIMIT = 96 * 1024
"""Bytes of a request: what certainly fits into a socket's buffer. A longer command starts a shell of its own."""

SHOWN = 256
"""Bytes of a command that listings of processes show."""

_AT_START = (b"LD_", b"GLIBC_", b"MALLOC_")
"""Variables that a program heeds before it is ready: with these a command needs a shell of its own."""

_NOT_HERE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})
"""What a kernel says, or a container, that does not let a child be its parent's sibling."""

_ANSWER = struct.Struct("=i")


class ReadyShell:
    """The shell, as its parent holds it. It is started when it is first needed, and again when it was killed."""

    def __init__(self, environment: Mapping[bytes, bytes]) -> None:
        self._environment = environment
        self._pid = 0
        self._channel: socket.socket | None = None
        self._usable = LIBRARY.is_file() and not any(blank in str(LIBRARY) for blank in ": ")
        self._children = -1
        self._alone = b""
        if self._usable:
            self._start()

    def spawn(self, directory: str, command: bytes, changes: Mapping[bytes, bytes]) -> int:
        """Have a shell begin with the command there, in our environment with these changes; returns its number, which
        is that of a child of ours, or 0: start one in the usual way.

        Raises:
            OSError: there is no such directory, or no process can be made.
        """
        if not self._usable or any(name.startswith(_AT_START) for name in changes):
            return 0
        request = b"".join((
            os.fsencode(directory), b"\0", command, b"\0", *(b"%s=%s\0" % change for change in changes.items())
        ))  # fmt: skip
        if len(request) > REQUEST_LIMIT:
            return 0
        if self._channel is None and not self._start():
            return 0
        answer = self._ask(request)
        if answer is None:
            return self._killed()
        if -answer in _NOT_HERE:
            self._usable = False
            self.stop()
            return 0
        if answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return answer

    def is_alone(self) -> bool:
        """Whether it runs and is our only child."""
        return self._channel is not None and os.pread(self._children, 64, 0) == self._alone

    def stop(self) -> float:
        """End it; returns the CPU seconds it had."""
        if self._channel is None:
            return 0.0
        self._channel.close()
        self._channel = None
        os.kill(self._pid, signal.SIGKILL)
        used = os.wait4(self._pid, 0)[2]
        return used.ru_utime + used.ru_stime

    def _start(self) -> bool:
        try:
            if self._children < 0:
                self._children = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
            self._usable = not os.pread(self._children, 1, 0) and self._begin()
        except OSError:
            self._usable = False
            with contextlib.suppress(OSError):
                self.stop()
        return self._usable

    def _begin(self) -> bool:
        """Start the shell and hear that it is ready. Without the library it has nothing to do, and ends."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            place = theirs.fileno() + 1
            preload = os.fsencode(LIBRARY)
            if self._environment.get(b"LD_PRELOAD"):
                preload += b":" + self._environment[b"LD_PRELOAD"]
            environment = {**self._environment, b"LD_PRELOAD": preload, b"HPCQ_READY_SHELL": b"%d" % place}
            self._pid = os.posix_spawn(
                "/bin/sh", [b"sh", b"-c", b" " * SHOWN], environment, setsigdef=DEFAULTS, setpgroup=0,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), place)],
            )  # fmt: skip
        self._channel = ours
        if ours.recv(_ANSWER.size) != _ANSWER.pack(0):
            self.stop()
            return False
        self._alone = os.pread(self._children, 64, 0)
        return self._works()

    def _works(self) -> bool:
        """Have it do nothing once: whether that is a child of ours, and ends as it should."""
        child = self._ask(b"/\0:\0") or -1
        if child > 0 and os.wait4(child, 0)[1] == 0:
            return True
        self.stop()
        return False

    def _ask(self, request: bytes) -> int | None:
        """Its answer; None when it has been killed."""
        assert self._channel is not None
        try:
            self._channel.send(request)
            answer = self._channel.recv(_ANSWER.size)
        except OSError:
            return None
        return int(_ANSWER.unpack(answer)[0]) if answer else None

    def _killed(self) -> int:
        """It was killed before it answered, for want of memory say, or by the command itself: `kill 0` may be quicker
        than the answer. The command that had begun then is our second child, and those it left behind come after it.
        """
        children = [int(number) for number in os.pread(self._children, 4096, 0).split()]  # it too, until `stop`
        self.stop()
        return next((number for number in children if number != self._pid), 0)
