"""Probes: does a service really answer from here? Run inside a tunnel as a program of their own.

``python -c … vpn.probes TIMEOUT TARGET…`` prints one ``ProbeResult`` a line, as each is known. Targets:

* ``root://HOST[:1094]`` speaks XRootD: the 20-byte handshake and kXR_protocol, whose status is read. Source:
  "XRootD Protocol Version 5.x.x", sections "Connection handshake" and "kXR_protocol Request";
* ``http://…``, ``https://…``: any status below 500 is an answer;
* ``cvmfs:REPO``: the repository's root can be listed, and the first file found in it be read;
* ``dns:NAME``: the name has an address.

A result names what failed: the name, the connection (refused, no route, no answer), or the protocol.
"""

from __future__ import annotations

import asyncio
import collections
import errno
import http.client
import itertools
import os
import shutil
import socket
import ssl
import struct
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import msgspec

from vpn.errors import Layer, TunnelError, UsageError

XROOTD_PORT = 1094
CVMFS_DIRECTORIES, CVMFS_ENTRIES = 20, 200
"""How many directories, and entries in each, are looked at for a file to read."""
_HANDSHAKE = struct.pack(">5i", 0, 0, 0, 4, 2012)  # the last two words: 4 and ROOTD_PQ
_KXR_PROTOCOL = struct.pack(">2sHi12xi", b"\0\1", 3006, 0x00000520, 0)  # streamid, request id, client version, no data
_KXR_OK = 0


class ProbeResult(msgspec.Struct, frozen=True):
    """``layer`` and ``message`` say what answered, or what failed and what to do; ``seconds`` is how long it
    took.
    """

    target: str
    ok: bool
    layer: Layer
    message: str
    seconds: float


def check_target(target: str) -> str:
    """A target that can be probed; raises UsageError."""
    scheme, _, rest = target.partition(":")
    if scheme not in PROBES or not rest.strip("/"):
        raise UsageError(
            f"{target!r} cannot be probed; known: root://HOST:PORT, http://…, https://…, cvmfs:REPO, dns:NAME"
        )
    if scheme in ("root", "xroot", "http", "https"):
        _host_of(target)
    return target


def _host_of(target: str) -> tuple[SplitResult, str, int | None]:
    try:
        url = urlsplit(target)
        if url.hostname:
            return url, url.hostname, url.port
    except ValueError:
        pass
    raise UsageError(f"{target!r} names no host, or not a port")


class Stage:
    """What a probe is waiting for, for the message when its time is up."""

    def __init__(self) -> None:
        self.waiting_for = "no answer; a firewall may drop it, or there is no route"


async def probe_xrootd(target: str, stage: Stage) -> str:
    """Shake hands with an XRootD server; its protocol version."""
    _, host, port = _host_of(target)
    reader, writer = await _connect(host, port or XROOTD_PORT, "xrootd", stage)
    stage.waiting_for = "it accepts connections but does not answer the XRootD handshake: check the port"
    try:
        writer.write(_HANDSHAKE + _KXR_PROTOCOL)
        try:
            kind = parse_handshake(await reader.readexactly(16))
            version = parse_protocol(await reader.readexactly(16))
        except ConnectionError as error:
            raise TunnelError("xrootd", f"{host} port {port or XROOTD_PORT}: {_connect_reason(error)}") from None
        except asyncio.IncompleteReadError:
            raise _not_xrootd(host, port, "it closed the connection during the handshake") from None
        except ValueError as error:
            raise _not_xrootd(host, port, str(error)) from None
    finally:
        writer.close()
    return f"XRootD {kind} speaking protocol {version}"


def _not_xrootd(host: str, port: int | None, why: str) -> TunnelError:
    return TunnelError("xrootd", f"{host}:{port or XROOTD_PORT} is not an XRootD server: {why}; check the port")


