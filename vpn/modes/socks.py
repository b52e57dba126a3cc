"""Mode ``socks``: no namespaces; programs are started with a library that makes their connections go through here.

Sequence:

1. the library (``preload/socks.c``) is there;
2. the forwarder (``vpn.shim.forwarder``), a process of its own, shows that loopback works, and opens its session at the
   gateway's relay, or greets the SOCKS5 server it was given;
3. programs are started with the library and the forwarder's name in their environment. One that it could not serve
   (static, setuid, Go…) is refused, by the library's own judgement, instead of going round the tunnel.

Failures: the forwarder's first line says why it cannot serve; its end loses the tunnel. Without it a program's
connections fail with ENETDOWN; none goes round.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import msgspec

from vpn.config import TunnelConfig
from vpn.errors import LAYERS, Layer, TunnelError
from vpn.modes.base import PLAIN, BringUp, TunnelInfo, stop
from vpn.pipes import filled, read_lines
from vpn.process import Argv, Client, Process, SpawnOptions, python_argv
from vpn.programs import environment, find_shim
from vpn.shim.forwarder import Serving, Settings, Trouble

SHIM = "socks"
VARIABLE = "VPN_SHIM"


class ShimClient:
    """Starts programs with the library."""

    def __init__(self, keeper: Client, shim: str, session: str, gates: Sequence[int]) -> None:
        self._keeper = keeper
        self.gates = frozenset(gates)
        """The ports of loopback that programs' connections go to."""
        self.lost = keeper.lost
        self._shim = shim
        self._session = session
        self._library = ctypes.CDLL(shim)
        self._library.vpn_shim_refusal.restype = ctypes.c_char_p

    async def spawn(self, argv: Argv, **options: Unpack[SpawnOptions]) -> Process:
        """As ``Client.spawn``; a program that cannot be served raises PermissionError, whose text says why."""
        env = options.get("env")
        given = dict(os.environ if env is None else env)
        self._check(os.fsdecode(argv[0]), given.get("PATH", os.defpath), options.get("cwd"))
        options["env"] = self._with_library(given)
        return await self._keeper.spawn(argv, **options)

    def _with_library(self, env: dict[str, str]) -> dict[str, str]:
        others = [
            part for part in env.get("LD_PRELOAD", "").replace(" ", ":").split(":") if part not in ("", self._shim)
        ]
        return {**env, "LD_PRELOAD": ":".join([self._shim, *others]), VARIABLE: self._session}

    def _check(self, program: str, path: str, cwd: str | os.PathLike[str] | None) -> None:
        found = str(Path(cwd or ".", program)) if "/" in program else shutil.which(program, path=path)
        reason: bytes | None = self._library.vpn_shim_refusal(os.fsencode(found)) if found else None
        if reason is not None:
            text = f"{reason.decode()}, and would go round the tunnel of mode socks; use mode relay or openconnect"
            raise PermissionError(errno.EACCES, text, program)


class SocksTunnel:
    """The forwarder and what starts programs."""

    def __init__(self, client: ShimClient, info: TunnelInfo) -> None:
        self.client = client
        self._info = info

    def info(self) -> TunnelInfo:
        """As it came up; names are resolved at the other end, so there is no name server to tell."""
        return self._info


async def bring_up(config: TunnelConfig, up: BringUp) -> SocksTunnel:
    """Start the forwarder; raises TunnelError naming the layer."""
    shim = find_shim(SHIM)
    settings = settings_of(config)
    up.step = ("gateway", "opening a session")
    serving = await Forwarding(up).start(settings)
    seconds = up.keeper.loop.time() - up.started_at
    kind = "SOCKS5" if settings.socks is not None else "TLS" if config.tls else PLAIN
    info = TunnelInfo(
        "socks", kind=kind, cipher=serving.cipher if config.tls else "", bring_up_seconds=seconds, server=serving.server
    )
    return SocksTunnel(ShimClient(up.keeper, shim, serving.session, serving.gates), info)


def settings_of(config: TunnelConfig) -> Settings:
    """What the forwarder is told; raises TunnelError when there is nothing to go through."""
    if config.socks is not None:
        return Settings(config.socks, b"", config.reconnect_timeout, config.direct, True, config.probe_interval)
    credential = config.credential
    if credential is None:
        raise TunnelError("gateway", "mode socks needs a gateway's credential, or --socks HOST:PORT")
    if not credential.relay_port:
        raise TunnelError("gateway", "this credential's gateway has no relay: start it again with this version of hpcq")
    return Settings(
        None, credential.to_bytes(), config.reconnect_timeout, config.direct, config.tls, config.probe_interval
    )


class Forwarding:
    """The forwarder's process: ended with the session, its end the tunnel's loss."""

    def __init__(self, up: BringUp) -> None:
        self._up = up
        self._lines: asyncio.Queue[str] = asyncio.Queue()

    async def start(self, settings: Settings) -> Serving:
        """Start it; what its first line says."""
        output, output_end = os.pipe()
        source = filled(msgspec.json.encode(settings))
        try:
            process = await self._up.keeper.spawn(
                python_argv("vpn.shim.forwarder"), env=environment(), cwd="/", stdin=source, stdout=output_end
            )
        finally:
            os.close(source)
            os.close(output_end)
            reading = asyncio.create_task(self._read(output))
            self._up.stack.push_async_callback(stop, reading)
        self._up.stack.push_async_callback(process.end)
        line = await self._lines.get()
        try:
            serving = msgspec.json.decode(line, type=Serving)
        except msgspec.DecodeError:
            raise _trouble(line) from None
        reading.add_done_callback(lambda _: self._up.lose(self._reason()))
        return serving

    async def _read(self, output: int) -> None:
        async for line in read_lines(output):
            self._lines.put_nowait(line)
        self._lines.put_nowait("")

    def _reason(self) -> TunnelError:
        return _trouble(self._lines.get_nowait() if not self._lines.empty() else "")


def _trouble(line: str) -> TunnelError:
    try:
        trouble = msgspec.json.decode(line, type=Trouble)
    except msgspec.DecodeError:
        return TunnelError("tunnel", "the forwarder of mode socks ended: it was killed, or see standard error")
    layer: Layer = trouble.layer if trouble.layer in LAYERS else "tunnel"  # type: ignore[assignment]
    return TunnelError(layer, trouble.error)
