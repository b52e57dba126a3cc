"""What a run found, as data: what ``--json`` prints and the table, the goals and the plot are made of. Pure."""

from __future__ import annotations

import msgspec

from vpn.bench.figures import median, ratio
from vpn.modes.base import TunnelInfo


class Point(msgspec.Struct):
    """One kind of transfer over one way: a list has an entry a round. Bits and CPU seconds, bytes per GB = 1e9."""

    direction: str
    workers: int
    bits_per_second: list[float] = []
    fairness: list[float] = []
    cpu_node: list[float] = []
    """CPU seconds per GB of the tunnel's processes on the compute node."""
    cpu_gateway: list[float] = []
    problem: str = ""

    @property
    def rate(self) -> float | None:
        """The median, in bits per second."""
        return median(self.bits_per_second)


class Row(msgspec.Struct):
    """One way: native, or a tunnel. Times in seconds."""

    label: str
    mode: str
    info: TunnelInfo | None = None
    bring_up: float | None = None
    round_trips: list[float] = []
    """An entry a round."""
    copies: list[float] = []
    points: list[Point] = []
    problem: str = ""

    @property
    def round_trip(self) -> float | None:
        """The median."""
        return median(self.round_trips)

    def point(self, direction: str, workers: int) -> Point:
        """The point of a kind of transfer; made when it is not there."""
        for point in self.points:
            if (point.direction, point.workers) == (direction, workers):
                return point
        self.points.append(Point(direction, workers))
        return self.points[-1]

    def rate(self, direction: str, workers: int) -> float | None:
        """Bits per second, or None when it was not measured."""
        found = [p for p in self.points if (p.direction, p.workers) == (direction, workers)]
        return found[0].rate if found else None


class Verdict(msgspec.Struct, frozen=True):
    """One goal: ``value`` None means it was not measured, with ``note`` saying why."""

    goal: str
    limit: float
    value: float | None
    ok: bool | None
    note: str = ""


class Report(msgspec.Struct):
    """A whole run. ``link`` as on the command line, "" when it is not known."""

    date: str
    hosts: dict[str, str]
    link: str
    server: str
    settings: dict[str, float | int | str]
    rows: list[Row] = []
    goals: list[Verdict] = []

    def row(self, label: str) -> Row | None:
        """The row of this label."""
        return next((row for row in self.rows if row.label == label), None)

    @property
    def native(self) -> Row:
        """The first row."""
        return self.rows[0]

    def of_native(self, row: Row, direction: str, workers: int) -> float | None:
        """Median rate as a part of native's."""
        return ratio(row.rate(direction, workers), self.native.rate(direction, workers))

    def added_round_trip(self, row: Row) -> float | None:
        """Seconds a round trip takes longer than native."""
        if row.round_trip is None or self.native.round_trip is None:
            return None
        return row.round_trip - self.native.round_trip
