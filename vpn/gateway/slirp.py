"""slirp4netns: the gateway namespace's way to the host's network for what no socket of the host's carries.

``vpn.uplink`` starts it. With ``uplink=slirp4netns`` the port clients come in by is forwarded too, by its API socket:
one JSON request a connection.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpn.errors import GatewayError
from vpn.gateway.addresses import UPLINK_GUEST
from vpn.gateway.host_sockets import ATTEMPTS, PORTS
from vpn.namespace import Namespace
from vpn.process import Client
from vpn.uplink import MTU, Uplink, start_uplink

API_DEADLINE = 10.0
TAP_MTU = MTU  # bytes: the most slirp4netns takes; each packet costs, not each byte
PROTOTYPE_MTU = 1500


class Slirp:
    """A running slirp4netns."""

    def __init__(self, uplink: Uplink, directory: Path) -> None:
        self.process = uplink.process
        self._uplink = uplink
        self._directory = directory

    async def forward(self, host: str, port: int, protocols: Sequence[str] = ("tcp", "udp")) -> int:
        """Forward ``port`` (0: choose one) into the namespace; the port.

        Both protocols need the same number: the server tells clients only one.
        """
        candidates = [port] if port else random.sample(range(*PORTS), ATTEMPTS)
        problem = ""
        for candidate in candidates:
            problem = await self._forward_all(host, candidate, protocols)
            if not problem:
                return candidate
        raise GatewayError(
            f"cannot listen on {host}, port {port or 'any'}: {problem}; choose another with --port or --listen"
        )

    async def _forward_all(self, host: str, port: int, protocols: Sequence[str]) -> str:
        added: list[int] = []
        for protocol in protocols:
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
        await self._uplink.close()
        (self._directory / "slirp.sock").unlink(missing_ok=True)


async def start_slirp(
    keeper: Client,
    namespace: Namespace,
    directory: Path,
    log: int,
    *,
    dns: bool,
    forwards: bool,
    mtu: int = TAP_MTU,
) -> Slirp:
    """Attach ``tap0`` to the namespace; returns when it carries packets. ``forwards``: it can forward ports."""
    (directory / "slirp.sock").unlink(missing_ok=True)
    # A socket name relative to its directory: the directory's path may be longer than a socket's can be.
    options = [*(["--api-socket=slirp.sock"] if forwards else []), *([] if dns else ["--disable-dns"])]
    return Slirp(await start_uplink(keeper, namespace, options, cwd=directory, log=log, mtu=mtu), directory)


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
