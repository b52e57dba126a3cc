"""What every tunnel mode offers a session. A mode is a coroutine ``bring_up(config, up)`` returning a
``Tunnel``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Protocol, Unpack

import msgspec

from vpn.errors import Layer, TunnelError
from vpn.process import Argv, Client, Process, SpawnOptions

PLAIN = "TCP"
"""A kind: what programs send is not encrypted on its way to the gateway."""


class TunnelInfo(msgspec.Struct, frozen=True):
    """What came up: ``kind`` is DTLS, TLS, TCP, SOCKS5, pasta, slirp4netns or "" (mode none), ``mtu`` in bytes, times
    in seconds.

    ``passed_over``: a line for each mode (auto) or program (slirp) that was not chosen, with the reason.
    """

    mode: str
    kind: str = ""
    cipher: str = ""
    bring_up_seconds: float = 0.0
    address: str = ""
    mtu: int = 0
    server: str = ""
    dns: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


class Spawner(Protocol):
    """What starts programs inside: a keeper's client, or one that prepares them first."""

    lost: asyncio.Future[TunnelError]

    async def spawn(self, argv: Argv, **options: Unpack[SpawnOptions]) -> Process:
        """As ``Client.spawn``."""


class Tunnel(Protocol):
    """A tunnel that is up."""

    @property
    def client(self) -> Spawner:
        """Starts programs inside."""

    def info(self) -> TunnelInfo:
        """As it is now: a kind can change while it runs."""


@dataclass
class BringUp:
    """The session's side of a bring-up: where to push what must be undone, and where to say what is being
    done.
    """

    keeper: Client
    stack: AsyncExitStack
    lost: asyncio.Future[TunnelError]
    started_at: float
    new_session: bool = True
    step: tuple[Layer, str] = field(default=("tunnel", "starting"))
    troubles: list[Callable[[], list[str]]] = field(default_factory=list)
    """Each says what went wrong inside, without the tunnel being lost for it, since it was last asked."""

    def lose(self, error: TunnelError) -> None:
        """The tunnel broke; the first reason counts."""
        if not self.lost.done():
            self.lost.set_result(error)


async def stop(task: asyncio.Task[None]) -> None:
    """End a task of a tunnel's, whatever it meets."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
