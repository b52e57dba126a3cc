"""A tunnel session, from the first process to the last: the file to read first.

``open_session(config)`` is a context manager. Its sequence:

1. *keeper*: a small process outside every namespace that starts and reaps programs (``vpn.keeper``,
   ``vpn.process``);
2. *mode*: ``vpn.modes.MODE.bring_up`` makes the namespace (``vpn.holder``) and the tunnel, step by step,
   pushing on a stack what must be undone; all within ``bring_up_timeout``, whose passing names the step that
   took too long;
   Where CVMFS is asked for, ``vpn.cvmfs`` then mounts it in the namespace, and a file of it is read;
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
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple, Unpack

from vpn.config import TunnelConfig
from vpn.cvmfs import mount as cvmfs
from vpn.errors import TunnelError
from vpn.messages import Diagnose
from vpn.modes import auto, none, openconnect, prototype, relay, slirp, socks
from vpn.modes.base import BringUp, Tunnel, TunnelInfo
from vpn.modes.socks import ShimClient
from vpn.namespace import open_namespace
from vpn.netlink import diagnosing_sockets
from vpn.probes import ProbeResult
from vpn.probing import ask
from vpn.process import Argv, Client, Process, SpawnOptions, start_keeper

BRING_UP: dict[str, Callable[[TunnelConfig, BringUp], Awaitable[Tunnel]]] = {
    "openconnect": openconnect.bring_up,
    "relay": relay.bring_up,
    "socks": socks.bring_up,
    "slirp": slirp.bring_up,
    "prototype": prototype.bring_up,
    "none": none.bring_up,
}

WITHOUT_NAMESPACE = ("none", "socks")
"""Modes whose programs run in the host's namespaces: for CVMFS they get one for mounts alone."""


class Diagnosis(NamedTuple):
    """Sockets of sock_diag(7), the caller's to close: one to ask, and one that is told of each connection that ends,
    unless that is refused; none where nobody can tell. They tell of, and keep, the tunnel's namespace, or else the
    host's: there the connections of programs inside are those to a port of loopback that is one of ``gates``.
    """

    sockets: list[socket.socket]
    gates: frozenset[int] = frozenset()


class Session:
    """A tunnel that is up. ``lost`` resolves with a TunnelError when it breaks."""

    def __init__(self, tunnel: Tunnel, up: BringUp) -> None:
        self._tunnel = tunnel
        self._troubles = up.troubles
        self.lost = up.lost

    @property
    def can_spawn(self) -> bool:
        """Whether programs can still be started inside; a lost session's namespace may live on without a way out."""
        return not self._tunnel.client.lost.done()

    @property
    def info(self) -> TunnelInfo:
        """Mode, kind, address, MTU… as they are now."""
        return self._tunnel.info()

    def troubles(self) -> list[str]:
        """What could not be read inside since this was last asked (files of CVMFS), each a line; read from logs."""
        return [line for ask_one in self._troubles for line in ask_one()]

    async def spawn(self, argv: Argv, **options: Unpack[SpawnOptions]) -> Process:
        """Start a program inside the tunnel; it ends with the session, at the latest.

        Raises FileNotFoundError or PermissionError as exec does, TunnelError when the tunnel is gone.
        """
        return await self._tunnel.client.spawn(argv, **options)

    async def probe(self, targets: Sequence[str], timeout: float = 20.0) -> list[ProbeResult]:
        """Ask each target (``root://…``, ``http(s)://…``, ``cvmfs:REPO``, ``dns:NAME``) from inside; in their
        order.

        ``timeout`` is for each, in seconds; they run together.
        """
        return await ask(self.spawn, targets, timeout)

    async def diagnose(self) -> Diagnosis:
        """Who to ask about the TCP connections of programs inside; raises OSError, TunnelError."""
        client = self._tunnel.client
        if isinstance(client, ShimClient):
            return Diagnosis(diagnosing_sockets(), client.gates)
        if self.info.mode in WITHOUT_NAMESPACE or not isinstance(client, Client):
            return Diagnosis([])
        packet = await client.request(Diagnose(client.number()))
        return Diagnosis([socket.socket(fileno=fd) for fd in packet.fds])


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
                tunnel = await _bring_up(config, up)
        except TimeoutError:
            layer, step = up.step
            raise TunnelError(layer, f"{step} took more than {config.bring_up_timeout:g} s") from None
        except OSError as error:
            layer, step = up.step
            raise TunnelError(layer, f"{step} failed: {error}") from None
        yield Session(tunnel, up)


async def _bring_up(config: TunnelConfig, up: BringUp) -> Tunnel:
    """The mode's tunnel, and CVMFS through it."""
    if config.mode == "auto":
        return await auto.bring_up(config, up, _bring_up)
    wanted = config.cvmfs
    if wanted is None:
        return await BRING_UP[config.mode](config, up)
    missing = await cvmfs.look(wanted, up)
    if config.mode in WITHOUT_NAMESPACE and (missing or wanted.images):
        up.step = ("user namespaces", "making a namespace for mounts")
        namespace = await open_namespace(up.keeper, network="host", new_session=up.new_session)
        up.stack.push_async_callback(namespace.close)
        up.keeper = namespace.client
        up.keeper.lost.add_done_callback(lambda future: up.lose(future.result()))
    tunnel = await BRING_UP[config.mode](config, up)
    holder = tunnel.client if isinstance(tunnel.client, Client) else up.keeper
    room = await cvmfs.provide(wanted, missing, holder, up)
    await cvmfs.prove(wanted, tunnel.client, up, room)
    return tunnel
