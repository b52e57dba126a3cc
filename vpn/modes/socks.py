"""Mode ``socks``: no namespaces; programs are started with a library that makes their connections go through here.

Sequence:

1. the library (``preload/socks.c``) is there;
2. the forwarder (``vpn.shim.forwarder``), a process of its own, shows that loopback and the SOCKS5 server work;
3. programs are started with the library and the forwarder's name in their environment. One that it could not serve
   (static, setuid, Go…) is refused, by the library's own judgement, instead of going round the tunnel.

Failures: the forwarder's first line says why it cannot serve; its end loses the tunnel. Without it a program's
connections fail with ENETDOWN; none goes round.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vpn.config import TunnelConfig
from vpn.errors import LAYERS, Layer, TunnelError
from vpn.modes.base import BringUp, TunnelInfo
from vpn.pipes import filled, read_lines
from vpn.process import Client, Process, python_argv
from vpn.programs import find_shim
from vpn.shim.forwarder import Serving, Settings, Trouble

SHIM = "socks"
VARIABLE = "VPN_SHIM"


class ShimClient:
    """Starts programs with the library."""

    def __init__(self, keeper: Client, shim: str, session: str) -> None:
        self._keeper = keeper
        self._shim = shim
        self._session = session
        self._library = ctypes.CDLL(shim)
        self._library.vpn_shim_refusal.restype = ctypes.c_char_p

    async def spawn(
        self,
        argv: Sequence[str | bytes | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        pass_fds: Sequence[int] = (),
        new_session: bool = True,
    ) -> Process:
        """As ``Client.spawn``; a program that cannot be served raises PermissionError, whose text says why."""
        given = dict(os.environ if env is None else env)
        self._check(os.fsdecode(argv[0]), given.get("PATH", os.defpath), cwd)
        return await self._keeper.spawn(
            argv,
            env=self._with_library(given),
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            new_session=new_session,
        )

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

    def __init__(self, client: ShimClient, server: str, seconds: float) -> None:
        self.client = client
        self._server = server
        self._seconds = seconds

    def info(self) -> TunnelInfo:
        """Names are resolved by the server, so there is no name server to tell."""
        return TunnelInfo("socks", kind="SOCKS5", bring_up_seconds=self._seconds, server=self._server)


async def bring_up(config: TunnelConfig, up: BringUp) -> SocksTunnel:
    """Start the forwarder; raises TunnelError naming the layer."""
    if config.socks is None:
        raise TunnelError("gateway", "mode socks was given no SOCKS5 server")
    shim = find_shim(SHIM)
    host, port = config.socks
    server = f"{host}:{port}"
    up.step = ("gateway", f"asking the SOCKS5 server {server}")
    serving = await start_forwarder(Settings((host, port), config.direct), up)
    return SocksTunnel(ShimClient(up.keeper, shim, serving.session), server, up.keeper.loop.time() - up.started_at)


async def start_forwarder(settings: Settings, up: BringUp) -> Serving:
    """Start it, ended with the session, its end the tunnel's loss; what its first line says."""
    output, output_end = os.pipe()
    source = filled(msgspec.json.encode(settings))
    try:
        process = await up.keeper.spawn(python_argv("vpn.shim.forwarder"), cwd="/", stdin=source, stdout=output_end)
    except BaseException:
        os.close(output)
        raise
    finally:
        os.close(source)
        os.close(output_end)
    up.stack.push_async_callback(process.end)
    line = await anext(aiter(read_lines(output)), "")
    try:
        serving = msgspec.json.decode(line, type=Serving)
    except msgspec.DecodeError:
        raise _trouble(line) from None
    process.ended.add_done_callback(
        lambda ended: up.lose(TunnelError("tunnel", f"the forwarder of mode socks ended (status {ended.result()})"))
    )
    return serving


def _trouble(line: str) -> TunnelError:
    try:
        trouble = msgspec.json.decode(line, type=Trouble)
    except msgspec.DecodeError:
        return TunnelError("tunnel", "the forwarder of mode socks ended without a word")
    layer: Layer = trouble.layer if trouble.layer in LAYERS else "tunnel"  # type: ignore[assignment]
    return TunnelError(layer, trouble.error)
