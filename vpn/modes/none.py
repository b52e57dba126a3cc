"""Mode ``none``: programs run on the host's own network, with the same care for their end."""

from __future__ import annotations

from dataclasses import dataclass

from vpn.config import TunnelConfig
from vpn.modes.base import BringUp, TunnelInfo
from vpn.process import Client


@dataclass(frozen=True)
class Direct:
    """No tunnel: the keeper outside starts programs."""

    client: Client
    seconds: float

    def info(self) -> TunnelInfo:
        """Only how long the keeper took."""
        return TunnelInfo("none", bring_up_seconds=self.seconds)


async def bring_up(_config: TunnelConfig, up: BringUp) -> Direct:
    """Nothing to bring up."""
    up.keeper.lost.add_done_callback(lambda future: up.lose(future.result()))
    return Direct(up.keeper, up.keeper.loop.time() - up.started_at)
