"""Hosts on which nothing more is placed: because the user said so, or because things fail there and only there."""

from __future__ import annotations

import math

from hpcq.outcome import Outcome
from hpcq.scheduler.pilots import Pilot

FAILURES = 5
"""Crashes and failed starts in a row on one host after which it is blocked, if the others do fine."""

FINE = 4
"""Others do fine if, meanwhile, so many tasks succeeded there for each failure, and at least `FAILURES`."""

PAUSE = 900.0
"""Seconds for which a host is blocked when nobody told to."""


class Host:
    """One host: its pilots, its failures in a row and how all hosts together stood when those began."""

    __slots__ = ("bad_before", "failures", "good_before", "name", "pilots", "until", "why")

    def __init__(self, name: str) -> None:
        self.name = name
        self.pilots: dict[Pilot, None] = {}
        self.failures = self.good_before = self.bad_before = 0
        self.until = -math.inf
        self.why = ""

    @property
    def blocked(self) -> bool:
        """Whether nothing may be placed here."""
        return bool(self.why)


class Hosts:
    """All hosts that have pilots, failures or a block."""

    def __init__(self) -> None:
        self._hosts: dict[str, Host] = {}
        self._timed: dict[Host, None] = {}
        self._good = self._bad = 0

    def __getitem__(self, name: str) -> Host:
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = Host(name)
        return host

    def why(self, name: str) -> str:
        """Why the host is blocked; empty if it is not."""
        host = self._hosts.get(name)
        return host.why if host else ""

    @property
    def wants_tick(self) -> bool:
        """Whether a block ends with time."""
        return bool(self._timed)

    def arrived(self, pilot: Pilot) -> None:
        """A pilot runs there."""
        host = self[pilot.host]
        host.pilots[pilot] = None
        pilot.blocked = host.blocked

    def left(self, pilot: Pilot) -> None:
        """It does no more."""
        host = self[pilot.host]
        host.pilots.pop(pilot, None)
        if not host.pilots and not host.failures and not host.blocked:
            del self._hosts[host.name]

    def ended(self, name: str, outcome: str) -> bool:
        """A task ended there; returns whether the host should be blocked for it."""
        if outcome == Outcome.SUCCESS:
            self._good += 1
            self[name].failures = 0
            return False
        return outcome == Outcome.CRASH and self.failed(name)

    def failed(self, name: str) -> bool:
        """Something failed there; returns whether the host should be blocked for it."""
        host = self[name]
        if not host.failures:
            host.good_before, host.bad_before = self._good, self._bad
        host.failures += 1
        self._bad += 1
        if host.failures < FAILURES or host.blocked or not name:
            return False
        good_elsewhere = self._good - host.good_before
        bad_elsewhere = self._bad - host.bad_before - host.failures
        return good_elsewhere >= max(FAILURES, FINE * bad_elsewhere)

    def block(self, name: str, until: float, why: str) -> list[Pilot]:
        """Use it no more; returns its pilots."""
        host = self[name]
        host.until, host.why, host.failures = until, why, 0
        self._timed.pop(host, None)
        if until != math.inf:
            self._timed[host] = None
        return self._mark(host)

    def unblock(self, name: str) -> list[Pilot]:
        """Use it again; returns its pilots."""
        host = self[name]
        host.why = ""
        self._timed.pop(host, None)
        pilots = self._mark(host)
        if not pilots:
            del self._hosts[name]
        return pilots

    def _mark(self, host: Host) -> list[Pilot]:
        for pilot in host.pilots:
            pilot.blocked = host.blocked
        return list(host.pilots)

    def expired(self, now: float) -> list[str]:
        """The hosts whose block is over."""
        return [host.name for host in self._timed if host.until <= now]
