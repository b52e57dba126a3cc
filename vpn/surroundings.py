"""What a host is like beyond namespaces: its way out, names, clock, scratch space, the gateway as seen from it.

Each check gives a ``Check``; none raises, none waits longer than ``ANSWER_DEADLINE``.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import msgspec

from vpn.errors import TunnelError
from vpn.probes import name_servers
from vpn.relay import dns
from vpn.shim.gate import Gate

ANSWER_DEADLINE = 3.0
SCRATCH_WANTED = 1 << 30  # bytes: less is named as too little
CLOCK_WANTED = 60.0  # seconds a clock may differ: certificates and tokens bear no more
_UNSYNCHRONISED = 0x0040  # STA_UNSYNC of adjtimex(2)
_IP_MTU, _IPV6_MTU = 14, 24
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DO = 10, 23, 2
_NOBODY = 44444  # a UDP port where nobody listens, as tracepath(8) uses it: a host says so, and thereby that we arrived
_LONGEST_DATAGRAM = 65507


class Check(msgspec.Struct, frozen=True):
    """One capability: ``detail`` is a version or path, or why it is not there and what to do."""

    name: str
    ok: bool
    detail: str


def check_fuse() -> Check:
    """/dev/fuse, for CVMFS and squashfs images."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Check("fuse", False, f"/dev/fuse: {error.strerror}: ask the site for mode 0666, or modprobe fuse")
    return Check("fuse", True, "/dev/fuse")


async def check_loopback() -> Check:
    """What mode socks does with loopback."""
    try:
        gate = Gate()
        try:
            await gate.prove()
        finally:
            gate.close()
    except TunnelError as error:
        return Check("loopback", False, error.message)
    return Check("loopback", True, "carries connections of mode socks")


def check_route(routes: Path = Path("/proc/net/route")) -> Check:
    """A default route: outside access of its own, perhaps."""
    try:
        lines = [line.split() for line in routes.read_text().splitlines()[1:]]
    except OSError as error:
        return Check("default route", False, f"{routes}: {error.strerror}")
    for line in lines:
        if len(line) > 7 and line[1] == "00000000" and line[7] == "00000000":
            return Check("default route", True, f"by {line[0]}; whether it leads outside only a connection can tell")
    return Check("default route", False, "this node has no default route, so no outside access of its own")


async def check_dns() -> Check:
    """Whether a name server of this host answers."""
    servers = name_servers()
    if not servers:
        return Check("dns", False, "no name server in /etc/resolv.conf")
    answered = await asyncio.gather(*(_answers(server) for server in servers))
    good = [server for server, ok in zip(servers, answered, strict=True) if ok]
    if good:
        return Check("dns", True, f"{' '.join(good)} of {' '.join(servers)} answer")
    return Check("dns", False, f"{' '.join(servers)}: no answer; tunnels bring their own")


async def _answers(server: str) -> bool:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with suppress(OSError, TimeoutError), socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        async with asyncio.timeout(ANSWER_DEADLINE):
            await loop.sock_connect(sock, (server, 53))
            await loop.sock_sendall(sock, dns.question("localhost", dns.A))
            return bool(await loop.sock_recv(sock, 512))
    return False


def check_scratch() -> Check:
    """Room for temporary files."""
    place = tempfile.gettempdir()
    try:
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("scratch", False, f"{place}: {error.strerror}; set TMPDIR to a node-local directory")
    text = f"{place}, {free / 1e9:.1f} GB free"
    if free < SCRATCH_WANTED:
        return Check("scratch", False, f"{text}: little; set TMPDIR to a larger node-local directory")
    return Check("scratch", True, text)


def check_python() -> Check:
    """The Python this is run by."""
    return Check("python", True, f"{platform.python_version()} ({sys.executable})")


def check_clock() -> Check:
    """Whether the kernel says that the clock is kept by a time service (adjtimex(2))."""
    buffer = ctypes.create_string_buffer(512)  # struct timex; modes 0: only read
    state = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    status = int.from_bytes(buffer.raw[40:44], sys.byteorder)
    if state == -1 or ctypes.sizeof(ctypes.c_long) != 8:
        return Check("clock", True, "the kernel does not tell whether it is kept right")
    if status & _UNSYNCHRONISED:
        return Check("clock", True, "no time service is known to the kernel; compare it: vpn probe --against URL")
    return Check("clock", True, "kept by a time service")


