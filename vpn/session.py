"""A tunnel session, from the first process to the last: the file to read first.

``open_session(config)`` is a context manager. Its sequence:

1. *keeper*: a small process outside every namespace that starts and reaps programs (``vpn.keeper``,
   ``vpn.process``);
2. *mode*: ``vpn.modes.MODE.bring_up`` makes the namespace (``vpn.holder``) and the tunnel, step by step,
   pushing on a stack what must be undone; all within ``bring_up_timeout``, whose passing names the step that
   took too long;
3. *up*: ``spawn`` runs programs inside, ``probe`` checks what they will need, ``info`` tells how;
4. *lost*: a future that resolves with the reason when any part of the tunnel ends: an event, nobody polls;
5. *down*: the stack unwinds, last first, every step even when one fails; each process is asked, waited for,
   killed, reaped.

If this process is killed instead, the keeper sees its socket end and kills openconnect and the holder; if the
keeper is killed, they carry a death signal; if the holder is killed, the kernel kills what is inside. So
nothing outlives any one of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from vpn.config import TunnelConfig
from vpn.errors import TunnelError
from vpn.modes import none, openconnect, relay, slirp, socks
from vpn.modes.base import BringUp, Tunnel, TunnelInfo
from vpn.pipes import read_lines
from vpn.probes import ProbeResult, check_target
from vpn.process import Process, python_argv, start_keeper

PROBE_START = 10.0  # seconds a probe's Python may take to start, on top of the probe's own time

BRING_UP: dict[str, Callable[[TunnelConfig, BringUp], Awaitable[Tunnel]]] = {
    "openconnect": openconnect.bring_up,
    "relay": relay.bring_up,
    "socks": socks.bring_up,
    "slirp": slirp.bring_up,
    "none": none.bring_up,
}


class Session:
    """A tunnel that is up. ``lost`` resolves with a TunnelError when it breaks."""

    def __init__(self, tunnel: Tunnel, lost: asyncio.Future[TunnelError]) -> None:
        self._tunnel = tunnel
        self.lost = lost

    @property
    def can_spawn(self) -> bool:
        """Whether programs can still be started inside; a lost session's namespace may live on without a way out."""
        return not self._tunnel.client.lost.done()

    @property
    def info(self) -> TunnelInfo:
        """Mode, kind, address, MTU… as they are now."""
        return self._tunnel.info()

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
        """Start a program inside the tunnel; it ends with the session, at the latest.

        None for a stream, ``env`` or ``cwd`` means the caller's own; ``pass_fds`` keep their numbers. Raises
        FileNotFoundError or PermissionError as exec does, TunnelError when the tunnel is gone.
        """
        return await self._tunnel.client.spawn(
            argv,
            env=env,
            cwd=cwd,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            pass_fds=pass_fds,
            new_session=new_session,
        )

    async def probe(self, targets: Sequence[str], timeout: float = 20.0) -> list[ProbeResult]:
        """Ask each target (``root://…``, ``http(s)://…``, ``cvmfs:REPO``, ``dns:NAME``) from inside; in their
        order.

        ``timeout`` is for each, in seconds; they run together.
        """
        for target in targets:
            check_target(target)
        found: dict[str, ProbeResult] = {}
        reader, writer = os.pipe()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            argv = python_argv("vpn.probes", str(timeout), *targets)
            process = await self.spawn(argv, cwd="/", stdin=null, stdout=writer, stderr=null)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
            os.close(null)
        try:
            async with asyncio.timeout(timeout + PROBE_START):
                async for line in read_lines(reader):
                    result = msgspec.json.decode(line, type=ProbeResult)
                    found[result.target] = result
        except TimeoutError:
            pass
        finally:
            await process.end(grace=0)
        return [
            found.get(target) or ProbeResult(target, False, "tunnel", "the probe did not finish", timeout)
            for target in targets
        ]


@asynccontextmanager
async def open_session(config: TunnelConfig, *, terminal: bool = False) -> AsyncIterator[Session]:
    """Bring a tunnel up, and down at the end; raises TunnelError naming the layer.

    With ``terminal``, programs spawned without a new session share the caller's terminal and its job control.
    """
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    async with AsyncExitStack() as stack:
        keeper = await start_keeper(new_session=not terminal)
        stack.push_async_callback(keeper.close)
        up = BringUp(keeper.client, stack, loop.create_future(), started_at, new_session=not terminal)
        keeper.client.lost.add_done_callback(lambda future: up.lose(future.result()))
        try:
            async with asyncio.timeout(config.bring_up_timeout):
                tunnel = await BRING_UP[config.mode](config, up)
        except TimeoutError:
            layer, step = up.step
            raise TunnelError(layer, f"{step} took more than {config.bring_up_timeout:g} s") from None
        except OSError as error:
            layer, step = up.step
            raise TunnelError(layer, f"{step} failed: {error}") from None
        yield Session(tunnel, up.lost)