def parse_handshake(data: bytes) -> str:
    """The answer to the handshake: streamid 0, status ok, 8 bytes of protocol version and server type."""
    stream, status, length, _, kind = struct.unpack(">2sHIiI", data)
    if stream != b"\0\0" or status != _KXR_OK or length != 8:
        raise ValueError("its first answer is no handshake")
    return {0: "manager (redirector)", 1: "data server"}.get(kind, "server")


def parse_protocol(data: bytes) -> str:
    """The answer to kXR_protocol; the version, as in 5.2.0."""
    stream, status, length, version, _flags = struct.unpack(">2sHIiI", data)
    if stream != b"\0\1" or status != _KXR_OK or length < 8:
        raise ValueError(f"it answered kXR_protocol with status {status}")
    return f"{version >> 8 & 0xF}.{version >> 4 & 0xF}.{version & 0xF}"


async def probe_http(target: str, stage: Stage) -> str:
    """GET a URL; its status line."""
    url, host, port = _host_of(target)
    address = await _resolve(host, stage)
    status, reason = await asyncio.to_thread(_get, url, host, address, port)
    if status >= 500:
        raise TunnelError("http", f"{target}: the server answers {status} {reason}")
    return f"{status} {reason}"


def _get(url: SplitResult, host: str, address: str, port: int | None) -> tuple[int, str]:
    secure = url.scheme == "https"
    try:
        with socket.create_connection((address, port or (443 if secure else 80))) as plain:
            sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
            with sock:
                path = (url.path or "/") + (f"?{url.query}" if url.query else "")
                name = url.netloc.rpartition("@")[2]
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
                answer = http.client.HTTPResponse(sock)
                answer.begin()
                return answer.status, answer.reason
    except (ssl.SSLError, http.client.HTTPException, UnicodeError) as error:
        raise TunnelError("http", f"{host} does not speak {url.scheme.upper()} as expected: {error}") from None
    except OSError as error:
        raise TunnelError("http", f"{host} port {port or (443 if secure else 80)}: {_connect_reason(error)}") from None


async def probe_cvmfs(target: str, stage: Stage) -> str:
    """List a CVMFS repository's root and read a file: only that needs the servers, where catalogs are cached."""
    repository = target.removeprefix("cvmfs:").strip("/")
    stage.waiting_for = f"/cvmfs/{repository} hangs: its servers or proxy cannot be reached"
    return await asyncio.to_thread(_read_repository, repository)


def _read_repository(repository: str) -> str:
    path = Path("/cvmfs", repository)
    try:
        entries = os.listdir(path)  # noqa: PTH208  (opening the directory is what makes the automounter act)
    except OSError as error:
        raise TunnelError("cvmfs", _cvmfs_reason(repository, error)) from None
    if not entries:
        raise TunnelError(
            "cvmfs",
            f"{path} is there but empty: the repository is not mounted; see `cvmfs_config probe` on the node",
        )
    try:
        file = _first_file(path)
        if file is not None:
            with file.open("rb") as stream:
                stream.read(1)
    except OSError as error:
        raise TunnelError("cvmfs", f"{error.filename}: {error.strerror}; is its server or proxy reachable?") from None
    return f"{path} has {len(entries)} entries" + (f", {file} can be read" if file else "")


def _first_file(top: Path) -> Path | None:
    """A plain file with contents, from the top down, among the first directories and entries only."""
    waiting = collections.deque([top])
    for _ in range(CVMFS_DIRECTORIES):
        if not waiting:
            return None
        with os.scandir(waiting.popleft()) as entries:
            for entry in itertools.islice(entries, CVMFS_ENTRIES):
                if entry.is_file(follow_symlinks=False) and entry.stat().st_size and _is_readable(entry):
                    return Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
    return None


def _is_readable(entry: os.DirEntry[str]) -> bool:
    return bool(entry.stat().st_mode & 0o444)


