"""Who may use the relay: one-time passwords, the sessions they open, and their tokens. Pure: time is an argument.

``issued`` → (a login with the password) → ``open`` ⇄ ``away`` → gone. The first login spends the password; from
then on only the token counts, which was sent to whoever logged in. A session whose connection breaks is away for
``AWAY_LIFETIME`` and may come back by its token; one that ends in order, or is revoked, is gone.
Only digests are kept.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal

AWAY_LIFETIME = 300.0  # seconds
FIRST_DELAY, LONGEST_DELAY = 0.5, 8.0  # seconds a wrong login is held up, doubling with each from one address
FORGET_WRONG = 600.0  # seconds after which an address starts anew
WRONG_LIMIT = 4096  # addresses remembered

Admission = Literal["password", "token", "spent", "wrong"]


@dataclass
class _Ticket:
    password: bytes
    tokens: tuple[bytes, ...] = ()  # of the session's last two connections: one may be in use while it comes back
    state: Literal["issued", "logged in", "open", "away"] = "issued"
    until: float = 0.0


class Tickets:
    """All that may log in."""

    def __init__(self) -> None:
        self._tickets: dict[str, _Ticket] = {}
        self._wrong: dict[str, tuple[int, float]] = {}

    def add(self, username: str, password: str) -> None:
        """A fresh one."""
        self._tickets[username] = _Ticket(digest_of(password.encode()))

    def restore(self, username: str, digest: bytes) -> None:
        """One of an earlier gateway of this name, by the digest of its password."""
        self._tickets[username] = _Ticket(digest)

    def spend(self, username: str) -> None:
        """Its password was used elsewhere."""
        ticket = self._tickets.get(username)
        if ticket is not None and ticket.state == "issued":
            del self._tickets[username]

    def admit(self, username: str, password: bytes) -> Admission:
        """Whether a login is right; the right password is spent by it."""
        ticket = self._tickets.get(username)
        given = digest_of(password)
        if ticket is None:
            return "wrong"
        if hmac.compare_digest(given, ticket.password):
            if ticket.state != "issued":
                return "spent"
            ticket.state = "logged in"
            return "password"
        return "token" if any(hmac.compare_digest(given, token) for token in ticket.tokens) else "wrong"

    def open(self, username: str) -> str:
        """Its session begins, or comes back: a new token; "" if it is gone."""
        ticket = self._tickets.get(username)
        if ticket is None:
            return ""
        token = secrets.token_urlsafe(32)
        ticket.tokens = (digest_of(token.encode()), *ticket.tokens[:1])
        ticket.state = "open"
        return token

    def never_opened(self, username: str) -> bool:
        """Whether it logged in and opened no session."""
        ticket = self._tickets.get(username)
        return ticket is not None and ticket.state == "logged in"

    def is_away(self, username: str) -> bool:
        """Whether its session waits to come back."""
        ticket = self._tickets.get(username)
        return ticket is not None and ticket.state == "away"

    def leave(self, username: str, now: float) -> None:
        """Its connection broke."""
        ticket = self._tickets.get(username)
        if ticket is not None:
            ticket.state, ticket.until = "away", now + AWAY_LIFETIME

    def remove(self, username: str) -> bool:
        """It ended or was revoked; whether it was known."""
        return self._tickets.pop(username, None) is not None

    def expire(self, now: float) -> list[str]:
        """Those away for too long, which are removed."""
        gone = [name for name, ticket in self._tickets.items() if ticket.state == "away" and ticket.until <= now]
        for name in gone:
            del self._tickets[name]
        return gone

    def penalty(self, address: str, now: float) -> float:
        """Note a wrong login; the seconds to hold up its answer."""
        count, last = self._wrong.pop(address, (0, now))
        count = 0 if now - last > FORGET_WRONG else count
        while len(self._wrong) >= WRONG_LIMIT:
            del self._wrong[next(iter(self._wrong))]
        self._wrong[address] = (count + 1, now)
        return float(min(LONGEST_DELAY, FIRST_DELAY * 2 ** min(count, 10)))


def digest_of(secret: bytes) -> bytes:
    """Passwords and tokens are random and long: one round is enough."""
    return hashlib.sha256(secret).digest()