def check_clock_against(date: str | None, now: float, url: str) -> Check:
    """Compare with the Date of an HTTP answer (RFC 9110, 6.6.1)."""
    try:
        other = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return Check("clock", False, f"{url} gives no date")
    off = now - other
    if abs(off) > CLOCK_WANTED:
        return Check("clock", False, f"{off:+.0f} s against {url}: certificates will fail; ask the site to set it")
    return Check("clock", True, f"{off:+.0f} s against {url}")


async def check_servers(hosts: Sequence[str], port: int) -> list[Check]:
    """A gateway by the first of its addresses that answers; by the first, when none does."""
    found = await asyncio.gather(*(check_server(host, port) for host in hosts))
    return next((checks for checks in found if all(check.ok for check in checks[:1])), found[0])


async def check_server(host: str, port: int) -> list[Check]:
    """A gateway as seen from here: TCP, the packets that fit on the way, and whether UDP is refused."""
    loop = asyncio.get_running_loop()
    where = f"{host} port {port}"
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, address = found[0][0], found[0][4]
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            async with asyncio.timeout(ANSWER_DEADLINE):
                await loop.sock_connect(sock, address)
    except TimeoutError:
        return [Check("gateway", False, f"{where}: no answer; a firewall may drop it")]
    except OSError as error:
        return [Check("gateway", False, f"{where}: {error.strerror or error}; is it running?")]
    udp, mtu = await asyncio.gather(_udp(family, address), _mtu(family, str(address[0])))
    return [
        Check("gateway", True, f"{where} accepts connections"),
        Check("gateway mtu", True, mtu),
        Check("gateway udp", not udp, udp or "nothing refuses it; that it arrives only a tunnel shows (`hpcq doctor`)"),
    ]


async def _mtu(family: int, address: str) -> str:
    """The longest packet that gets there, by datagrams that may not be cut up: routers say what is too long."""
    six = family == socket.AF_INET6
    level, ask = (socket.IPPROTO_IPV6, _IPV6_MTU) if six else (socket.IPPROTO_IP, _IP_MTU)
    heads = 48 if six else 28  # of IP and UDP
    loop, mtu = asyncio.get_running_loop(), 0
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(level, _IPV6_MTU_DISCOVER if six else _IP_MTU_DISCOVER, _PMTUDISC_DO)
        try:
            await loop.sock_connect(sock, (address, _NOBODY))
            while (shorter := sock.getsockopt(level, ask)) != mtu:
                mtu = shorter
                told = await _arrives(sock, min(mtu - heads, _LONGEST_DATAGRAM))
                if told is not None:
                    return f"{mtu} bytes arrive" if told else f"{mtu} bytes: no router on the way says it is too much"
        except OSError as error:
            return f"{mtu} bytes by the route; not tried: {error.strerror}"
    return f"{mtu} bytes by the route; routers on the way contradict each other"


async def _arrives(sock: socket.socket, size: int) -> bool | None:
    """Whether a datagram arrives: True when its host says so, False when nobody says anything, None: it is too long."""
    try:
        sock.send(bytes(size))
        async with asyncio.timeout(ANSWER_DEADLINE):
            await asyncio.get_running_loop().sock_recv(sock, 1)
    except TimeoutError:
        return False
    except ConnectionRefusedError:
        return True
    except OSError as error:
        if error.errno != errno.EMSGSIZE:
            raise
        return None
    return True


async def _udp(family: int, address: object) -> str:
    """Why UDP does not go, "" when nothing says that it does not."""
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        try:
            await loop.sock_connect(sock, address)  # type: ignore[arg-type]
            sock.send(b"\0")
            async with asyncio.timeout(1):
                await loop.sock_recv(sock, 1)
        except TimeoutError:
            return ""
        except OSError as error:
            return f"{error.strerror}: nothing takes UDP there, or a firewall rejects it; openconnect stays on TLS"
    return ""


SURROUNDINGS: tuple[Callable[[], Check], ...] = (check_fuse, check_route, check_scratch, check_python)
