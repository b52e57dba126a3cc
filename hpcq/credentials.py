"""The manager's way to gateways' credentials: issued for one pilot, revoked at its end.

A pilot asks for one whenever it makes a tunnel. With several gateways (``--gateway A,B``) the next is chosen then
(`vpn.Choice`): pilots spread over them, and leave one that is gone or of no use.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from hpcq import messages as m
from hpcq import servers, transport
from hpcq.roster import Entry
from vpn import Choice, GatewayClient, VpnError

log = logging.getLogger("hpcq.manager")

LAST = 30.0
"""Seconds a gateway has to give a credential,"""
QUICK = 3.0
"""and while there is another to ask."""


class Credentials(Protocol):
    """Where one-login credentials of tunnels come from; may block, called in a worker thread."""

    def issue(self, gateway: str, label: str, deadline: float) -> tuple[str, bytes]:
        """A credential's user name and the bytes for the pilot; ``deadline`` in seconds."""

    def revoke(self, gateway: str, username: str) -> None:
        """Withdraw it; unknown names are ignored."""


class GatewayCredentials:
    """Asks the gateway of the same user on this host, by name, over its control socket; at a server of the user's own
    every pilot is whom the queue keeps for it.
    """

    def __init__(self, queue: str) -> None:
        self._queue = queue

    def issue(self, gateway: str, label: str, deadline: float) -> tuple[str, bytes]:
        """A new one-login credential's user name, and the credential as bytes.

        Raises:
            VpnError: no such gateway is running here, or it refused, or does not answer.
        """
        if servers.is_server(gateway):
            kept = servers.credential(self._queue, gateway)
            return kept.username, kept.to_bytes()
        credential = GatewayClient(gateway).issue(label, deadline)
        return credential.username, credential.to_bytes()

    def revoke(self, gateway: str, username: str) -> None:
        """Withdraw a credential.

        Raises:
            VpnError: the gateway does not answer.
        """
        if not servers.is_server(gateway):
            GatewayClient(gateway).revoke(username)


class CredentialDesk:
    """Hands credentials to pilots and takes them back. In the manager's thread; a gateway is asked in another."""

    def __init__(self, credentials: Credentials, spawn: Callable[..., Any]) -> None:
        self._credentials = credentials
        self._spawn = spawn
        self._choice = Choice()
        self._refused: dict[str, str] = {}
        self._revoking: dict[str, asyncio.Lock] = {}

    async def issue(self, link: transport.Link, entry: Entry) -> None:
        """Answer a pilot's request; a pilot that has gone meanwhile has its credential revoked."""
        try:
            gateway, username, credential = await self._obtain(entry)
        except Exception as error:
            message = str(error) or type(error).__name__
            again = self._refused.get(entry.gateway) == message  # pilots ask again and again: say it once
            self._refused[entry.gateway] = message
            log.log(logging.INFO if again else logging.WARNING, "no credential for pilot %s: %s", entry.name, message)
            link.send(m.CredentialReply(b"", message))
            return
        self._refused.pop(entry.gateway, None)
        entry.credentials = {**entry.credentials, username: gateway}
        entry.tunnel_gateway = gateway
        if link.is_open:
            link.send(m.CredentialReply(credential))
        else:
            self.revoke(entry, username)

    async def _obtain(self, entry: Entry) -> tuple[str, str, bytes]:
        """The gateway, a user name there, and the credential; raises what the gateways said, each its own."""
        order = self._choice.order(servers.gateways_of(entry.gateway), entry.tunnel_gateway, _now())
        problems: list[str] = []
        for gateway in order:
            deadline = LAST if gateway == order[-1] else QUICK
            self._choice.took(gateway)
            try:
                issued = await asyncio.to_thread(self._credentials.issue, gateway, entry.name, deadline)
            except BaseException as error:
                self._choice.left(gateway)
                if not isinstance(error, Exception):
                    raise
                self._choice.failed(gateway, _now())
                problems.append(str(error) or type(error).__name__)
            else:
                self._choice.served(gateway)
                return gateway, *issued
        raise VpnError("; ".join(problems))

    def revoke(self, entry: Entry, username: str) -> None:
        """Have a pilot's credential revoked; one that is not its own is left alone."""
        gateway = entry.credentials.get(username)
        if gateway is not None:
            entry.credentials = {name: at for name, at in entry.credentials.items() if name != username}
            self._choice.left(gateway)
            self._spawn(self._revoke, gateway, username)

    async def _revoke(self, gateway: str, username: str) -> None:
        """One at a time at each gateway: one that hangs holds one thread, not all those that others are asked in."""
        async with self._revoking.setdefault(gateway, asyncio.Lock()):
            try:
                await asyncio.to_thread(self._credentials.revoke, gateway, username)
            except Exception as error:
                self._choice.failed(gateway, _now())
                log.warning("credential %s was not revoked: %s", username, error)


def _now() -> float:
    return asyncio.get_running_loop().time()
