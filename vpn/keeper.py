"""The keeper: a process of its own that starts programs, reaps them, and ends them all when its client goes.

Runs as ``python -c … vpn.keeper FD PARENT``. It has no threads, so forking is safe whatever the client's
threads do. States: *starting* → ``Ready`` sent → *serving* → the socket ends (or SIGTERM, the death signal of
the client) → every descendant is killed → exit. It adopts orphans, so a program that forked twice is found
and ended as well. Killed itself by SIGKILL, its children die by their own death signals.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vpn import kernel
from vpn.channel import Packet, keeper_channel
from vpn.errors import Layer, TunnelError
from vpn.messages import Done, Exited, Failed, Kill, Message, Ready, Request, Spawn
from vpn.spawn import leave_terminal_alone, raise_file_limit, spawn


class Keeper:
    """The loop: requests in, reports out, children reaped."""

    def __init__(self, sock: socket.socket) -> None:
        sock.set_inheritable(False)
        sock.setblocking(True)
        self.channel = keeper_channel(sock)
        self.children: dict[int, int] = {}  # pid → id of the request that started it
        self.selector = selectors.DefaultSelector()
        self.serving = True
        self.handlers: dict[type[Any], Callable[[Any, list[int]], None]] = {
            Spawn: self.on_spawn,
            Kill: self.on_kill,
        }

    def run(self, notes: list[str]) -> None:
        """Serve until the client is gone."""
        wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self.selector.register(self.channel.sock, selectors.EVENT_READ, self.on_packet)
        self.selector.register(wake, selectors.EVENT_READ, lambda: self.on_child(wake))
        self.report(Ready(notes))
        self.started()
        while self.serving:
            for key, _ in self.selector.select():
                key.data()

    def started(self) -> None:
        """For a subclass: what can be done while the client is busy with something else."""

    def report(self, message: Message, fds: tuple[int, ...] = (), pid: int = 0) -> None:
        """Tell the client; a client that is gone ends the loop."""
        try:
            self.channel.send(message, fds, pid)
        except OSError:
            self.serving = False

    def on_packet(self) -> None:
        """Take one request and answer it."""
        try:
            packet = self.channel.receive()
        except ConnectionError:
            packet = None
        if packet is None:
            self.serving = False
            return
        try:
            self.dispatch(packet)
        finally:
            for fd in packet.fds:
                os.close(fd)

    def dispatch(self, packet: Packet[Request]) -> None:
        """Perform a request; what it raises becomes a ``Failed``."""
        message = packet.message
        try:
            handler = self.handlers.get(type(message))
            if handler is None:
                raise TunnelError("tunnel", f"this keeper has no {type(message).__name__}")
            handler(message, packet.fds)
        except TunnelError as error:
            self.report(Failed(message.id, error.layer, error.message))
        except OSError as error:
            where = f"{error.filename!r}: " if error.filename else ""
            self.report(Failed(message.id, "tunnel", f"{where}{error.strerror}", error.errno or 0))
        except Exception as error:
            self.report(Failed(message.id, "tunnel", f"{type(message).__name__}: {error!r}"))

    def on_spawn(self, message: Spawn, fds: list[int]) -> None:
        """Start a program."""
        if len(fds) != len(message.targets):
            raise TunnelError("tunnel", "descriptors were lost on the way (limit of open files)")
        pid = spawn(message, dict(zip(message.targets, fds, strict=True)))
        self.children[pid] = message.id
        self.report_started(message.id, pid)

    def report_started(self, request: int, pid: int) -> None:
        """Tell the client a pid; outside a pid namespace ours is the client's too."""
        self.report(Done(request, pid=pid))

    def on_kill(self, message: Kill, _fds: list[int]) -> None:
        """Signal a child that has not been reaped: its pid cannot be another process's."""
        for pid, request in self.children.items():
            if request == message.id:
                with suppress(ProcessLookupError, PermissionError):  # a group that is none; a set-uid program
                    (os.killpg if message.group else os.kill)(pid, message.signal)

    def on_child(self, wake: int) -> None:
        """Reap everything that ended."""
        with suppress(BlockingIOError):
            os.read(wake, 4096)
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            request = self.children.pop(pid, None)
            if request is not None:
                cpu, rss = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024
                self.report(Exited(request, os.waitstatus_to_exitcode(status), cpu, rss))


def kill_descendants() -> None:
    """Kill children until there are none; those of a killed child become ours and are next."""
    while True:
        for pid in direct_children():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def direct_children() -> list[int]:
    """Pids of this process's children, from /proc (proc(5): task/TID/children, else every stat)."""
    me = os.getpid()
    try:
        return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]
    except OSError:
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent_of(path) == me]


def _parent_of(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def attach(argv: list[str]) -> socket.socket:
    """The socket named by the command line (FD PARENT), after arranging to die with that parent."""
    descriptor, parent = int(argv[0]), int(argv[1])
    kernel.die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)
    return socket.socket(fileno=descriptor)


def say(sock: socket.socket, layer: Layer, message: str) -> None:
    """Report that the keeper itself cannot start."""
    keeper_channel(sock).send(Failed(0, layer, message))


def main(argv: list[str]) -> None:
    """The process outside every namespace."""
    leave_terminal_alone()
    raise_file_limit()
    keeper = Keeper(attach(argv))
    kernel.adopt_orphans()

    def stop(*_: object) -> None:
        keeper.serving = False

    signal.signal(signal.SIGTERM, stop)
    try:
        keeper.run([])
    finally:
        kill_descendants()
        keeper.channel.close()