def _cvmfs_reason(repository: str, error: OSError) -> str:
    if error.errno == errno.ENOTCONN:
        return f"/cvmfs/{repository}: {error.strerror}: its cvmfs2 has ended, maybe killed for lack of memory"
    if Path("/cvmfs").is_dir() and not isinstance(error, FileNotFoundError):
        return f"/cvmfs/{repository}: {error.strerror}; the repository is configured but cannot be read"
    if shutil.which("cvmfs2") or shutil.which("cvmfsexec"):
        return f"/cvmfs/{repository} is not mounted here; run the command under cvmfsexec {repository}"
    return (
        f"/cvmfs/{repository} does not exist, and cvmfs2 and cvmfsexec were not found: install the cvmfs "
        "package (https://cvmfs.readthedocs.io) or put cvmfsexec (https://github.com/cvmfs/cvmfsexec) on PATH"
    )


async def probe_dns(target: str, stage: Stage) -> str:
    """Look a name up."""
    return await _resolve(target.removeprefix("dns:"), stage)


PROBES: dict[str, Callable[[str, Stage], Awaitable[str]]] = {
    "root": probe_xrootd,
    "xroot": probe_xrootd,
    "http": probe_http,
    "https": probe_http,
    "cvmfs": probe_cvmfs,
    "dns": probe_dns,
}


LAYER_OF: dict[str, Layer] = {
    "root": "xrootd",
    "xroot": "xrootd",
    "http": "http",
    "https": "http",
    "cvmfs": "cvmfs",
    "dns": "dns",
}


async def _connect(
    host: str, port: int, layer: Layer, stage: Stage
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = await _resolve(host, stage)
    try:
        return await asyncio.open_connection(address, port)
    except OSError as error:
        raise TunnelError(layer, f"{host} port {port}: {_connect_reason(error)}") from None


def _connect_reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there, or a firewall rejects it"
    if isinstance(error, ConnectionResetError):
        who = "by the server, or by a gateway that cannot reach it or does not allow it (see its access.log)"
        return f"connection reset: {who}"
    return f"{error.strerror or error}"


async def _resolve(host: str, stage: Stage) -> str:
    before, stage.waiting_for = stage.waiting_for, f"{host}: {_silent_servers()}"
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise TunnelError("dns", f"{host}: {_dns_reason(error)}") from None
    stage.waiting_for = before
    # IPv4 first: the tunnels carry nothing else, while many servers have both.
    return str(sorted(answers, key=lambda answer: answer[0] != socket.AF_INET)[0][4][0])


def _dns_reason(error: Exception) -> str:
    code = error.errno if isinstance(error, socket.gaierror) else None
    servers = ", ".join(name_servers()) or "none configured"
    if code == socket.EAI_AGAIN:
        return _silent_servers()
    if code in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", None)):
        return f"no such name, say the name servers ({servers})"
    return str(error)


def _silent_servers() -> str:
    servers = ", ".join(name_servers()) or "none configured"
    return f"the name servers ({servers}) do not answer; check the gateway's DNS (--dns)"


def name_servers() -> list[str]:
    """The name servers of resolv.conf."""
    try:
        lines = Path("/etc/resolv.conf").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.split()[1] for line in lines if line.startswith("nameserver") and len(line.split()) > 1]


async def probe(target: str, timeout: float) -> ProbeResult:
    """Probe one target within ``timeout`` seconds."""
    start = time.monotonic()
    scheme = check_target(target).partition(":")[0]
    stage = Stage()
    layer = LAYER_OF[scheme]
    try:
        async with asyncio.timeout(timeout):
            message, ok = await PROBES[scheme](target, stage), True
    except TimeoutError:
        message, ok = f"{target}: {stage.waiting_for} ({timeout:g} s)", False
    except TunnelError as error:
        layer, message, ok = error.layer, error.message, False
    return ProbeResult(target, ok, layer, message, time.monotonic() - start)


async def _print(target: str, timeout: float) -> None:
    result = await probe(target, timeout)
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    sys.stdout.flush()


def main(argv: list[str]) -> None:
    """TIMEOUT TARGET…"""

    async def run() -> None:
        await asyncio.gather(*(_print(target, float(argv[0])) for target in argv[1:]))
        os._exit(0)  # a thread may still hang in getaddrinfo or a dead mount

    asyncio.run(run())
