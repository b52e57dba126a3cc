"""The manager's way to a gateway's credentials: issued for one pilot, revoked at its end."""

from __future__ import annotations

from vpn import GatewayClient


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
