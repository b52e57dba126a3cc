"""What will be measured, in which order, and how long it takes. Pure.

Steps are done in rounds, and within a round native and all tunnels take turns at the same work: what disturbs the
machine for a while disturbs all alike, and the median over the rounds leaves it out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vpn.bench.messages import Value
from vpn.config import MODES
from vpn.errors import UsageError

NATIVE = "native"
NOT_MEASURED = ("none", "auto")
"""Modes that are left out unless named: ``none`` is no tunnel, ``auto`` is one of the others."""
PLAIN = "plain"
"""The way through an ocserv that is not ours, run by root: openconnect as it works everywhere."""
UPLINK_OF = {"prototype": "prototype"}
"""Modes that need a gateway of their own kind."""
STEP_OVERHEAD = 0.4
"""Seconds a step takes beside its transfer: connecting, reporting."""
NOT_COPIED = ("prototype", PLAIN)
"""Ways without a copy by xrdcp: it would take most of the time, and no goal asks for it."""
OPEN_SECONDS = 2.5
ROUND_TRIP, COPY = "round trip", "xrdcp"
PINGS, PING_SECONDS, FEWEST_PINGS = 50, 1.0, 10

_LINK = re.compile(r"(?P<rate>\d+(?:\.\d+)?)\s*(?P<unit>[kmg])bit(?:,\s*(?P<ms>\d+(?:\.\d+)?)\s*ms)?", re.IGNORECASE)
_SCALE = {"k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Link:
    """The outer link: bits per second and round trip in seconds; ``rate`` 0: not slowed down."""

    rate: float = 0.0
    round_trip: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Link:
        """``1gbit,20ms``, ``10gbit`` (no round trip of its own) or ``unshaped``; raises UsageError."""
        if text == "unshaped":
            return cls()
        match = _LINK.fullmatch(text.strip())
        if match is None or not float(match["rate"]):
            raise UsageError(f"link {text!r}: write it as 1gbit,20ms or 100mbit,150ms, or unshaped")
        return cls(float(match["rate"]) * _SCALE[match["unit"].lower()], float(match["ms"] or 0) / 1e3)

    def __str__(self) -> str:
        if not self.rate:
            return "unshaped"
        scale, unit = (1e9, "gbit") if self.rate >= 1e9 else (1e6, "mbit")
        return f"{self.rate / scale:g}{unit},{self.round_trip * 1e3:g}ms"


@dataclass(frozen=True)
class Way:
    """One line of the table: ``native``, or a mode with settings of its own (fields of ``TunnelConfig``)."""

    label: str
    mode: str
    options: dict[str, Value] = field(default_factory=dict)
    uplink: str = ""
    """Of the gateway it ends at; "": as gateways usually are."""
    plain: bool = False
    """Whether it ends at no gateway of ours, but at an ocserv run by root."""

    @classmethod
    def parse(cls, text: str) -> Way:
        """``MODE`` or ``MODE:setting=value,…``, where ``uplink`` is its gateway's and the mode may be ``plain``; raises
        UsageError.
        """
        named, _, rest = text.partition(":")
        mode = "openconnect" if named == PLAIN else named
        if mode not in MODES:
            raise UsageError(f"unknown tunnel mode {mode!r}; known: {', '.join((*MODES, PLAIN))}")
        options: dict[str, Value] = {}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            if not name.isidentifier():
                raise UsageError(f"{text!r}: settings are written as {mode}:name=value,…")
            options[name] = _value(value) if equals else True
        uplink = str(options.pop("uplink", UPLINK_OF.get(mode, "")))
        return cls(text, mode, options, uplink, named == PLAIN)


def _value(text: str) -> Value:
    if text in ("true", "yes", "false", "no"):
        return text in ("true", "yes")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.split("+") if "+" in text else text


def default_ways(*, root: bool = False) -> list[Way]:
    """Every mode there is; with ``root``, an ocserv of root's too."""
    names = [mode for mode in MODES if mode not in NOT_MEASURED]
    return [Way.parse(name) for name in [*names, *([PLAIN] if root else [])]]


@dataclass(frozen=True)
class Work:
    """One kind of transfer: its direction, seen from the compute node, and how many workers at once."""

    direction: str
    workers: int


@dataclass(frozen=True)
class Plan:
    """Ways beside native, and what each does in every round. Times in seconds."""

    ways: tuple[Way, ...]
    workers: tuple[int, ...] = (1, 2, 4, 8, 20)
    directions: tuple[str, ...] = ("up", "down")
    rounds: int = 3
    seconds: float = 3.0
    warmup: float | None = None
    """Seconds before what counts; None: by ``round_trip`` and the number of workers."""
    round_trip: float = 0.02
    copies: bool = False
    copy_seconds: float = 2.5

    def __post_init__(self) -> None:
        labels = [way.label for way in self.ways]
        if len(set(labels)) != len(labels):
            raise UsageError(f"a tunnel is named twice: {', '.join(labels)}")
        if not self.workers or min(self.workers) < 1 or max(self.workers) > 200:
            raise UsageError("workers: numbers from 1 to 200, such as 1,2,4,8,20")
        if not set(self.directions) <= {"up", "down"} or not self.directions:
            raise UsageError("directions: up, down, or both")
        if self.rounds < 1 or not 0.2 <= self.seconds <= 120 or not 0 <= (self.warmup or 0) <= 60:
            raise UsageError("at least one round; 0.2 to 120 s a transfer; at most 60 s of warming up")

    @property
    def labels(self) -> list[str]:
        """Native first."""
        return [NATIVE, *(way.label for way in self.ways)]

    @property
    def copied(self) -> list[str]:
        """Those that a copy by xrdcp goes through."""
        named = [way.label for way in self.ways if way.label.partition(":")[0] not in NOT_COPIED]
        return [NATIVE, *named] if self.copies else []

    def works(self) -> list[Work]:
        """Every kind of transfer."""
        return [Work(direction, workers) for workers in self.workers for direction in self.directions]

    def stages(self) -> list[Work | str]:
        """What every way does in a round: round trips, transfers, a copy by xrdcp."""
        return [ROUND_TRIP, *self.works(), *([COPY] if self.copies else [])]

    def steps(self, labels: Sequence[str]) -> Iterator[tuple[int, Work | str, str]]:
        """(round, stage, label) for those that came up; each round begins with another."""
        for number in range(self.rounds):
            first = number % max(1, len(labels))
            turn = [*labels[first:], *labels[:first]]
            for work in self.stages():
                for label in turn:
                    if work != COPY or label in self.copied:
                        yield number, work, label

    def warming(self, workers: int) -> float:
        """Seconds until so many flows have found their rates: some twenty round trips of slow start and of the losses
        at its end for one, more for several that get into each other's way.
        """
        if self.warmup is not None:
            return self.warmup
        return 0.5 + 25 * self.round_trip * (1 + math.log2(workers) / 2)

    def pings(self) -> int:
        """Round trips of one measurement: fewer of long ones."""
        return round(max(FEWEST_PINGS, min(PINGS, PING_SECONDS / max(self.round_trip, 1e-6))))

    def count(self) -> int:
        """Steps there will be."""
        return self.rounds * ((1 + len(self.ways)) * (1 + len(self.works())) + len(self.copied))

    def duration(self) -> float:
        """Seconds the whole will take, about."""
        ways = 1 + len(self.ways)
        one_round = ways * (
            sum(self.warming(work.workers) + self.seconds + STEP_OVERHEAD for work in self.works())
            + self.pings() * self.round_trip
        )
        one_round += len(self.copied) * self.copy_seconds
        return ways * OPEN_SECONDS + self.rounds * one_round
