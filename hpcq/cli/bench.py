"""``hpcq bench``: how fast this machine's queue is, measured through the same doors that users go through."""

from __future__ import annotations

import socket
from typing import Any

import click

from hpcq import benchmark
from hpcq.cli.common import json_option, print_json, verbose_option


@click.group("bench")
def bench() -> None:
    """Measure the queue on this machine."""


@bench.command("tasks")
@click.option("--pilots", type=click.IntRange(1), default=1, show_default=True, help="Local pilots to start.")
@click.option("--cores", type=click.IntRange(1), default=2, show_default=True, help="Cores of each pilot.")
@click.option("-n", "--count", type=click.IntRange(1), default=20000, show_default=True, help="Python tasks to run.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs; the median is told.")
@json_option
@verbose_option
def tasks(pilots: int, cores: int, count: int, repeat: int, as_json: bool) -> None:
    """Python tasks per second, round trip, and shell tasks per second, with local pilots and TLS on.

    The function is inc(x); the command is `true`, its exit code and output captured. A round trip is one task
    submitted and waited for, nothing else in the queue. The same calls are also made through hpcq.Executor.
    """
    figures = benchmark.measure_tasks(pilots, cores, count, repeat)
    if as_json:
        print_json({"hostname": socket.gethostname(), "pilots": pilots, "cores": cores, **figures})
        return
    click.echo("\n".join(lines(figures)))


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    python, trip, calls, shell = (figures[name] for name in ("python", "round_trip", "executor", "shell"))
    return [
        f"Python tasks  {python['per_second']:>8,.0f} /s   median of {python['runs']} runs of {python['count']:,} "
        f"({python['slowest']:,.0f} to {python['fastest']:,.0f})",
        f"submitted     {python['submits_per_second']:>8,.0f} /s",
        f"round trip    {trip['p50_ms']:>8.2f} ms   median of {trip['count']:,}; 99 % within {trip['p99_ms']:.2f} ms",
        f"Executor      {calls['per_second']:>8,.0f} /s   median of {calls['runs']} runs of {calls['count']:,} "
        f"({calls['slowest']:,.0f} to {calls['fastest']:,.0f})",
        f"shell tasks   {shell['per_second']:>8,.0f} /s   median of {shell['runs']} runs of {shell['count']:,}",
    ]
