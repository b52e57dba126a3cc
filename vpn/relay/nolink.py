"""In place of a session at a gateway, for a data plane that serves only what is reached from this host itself."""

from __future__ import annotations

import asyncio
import errno
import os

from vpn.errors import TunnelError
from vpn.relay.link import Link
from vpn.relay.pump import End
from vpn.relay.tls import TlsStream


class NoLink(Link):
    """A link that is never lost, and leads nowhere: OSError with ENETUNREACH."""

    def __init__(self) -> None:
        self.server = self.cipher = ""
        self.has_ipv6 = False
        self.lost: asyncio.Future[TunnelError] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to end."""

    async def connect(self, host: str, port: int) -> End:
        """Refused."""
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH), f"{host} port {port}")

    async def associate(self) -> TlsStream:
        """Refused."""
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    async def resolve(self) -> TlsStream:
        """Refused."""
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
