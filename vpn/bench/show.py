"""A report for people: the table, the goals, the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vpn.bench.figures import median
from vpn.bench.goals import OF_NATIVE
from vpn.bench.report import Point, Report, Row, Verdict
from vpn.errors import UsageError

CHEP = ((1, 196.0), (20, 872.0))
"""Workers and Mbit/s together in the CHEP 2021 paper, whose native rate was the second value."""
HEADS = (
    "way", "direction", "workers", "Mbit/s", "lowest", "highest", "of native", "fairness", "CPU s/GB node",
    "CPU s/GB gateway",
)  # fmt: skip
SETUP_HEADS = ("way", "bring-up s", "round trip ms", "added ms", "xrdcp s", "of native", "how")


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def table(report: Report) -> list[list[str]]:
    """One line for each way and kind of transfer; the heads first."""
    kinds = [(point.workers, point.direction) for point in report.native.points]
    lines = [list(HEADS)]
    for workers, direction in kinds:
        lines += [_line(report, row, row.point(direction, workers)) for row in report.rows if not row.problem]
    return lines


def _line(report: Report, row: Row, point: Point) -> list[str]:
    start = [row.label, point.direction, str(point.workers)]
    if not point.bits_per_second:
        return [*start, f"failed: {point.problem}", *[""] * 6]
    rates = point.bits_per_second
    return [
        *start,
        *(_figure(rate, ".0f", 1e-6) for rate in (point.rate, min(rates), max(rates))),
        _figure(report.of_native(row, point.direction, point.workers), ".2f"),
        _figure(median(point.fairness), ".2f"),
        _figure(median(point.cpu_node), ".2f"),
        _figure(median(point.cpu_gateway), ".2f"),
    ]


def setup_table(report: Report) -> list[list[str]]:
    """What a way costs before and beside its bytes; one that did not come up says why."""
    lines = [list(SETUP_HEADS)]
    native_copy = median(report.native.copies)
    for row in report.rows:
        copy = median(row.copies)
        lines.append(
            [
                row.label,
                "" if row.label == report.native.label else _figure(row.bring_up, ".2f"),
                _figure(row.round_trip, ".3f", 1e3),
                "" if row is report.native else _figure(report.added_round_trip(row), ".3f", 1e3),
                _figure(copy, ".2f"),
                _figure(copy / native_copy if copy and native_copy else None, ".2f"),
                row.problem or _how(row),
            ]
        )
    return lines


def _how(row: Row) -> str:
    info = row.info
    if info is None:
        return ""
    return " ".join(filter(None, [info.kind, info.cipher, f"MTU {info.mtu}" if info.mtu else ""]))


def goal_lines(goals: list[Verdict]) -> list[list[str]]:
    """One line a goal; the heads first."""
    words = {True: "pass", False: "FAIL", None: "-"}
    return [
        ["goal", "limit", "value", "", ""],
        *([g.goal, f"{g.limit:g}", _figure(g.value, ".3g"), words[g.ok], g.note] for g in goals),
    ]


def _figure_of(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'hpcq[plots]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the plot to {path}: {error}") from None


def plot_goals(reports: Sequence[Report], path: Path) -> None:
    """A bar for each goal that is a part of native, and a mark where the goal is; raises UsageError as ``plot``."""
    goals = [
        (f"{report.link}: {goal.goal.removesuffix(OF_NATIVE)}", goal)
        for report in reports
        for goal in report.goals
        if goal.goal.endswith(OF_NATIVE) and goal.value is not None
    ]
    goals.reverse()
    figure = _figure_of(9, 1.5 + 0.25 * len(goals))
    axis = figure.subplots()
    places = range(len(goals))
    colours = [{True: "tab:green", False: "tab:red", None: "lightgrey"}[goal.ok] for _, goal in goals]
    axis.barh(places, [goal.value for _, goal in goals], color=colours)
    axis.plot([goal.limit for _, goal in goals], list(places), "k|", markersize=14, label="goal")
    axis.set_yticks(list(places), [name for name, _ in goals], fontsize="small")
    axis.set_xlabel("of native in the same run (grey: native did not fill the link)")
    axis.legend(fontsize="small")
    _save(figure, path)


def plot(report: Report, path: Path) -> None:
    """Aggregate throughput against workers: one line a way, native dashed, the paper's points marked.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    directions = list(dict.fromkeys(point.direction for point in report.native.points))
    figure = _figure_of(6 * len(directions), 4.5)
    axes = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
    for axis, direction in zip(axes, directions, strict=True):
        _draw(axis, report, direction)
    axes[0].set_ylabel("throughput of all workers, Mbit/s")
    axes[0].legend(fontsize="small")
    figure.suptitle(f"{report.link or report.server}, {report.date[:10]}", fontsize="medium")
    _save(figure, path)


def _draw(axis: Any, report: Report, direction: str) -> None:
    for row in report.rows:
        series = sorted((p.workers, p.rate / 1e6) for p in row.points if p.direction == direction and p.rate)
        if series:
            style = {"linestyle": "--", "color": "black"} if row is report.native else {"marker": "o"}
            axis.plot([x for x, _ in series], [y for _, y in series], label=row.label, **style)
    axis.plot([x for x, _ in CHEP], [y for _, y in CHEP], "k*", markersize=10, label="CHEP 2021")
    axis.set_xscale("log")
    ticks = sorted({point.workers for point in report.native.points} | {x for x, _ in CHEP})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("workers")
    axis.set_title({"up": "out of the compute node", "down": "into the compute node"}[direction], fontsize="medium")


def plain(lines: list[list[str]]) -> list[str]:
    """Columns for any terminal or file; figures to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    justify: list[Callable[[str, int], str]] = [
        str.rjust if all(_is_figure(line[column]) for line in lines[1:]) else str.ljust for column in range(len(widths))
    ]
    return ["  ".join(j(cell, w) for j, cell, w in zip(justify, line, widths, strict=True)).rstrip() for line in lines]


def _is_figure(cell: str) -> bool:
    return cell in ("", "-") or cell.replace(".", "", 1).removeprefix("-").isdigit()
