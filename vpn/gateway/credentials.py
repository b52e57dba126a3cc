"""The gateway's credentials: who was given one, and what became of it. A pure book; the daemon acts on its
answers.

States: issued → connected ⇄ disconnected → (revoked, forgotten). The first login spends the password: from
then on only the session's cookie, which ocserv keeps, can connect again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from vpn.gateway.control import Pilot
from vpn.gateway.ocserv import Event

UNUSED_LIFETIME = 3600.0  # seconds a credential waits for its login


@dataclass
class Entry:
    """One credential."""

    label: str
    username: str
    state: str = "issued"
    address: str = ""
    workers: set[str] = field(default_factory=set)


class Book:
    """All credentials of a gateway."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def issue(self, label: str) -> tuple[str, str]:
        """A fresh user and password."""
        username = f"pilot-{secrets.token_hex(8)}"
        self._entries[username] = Entry(label, username)
        return username, secrets.token_urlsafe(24)

    def on_event(self, event: Event) -> bool:
        """Note a connection or its end; True when it spent the password, which is then to be withdrawn."""
        entry = self._entries.get(event.username)
        if entry is None:
            return False
        if event.reason == "disconnect":
            entry.workers.discard(event.worker)
            if not entry.workers:
                entry.state, entry.address = "disconnected", ""
            return False
        first = entry.state == "issued"
        entry.workers.add(event.worker)
        entry.state, entry.address = "connected", event.address
        return first

    def forget(self, username: str) -> str:
        """Remove a credential; the state it was in, "" when unknown."""
        entry = self._entries.pop(username, None)
        return entry.state if entry else ""

    def forget_disconnected(self, username: str) -> None:
        """Drop a credential whose cookie has expired as well."""
        entry = self._entries.get(username)
        if entry is not None and entry.state == "disconnected":
            del self._entries[username]

    def is_unused(self, username: str) -> bool:
        """Whether it still waits for its login."""
        entry = self._entries.get(username)
        return entry is not None and entry.state == "issued"

    def is_known(self, username: str) -> bool:
        """Whether it was issued and not revoked."""
        return username in self._entries

    def pilots(self) -> list[Pilot]:
        """For a status report."""
        return [Pilot(entry.label, entry.username, entry.state, entry.address) for entry in self._entries.values()]
