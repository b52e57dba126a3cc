"""The gateway's credentials: who was given one, and what became of it. A pure book; the server acts on its
answers.

States: issued → connected ⇄ disconnected → (revoked, forgotten). The first login spends the password: from then on
only the session's cookie, which ocserv keeps, can connect again. Cookies do not outlive ocserv. So a gateway that is
started again accepts each password of those that were connected once more (``restored``), and those that were never
used as before. So does one of whose processes one was started again, for those that this one served.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from vpn.gateway.control import Pilot
from vpn.gateway.ocserv import Event
from vpn.gateway.passwords import hash_password
from vpn.gateway.plane_messages import Figure
from vpn.gateway.tickets import digest_of

UNUSED_LIFETIME = 3600.0  # seconds a credential waits for its login
UNUSED = ("issued", "restored")  # states in which the password is good
RELAY = "relay"  # the worker of an event that is the relay's, not ocserv's


class Saved(msgspec.Struct, frozen=True):
    """A credential as it is kept on disk, for a gateway that is started again; ``until`` in seconds of the epoch.

    The hash is for ocserv, the digest for the relay. Both are of a random password: of no use to who reads them, but
    nobody else's business either.
    """

    label: str
    username: str
    hash: str
    digest: bytes
    until: float
    used: bool


@dataclass
class Entry:
    """One credential; unused, its password is good until ``until`` (seconds of the epoch)."""

    label: str
    username: str
    hash: str
    digest: bytes
    until: float
    state: str = "issued"
    address: str = ""
    workers: set[str] = field(default_factory=set)
    absences: int = 0
    relayed: bool = False  # who connected last did so by the relay


class Book:
    """All credentials of a gateway."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def issue(self, label: str, now: float) -> tuple[str, str]:
        """A fresh user and password."""
        username, password = f"pilot-{secrets.token_hex(8)}", secrets.token_urlsafe(24)
        digest = digest_of(password.encode())
        self._entries[username] = Entry(label, username, hash_password(password), digest, now + UNUSED_LIFETIME)
        return username, password

    def restore(self, saved: Iterable[Saved], now: float) -> None:
        """Take over what an earlier gateway of this name had; a clock that was set back shortens nothing."""
        for one in saved:
            until = now + UNUSED_LIFETIME if one.used else min(one.until, now + UNUSED_LIFETIME)
            if until > now:
                state = "restored" if one.used else "issued"
                self._entries[one.username] = Entry(one.label, one.username, one.hash, one.digest, until, state)

    def saved(self) -> list[Saved]:
        """What to keep."""
        return [
            Saved(entry.label, entry.username, entry.hash, entry.digest, entry.until, entry.state != "issued")
            for entry in self._entries.values()
        ]

    def passwords(self) -> list[tuple[str, str]]:
        """User and hash of those who may log in with a password."""
        return [(entry.username, entry.hash) for entry in self._entries.values() if entry.state in UNUSED]

    def digests(self) -> list[tuple[str, bytes]]:
        """User and digest of those who may log in with a password."""
        return [(entry.username, entry.digest) for entry in self._entries.values() if entry.state in UNUSED]

    def on_event(self, event: Event) -> bool:
        """Note a connection or its end; True when it spent the password, which is then to be withdrawn."""
        entry = self._entries.get(event.username)
        if entry is None:
            return False
        if event.reason == "disconnect":
            entry.workers.discard(event.worker)
            if not entry.workers and entry.state not in (*UNUSED, "disconnected"):
                entry.state = "disconnected"
                entry.absences += 1
            return False
        first = entry.state in UNUSED
        entry.workers.add(event.worker)
        entry.state, entry.address, entry.relayed = "connected", event.address, event.worker == RELAY
        return first

    def lost(self, *, relayed: bool, now: float) -> None:
        """What served them, the relay or ocserv, has ended with all it knew of its clients: their passwords are good
        once more.
        """
        for entry in self._entries.values():
            if entry.state not in UNUSED and entry.relayed == relayed:
                entry.state, entry.until = "restored", now + UNUSED_LIFETIME
                entry.workers.clear()

    def forget(self, username: str) -> str:
        """Remove a credential; the state it was in, "" when unknown."""
        entry = self._entries.pop(username, None)
        return entry.state if entry else ""

    def deadlines(self) -> list[float]:
        """When passwords that are good expire, seconds of the epoch."""
        return sorted({entry.until for entry in self._entries.values() if entry.state in UNUSED})

    def expired(self, now: float) -> list[str]:
        """Users of passwords whose time has passed unused."""
        return [entry.username for entry in self._entries.values() if entry.state in UNUSED and entry.until <= now]

    def absence(self, username: str) -> int:
        """Which absence this is of one that was connected and is not now, counted from 1; else 0."""
        entry = self._entries.get(username)
        return entry.absences if entry is not None and entry.state == "disconnected" else 0

    def workers(self) -> list[str]:
        """The processes of ocserv that serve a client each, by their number in its namespace."""
        return [worker for entry in self._entries.values() for worker in entry.workers if worker.isdecimal()]

    def is_known(self, username: str) -> bool:
        """Whether it was issued and not revoked."""
        return username in self._entries

    def label(self, username: str) -> str:
        """Whom it was made for; "" when unknown."""
        entry = self._entries.get(username)
        return entry.label if entry else ""

    def pilots(self, figures: dict[str, Figure]) -> list[Pilot]:
        """For a status report."""
        return [_pilot(entry, figures.get(entry.username, Figure(0, 0, 0, 0))) for entry in self._entries.values()]


def _pilot(entry: Entry, figure: Figure) -> Pilot:
    address = entry.address if entry.state == "connected" else ""
    return Pilot(entry.label, entry.username, entry.state, address, figure.open, figure.up, figure.down)
