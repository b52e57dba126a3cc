"""The manager's way to a gateway's credentials: issued for one pilot, revoked at its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from hpcq import messages as m
from hpcq import transport
from hpcq.roster import Entry
from vpn import GatewayClient

log = logging.getLogger("hpcq.manager")


class Credentials(Protocol):
    """Where one-login credentials of tunnels come from; may block, called in a worker thread."""

    def issue(self, gateway: str, label: str) -> tuple[str, bytes]:
        """A credential's user name and the bytes for the pilot."""

    def revoke(self, gateway: str, username: str) -> None:
        """Withdraw it; unknown names are ignored."""


class GatewayCredentials:
    """Asks the gateway of the same user on this host, by name, over its control socket."""

    def issue(self, gateway: str, label: str) -> tuple[str, bytes]:
        """A new one-login credential's user name, and the credential as bytes.

        Raises:
            VpnError: no such gateway is running here, or it refused.
        """
        credential = GatewayClient(gateway or "default").issue(label)
        return credential.username, credential.to_bytes()

    def revoke(self, gateway: str, username: str) -> None:
        """Withdraw a credential.

        Raises:
            VpnError: the gateway does not answer.
        """
        GatewayClient(gateway or "default").revoke(username)


class CredentialDesk:
    """Hands credentials to pilots and takes them back. In the manager's thread; a gateway is asked in another."""

    def __init__(self, credentials: Credentials, spawn: Callable[..., Any]) -> None:
        self._credentials = credentials
        self._spawn = spawn
        self._refused: dict[str, str] = {}

    async def issue(self, link: transport.Link, entry: Entry) -> None:
        """Answer a pilot's request; a pilot that has gone meanwhile has its credential revoked."""
        try:
            username, credential = await asyncio.to_thread(self._credentials.issue, entry.gateway, entry.name)
        except Exception as error:
            message = str(error) or type(error).__name__
            again = self._refused.get(entry.gateway) == message  # pilots ask again and again: say it once
            self._refused[entry.gateway] = message
            log.log(logging.INFO if again else logging.WARNING, "no credential for pilot %s: %s", entry.name, message)
            link.send(m.CredentialReply(b"", message))
            return
        self._refused.pop(entry.gateway, None)
        entry.credentials = [*entry.credentials, username]
        if link.is_open:
            link.send(m.CredentialReply(credential))
        else:
            self.revoke(entry, username)

    def revoke(self, entry: Entry, username: str) -> None:
        """Have a pilot's credential revoked; one that is not its own is left alone."""
        if username in entry.credentials:
            entry.credentials = [name for name in entry.credentials if name != username]
            self._spawn(self._revoke, entry.gateway, username)

    async def _revoke(self, gateway: str, username: str) -> None:
        try:
            await asyncio.to_thread(self._credentials.revoke, gateway, username)
        except Exception as error:
            log.warning("credential %s was not revoked: %s", username, error)
