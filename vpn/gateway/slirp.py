"""slirp4netns: the gateway namespace's way to the host's network for what no socket of the host's carries.

It stands outside the namespace and joins it by the holder's pid. Ready when it writes to its ready descriptor
(slirp4netns(1)); ended by its exit descriptor when the daemon dies. With ``uplink=slirp4netns`` the port
clients come in by is forwarded too, by its API socket: one JSON request a connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path

from vpn.errors import GatewayError
from vpn.gateway.host_sockets import ATTEMPTS, PORTS
from vpn.gateway.ocserv import UPLINK, UPLINK_GUEST
from vpn.namespace import Namespace
from vpn.process import Client, Process
from vpn.programs import find_program

READY_DEADLINE = 20.0
API_DEADLINE = 10.0
TAP_MTU = 65520


class Slirp:
    """A running slirp4netns."""

    def __init__(self, process: Process, directory: Path, exit_fd: int) -> None:
        self.process = process
        self._directory = directory
        self._exit_fd = exit_fd

    async def forward(self, host: str, port: int) -> int:
        """Forward ``port`` (0: choose one), TCP and UDP, into the namespace; the port.

        Both protocols need the same number: the server tells clients only one.
        """
        candidates = [port] if port else random.sample(range(*PORTS), ATTEMPTS)
        problem = ""
        for candidate in candidates:
            problem = await self._forward_both(host, candidate)
            if not problem:
                return candidate
        raise GatewayError(
            f"cannot listen on {host}, port {port or 'any'}: {problem}; choose another with --port or --listen"
        )

    async def _forward_both(self, host: str, port: int) -> str:
        added: list[int] = []
        for protocol in ("tcp", "udp"):
            rule = {
                "proto": protocol,
                "host_addr": host,
                "host_port": port,
                "guest_addr": UPLINK_GUEST,
                "guest_port": port,
            }
            answer = await self._call("add_hostfwd", rule)
            if "error" in answer:
                for rule_id in added:
                    await self._call("remove_hostfwd", {"id": rule_id})
                return f"{protocol}: {answer['error'].get('desc', 'refused')}"
            added.append(answer["return"]["id"])
        return ""

    async def _call(self, command: str, arguments: Mapping[str, object]) -> dict[str, dict[str, int]]:
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        try:
            async with asyncio.timeout(API_DEADLINE):
                answer = await _exchange(self._directory, request)
            return dict(json.loads(answer))
        except (OSError, ValueError, TimeoutError) as error:
            raise GatewayError(f"slirp4netns does not answer on its API socket: {error or 'timeout'}") from None

    async def close(self) -> None:
        """End it."""
        os.close(self._exit_fd)
        await self.process.end()
        (self._directory / "slirp.sock").unlink(missing_ok=True)


async def start_slirp(
    keeper: Client, namespace: Namespace, directory: Path, log: int, *, dns: bool, forwards: bool
) -> Slirp:
    """Attach ``tap0`` to the namespace; returns when it carries packets. ``forwards``: it can forward ports."""
    (directory / "slirp.sock").unlink(missing_ok=True)
    ready, ready_end = os.pipe()
    exit_end, exit_fd = os.pipe()
    argv = [
        find_program("slirp4netns"), "--configure", f"--mtu={TAP_MTU}", f"--cidr={UPLINK}",
        "--disable-host-loopback",
        "--ready-fd=3", "--exit-fd=4",
        *(["--api-socket=slirp.sock"] if forwards else []), *([] if dns else ["--disable-dns"]),
        str(namespace.pid), "tap0",
    ]  # fmt: skip
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        # A socket name relative to its directory: the directory's path may be longer than a socket's can be.
        process = await keeper.spawn(
            argv, cwd=directory, stdin=null, stdout=log, stderr=log, fds={3: ready_end, 4: exit_end}
        )
    except BaseException:
        os.close(ready)
        os.close(exit_fd)
        raise
    finally:
        os.close(ready_end)
        os.close(exit_end)
        os.close(null)
    slirp = Slirp(process, directory, exit_fd)
    try:
        await _wait_ready(ready)
    except GatewayError:
        await slirp.close()
        raise
    finally:
        os.close(ready)
    return slirp


async def _wait_ready(fd: int) -> None:
    """The descriptor becomes readable when slirp4netns is ready, and also when it died."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    os.set_blocking(fd, False)
    loop.add_reader(fd, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), READY_DEADLINE)
    except TimeoutError:
        raise GatewayError(f"slirp4netns was not ready within {READY_DEADLINE:g} s") from None
    finally:
        loop.remove_reader(fd)
    if not os.read(fd, 1):
        raise GatewayError("slirp4netns ended before it was ready; its last words are in the gateway's log")


async def _exchange(directory: Path, request: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, f"/proc/self/fd/{folder}/slirp.sock")
            await loop.sock_sendall(sock, request)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := await loop.sock_recv(sock, 4096):
                answer += chunk
            return answer
    finally:
        os.close(folder)
