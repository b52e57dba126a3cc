"""The gateway's sockets in the host's network: made and kept here, used by ocserv in its namespace.

The kernel carries a connection's bytes from the wire to ocserv and back, with no program in between, also the
last ones after every process of the gateway was killed: clients learn at once that it is gone. The shim
``preload/host_sockets.c`` asks for each socket over a SOCK_SEQPACKET pair; ``HostSockets`` answers from the
gateway's loop. It grants the addresses it listens on, its own port, and nothing else: of UDP first the socket that
listens, then one for each client.

Both protocols need the same number on every address: the server tells clients only one.
"""

from __future__ import annotations

import array
import asyncio
import errno
import ipaddress
import random
import socket
import struct
from contextlib import ExitStack, suppress

from vpn.errors import GatewayError

PORTS = (20000, 32000)  # below the ephemeral range: a free one stays free
ATTEMPTS = 50
BACKLOG = 1024
ANY = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104  (compute nodes must reach it)

_REQUEST = struct.Struct("=ii16s")
_ANSWER = struct.Struct("=i")
_IP_PKTINFO = 8  # ip(7); Python has no name for it before 3.14

Key = tuple[int, int, str]
"""Kind of socket, family, address."""


class HostSockets:
    """Listening TCP and UDP sockets on one port, and the answers to the shim that asks for them."""

    def __init__(self, port: int, listening: dict[Key, socket.socket]) -> None:
        self.port = port
        self._listening = listening
        self._granted: set[Key] = set()
        self._serving: list[tuple[asyncio.AbstractEventLoop, socket.socket]] = []

    @property
    def families(self) -> set[int]:
        """AF_INET, AF_INET6: what it listens on."""
        return {family for _, family, _ in self._listening}

    def serve(self) -> socket.socket:
        """Answer requests; the asking end of the pair, which the caller hands to the server and closes."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        self._serving.append((loop, ours))
        loop.add_reader(ours, self._on_request, loop, ours)
        return theirs

    def close(self) -> None:
        """Close everything held here; what the server was given stays its own."""
        for loop, ours in self._serving:
            loop.remove_reader(ours)
            ours.close()
        self._serving.clear()
        for sock in self._listening.values():
            sock.close()
        self._listening.clear()

    def _on_request(self, loop: asyncio.AbstractEventLoop, ours: socket.socket) -> None:
        try:
            data = ours.recv(_REQUEST.size + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            loop.remove_reader(ours)
            return
        with ExitStack() as stack, suppress(OSError):  # it went away while it was asking
            try:
                sock = self._grant(data, stack)
            except OSError as error:
                ours.send(_ANSWER.pack(error.errno or errno.EINVAL))
                return
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]).tobytes())
            ours.sendmsg([_ANSWER.pack(0)], [rights])

    def _grant(self, data: bytes, stack: ExitStack) -> socket.socket:
        try:
            kind, family, packed = _REQUEST.unpack(data)
            address = socket.inet_ntop(family, packed[: 4 if family == socket.AF_INET else 16])
        except (struct.error, ValueError) as error:
            raise OSError(errno.EINVAL, str(error)) from None
        key = kind, family, address
        held = self._listening.get(key)
        if held is not None and not (kind == socket.SOCK_DGRAM and key in self._granted):
            self._granted.add(key)
            return held
        # A client's own UDP socket: it will be connected, which the one that listens must never be.
        if kind != socket.SOCK_DGRAM or (held is None and (kind, family, ANY[family]) not in self._listening):
            raise OSError(errno.EADDRNOTAVAIL, address)
        return stack.enter_context(_open(kind, family, address, self.port, shared=True))


def open_sockets(listen: str, port: int, preferred: int = 0) -> HostSockets:
    """Listen on an address ("": all of this host, of both families) and a port; 0: ``preferred`` if it is free."""
    problem = ""
    some = [*([preferred] if preferred else []), *random.sample(range(*PORTS), ATTEMPTS)]
    for candidate in [port] if port else some:
        try:
            return HostSockets(candidate, _open_all(listen, candidate))
        except OSError as error:
            problem = error.strerror or str(error)
    raise GatewayError(
        f"cannot listen on {listen or 'all addresses'}, port {port or 'any'}: {problem}; "
        "choose another with --port or --listen"
    )


def _open_all(listen: str, port: int) -> dict[Key, socket.socket]:
    made: dict[Key, socket.socket] = {}
    with ExitStack() as stack:
        for family, address in _addresses(listen):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                sock = stack.enter_context(_open(kind, family, address, port))
                made[kind, family, address] = sock
        stack.pop_all()
    return made


def _addresses(listen: str) -> list[tuple[int, str]]:
    if listen:
        address = ipaddress.ip_address(listen)
        return [(socket.AF_INET if address.version == 4 else socket.AF_INET6, str(address))]
    return [(family, address) for family, address in ANY.items() if family == socket.AF_INET or has_ipv6()]


def has_ipv6() -> bool:
    """Whether this host's kernel takes an IPv6 socket and has an address to bind it to."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


def _open(kind: int, family: int, address: str, port: int, *, shared: bool = False) -> socket.socket:
    """A bound socket; ``shared``: beside the listening one, which gets what is for nobody else."""
    sock = socket.socket(family, kind)
    try:
        if kind == socket.SOCK_STREAM or shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_DGRAM:  # ocserv sets these before it binds, on the socket that is replaced
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        sock.bind((address, port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from now on, for each client's own socket
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def inherit(fd: int, port: int) -> str:
    """The variable that tells the shim where to ask: ``fd`` is the descriptor's number in the server."""
    return f"{fd}:{port}"
