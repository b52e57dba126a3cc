"""Hosts: one holder process each, which keeps the host's network, mount and uts namespaces.

A holder goes through a handshake with the builder: *unshared* (links may be moved in), *configured* (usable).
It then waits to be ended with the site. A holder that fails sends its reason instead.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import traceback
from pathlib import Path

from simulated_site import kernel, mounts, network, plan
from simulated_site.errors import SiteError
from simulated_site.plan import Host
from simulated_site.shape import Shape

HANDSHAKE_DEADLINE = 60.0
HOST_NAMESPACES = kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS | kernel.CLONE_NEWNS


class Holder:
    """The builder's end of one host."""

    def __init__(self, host: Host, kept: list[Path]) -> None:
        self.host = host
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._channel.close()
            _hold(host, kept, theirs)
        theirs.close()

    def expect(self, step: str) -> None:
        """Wait for the holder to report `step`; `SiteError` with its reason when it failed instead."""
        ready = select.select([self._channel], [], [], HANDSHAKE_DEADLINE)[0]
        reply = json.loads(self._channel.recv(65536) or b'{"error": "its process ended"}') if ready else {}
        if reply.get("step") != step:
            reason = reply.get("error", f"no answer within {HANDSHAKE_DEADLINE:.0f} s")
            raise SiteError(f"host {self.host.name}: {step} failed: {reason}")

    def proceed(self) -> None:
        """Tell the holder that its links are there."""
        self._channel.send(b"go")


def bring_up(kept: list[Path], outer: Shape | None) -> dict[str, int]:
    """All hosts, wired; the pid of each one's holder."""
    holders = [Holder(host, kept) for host in plan.HOSTS]
    for holder in holders:
        holder.expect("unshared")
    pids = {holder.host.name: holder.pid for holder in holders}
    network.wire(pids, outer)
    for holder in holders:
        holder.proceed()
    for holder in holders:
        holder.expect("configured")
    return pids


def _hold(host: Host, kept: list[Path], channel: socket.socket) -> None:
    """A holder's whole life; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command; we end with the site
        kernel.unshare(HOST_NAMESPACES)
        kernel.set_hostname(host.name)
        mounts.prepare_host(host, kept)
        channel.send(b'{"step": "unshared"}')
        channel.recv(16)
        network.configure(host)
        channel.send(b'{"step": "configured"}')
        while True:
            signal.pause()
    except BaseException:  # all a holder can do with an error is to report it
        channel.send(json.dumps({"error": traceback.format_exc()[-4000:]}).encode())
    finally:
        os._exit(1)
