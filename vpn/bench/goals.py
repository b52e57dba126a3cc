"""What the tunnels are meant to reach, and whether a run shows it. Pure.

A ratio is of native in the same run. A goal whose link is not the run's is left out; one whose way was not measured is
shown as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vpn.bench.figures import median, ratio
from vpn.bench.plan import Link
from vpn.bench.report import Report, Row, Verdict

FILLED = 0.9
"""Native fills a link when it gets this much of its nominal rate: less is the machine's limit, not the link's."""
OF_NATIVE = ", of native"
MANY = 20
STANDARD, LONG = "standard", "long"
UNSHAPED = "unshaped"


@dataclass(frozen=True)
class Goal:
    """``kind`` of link; a part of native for ``workers`` workers."""

    kind: str
    labels: tuple[str, ...]
    limit: float
    workers: int = 1


# Labels of a goal's way, the first that was measured counts; a label is `MODE` or `MODE:setting=value`.
RATIOS = (
    Goal(STANDARD, ("relay",), 0.95),
    Goal(STANDARD, ("openconnect",), 0.95),
    Goal(STANDARD, ("plain",), 0.70),
    Goal(STANDARD, ("socks",), 0.90),
    Goal(STANDARD, ("relay",), 0.98, MANY),
    Goal(STANDARD, ("openconnect",), 0.98, MANY),
    Goal(STANDARD, ("socks",), 0.98, MANY),
    Goal(LONG, ("relay",), 0.90),
    Goal(LONG, ("openconnect",), 0.90),
    Goal(UNSHAPED, ("relay:tls=no", "relay:tls=false"), 0.45),
    Goal(UNSHAPED, ("relay",), 0.25),
    Goal(UNSHAPED, ("openconnect",), 0.30),
)
PROTOTYPE_TIMES = 4.0
BRING_UP = {"relay": 1.0, "openconnect": 3.0}
ADDED_ROUND_TRIP = {"relay": 0.0005, "openconnect": 0.001}
COPY_TIMES = 1.05


def kind_of(link: Link | None) -> str:
    """Which goals a link asks for; a user's own link, which is not known, the standard ones."""
    if link is None:
        return STANDARD
    if not link.rate:
        return UNSHAPED
    return LONG if link.round_trip >= 0.1 else STANDARD


def judge(report: Report, link: Link | None) -> list[Verdict]:
    """Every goal that this link has."""
    return [*_ratios(report, link), *_prototype(report), *_bring_up(report), *_round_trips(report), *_copies(report)]


def _ratios(report: Report, link: Link | None) -> Iterator[Verdict]:
    kind = kind_of(link)
    for goal in RATIOS:
        row = next((found for label in goal.labels if (found := report.row(label))), None)
        if goal.kind != kind or not _measured(report, goal.workers):
            continue
        flows = "1 flow" if goal.workers == 1 else f"{goal.workers} workers"
        for direction in ("up", "down"):
            name = f"{goal.labels[0]}, {flows} {direction}{OF_NATIVE}"
            yield _at_least(name, goal.limit, *_ratio(report, row, goal, direction, link))


def _measured(report: Report, workers: int) -> bool:
    return any(point.workers == workers for point in report.native.points)


def _ratio(
    report: Report, row: Row | None, goal: Goal, direction: str, link: Link | None
) -> tuple[float | None, str, bool]:
    """Value, note, and whether it counts."""
    if row is None:
        return None, "", True
    value = report.of_native(row, direction, goal.workers)
    native = report.native.rate(direction, goal.workers)
    if link is not None and link.rate and native is not None and native < FILLED * link.rate:
        return value, f"native itself fills only {native / link.rate:.2f} of the link: this machine is too slow", False
    return value, row.problem, True


def _at_least(name: str, limit: float, value: float | None, note: str, counts: bool) -> Verdict:
    # Two digits are what the goals are given in.
    ok = None if value is None or not counts else round(value, 2) >= limit
    return Verdict(name, limit, value, ok, note or ("not measured" if value is None else ""))


def _at_most(name: str, limit: float, value: float | None, note: str = "") -> Verdict:
    ok = None if value is None else value <= limit
    return Verdict(name, limit, value, ok, note or ("not measured" if value is None else ""))


def _prototype(report: Report) -> Iterator[Verdict]:
    ours, theirs = report.row("openconnect"), report.row("prototype")
    if ours is None or theirs is None:
        return
    for direction in ("up", "down"):
        times = ratio(ours.rate(direction, 1), theirs.rate(direction, 1))
        yield _at_least(f"openconnect, 1 flow {direction}, times prototype", PROTOTYPE_TIMES, times, "", True)


def _bring_up(report: Report) -> Iterator[Verdict]:
    for mode, limit in BRING_UP.items():
        if row := report.row(mode):
            yield _at_most(f"{mode}, bring-up, s", limit, row.bring_up, row.problem)


def _round_trips(report: Report) -> Iterator[Verdict]:
    for mode, limit in ADDED_ROUND_TRIP.items():
        if row := report.row(mode):
            added = report.added_round_trip(row)
            value = None if added is None else 1e3 * added
            yield _at_most(f"{mode}, added round trip, ms", 1e3 * limit, value, row.problem)


def _copies(report: Report) -> Iterator[Verdict]:
    row = report.row("relay")
    if report.native.copies:
        times = ratio(median(row.copies), median(report.native.copies)) if row else None
        yield _at_most("relay, time of xrdcp, times native", COPY_TIMES, times, row.problem if row else "")
