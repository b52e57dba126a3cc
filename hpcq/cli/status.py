"""``hpcq status``: what a queue is doing, once or as a live view."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click

from hpcq import client
from hpcq.cli import autoscale
from hpcq.cli.common import json_option, name_option, print_json, require_queue, verbose_option
from hpcq.cli.pilot_rows import HEADS, cells, merge
from hpcq.errors import HpcqError, QueueNotFoundError
from hpcq.units import format_bytes

REFRESH = 1.0
"""Seconds between two looks of ``--watch``."""
ROWS = 20
"""Pilots that the live view lists at most: those at work first."""
_ORDER = ("failed", "starting", "ready", "draining", "gone")


class Look(NamedTuple):
    """What a queue's program answered: counts, pilots, autoscaling, and tasks done per second since the look before."""

    status: dict[str, Any]
    pilots: list[dict[str, Any]]
    autoscale: dict[str, Any]
    rate: float | None = None


@click.command("status")
@name_option
@click.option("--watch", is_flag=True, help="A live view, until Ctrl-C or the program's end.")
@json_option
@verbose_option
def status(name: str | None, watch: bool, as_json: bool) -> None:
    """Show a queue's tasks, pilots and cores, as its running program knows them."""
    queue = require_queue(name)
    if not watch:
        look = _look(queue)
        if as_json:
            print_json({**look.status, "autoscale": look.autoscale})
        else:
            click.echo("\n".join(lines(look)))
        return
    with contextlib.suppress(KeyboardInterrupt):  # how people leave a live view
        if sys.stdout.isatty() and not as_json:
            _show_live(_looks(queue))
        else:
            for look in _looks(queue):
                if as_json:
                    print_json({**look.status, "autoscale": look.autoscale, "pilots_listed": look.pilots})
                else:
                    click.echo("\n".join(lines(look)))


def _look(queue: str) -> Look:
    return Look(client.ask(queue, "status"), client.ask(queue, "pilots"), client.ask(queue, "autoscale"))


def _looks(queue: str) -> Iterator[Look]:
    """One look after the other, until the queue's program has ended."""
    look, at = _look(queue), time.monotonic()
    yield look
    while True:
        time.sleep(REFRESH)  # the manager does not push: a view for people may as well ask
        try:
            now, then = _look(queue), time.monotonic()
        except QueueNotFoundError as error:
            click.echo(f"hpcq: the queue's program has ended: {error}", err=True)
            return
        except HpcqError as error:  # overloaded for a moment: the next look may tell
            click.echo(f"hpcq: {error}", err=True)
            continue
        done = _done(now) - _done(look)
        look, passed, at = now, then - at, then
        yield look._replace(rate=done / passed)


def _done(look: Look) -> int:
    return sum(look.status["tasks"]["done"].values())


def lines(look: Look) -> list[str]:
    """A manager's answer for people."""
    answer = look.status
    tasks, pilots = answer["tasks"], answer["pilots"]
    done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tasks["done"].items())) or "none"
    states = ", ".join(f"{count} {state}" for state, count in pilots.items() if count) or "none"
    rate = "" if look.rate is None else f" ({look.rate:,.1f} /s)"
    told = [
        f"queue   {answer['queue']}, served by process {answer['pid']} on {answer['hostname']}",
        f"tasks   {tasks['waiting']} waiting, {tasks['sent']} sent, {tasks['running']} running; done: {done}{rate}",
        f"pilots  {states}",
        f"cores   {answer['cores_busy']} of {answer['cores']} busy",
    ]
    if answer.get("bytes_received") is not None:
        received, sent = format_bytes(answer["bytes_received"]), format_bytes(answer["bytes_sent"])
        told.append(f"tunnels {received} received, {sent} sent")
    if look.autoscale["active"]:
        told.append(f"scaling {autoscale.lines(look.autoscale)[0].removeprefix('state').strip()}")
    return told


def listed(pilots: Sequence[Mapping[str, Any]], now: float) -> list[tuple[str, ...]]:
    """The rows of the live view: pilots that did not serve first, then those at work; ``now`` is wall time."""
    known = {state: place for place, state in enumerate(_ORDER)}
    chosen = sorted(pilots, key=lambda pilot: known.get(str(pilot.get("state")), len(known)))[:ROWS]
    return [cells(row) for row in merge([], {}, chosen, (), now)]


def _show_live(looks: Iterator[Look]) -> None:
    from rich.console import Group  # noqa: PLC0415 - slow to import, and only wanted here
    from rich.live import Live  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(auto_refresh=False) as live:
        for look in looks:
            table = Table(*HEADS, box=None, pad_edge=False, header_style="bold")
            for row in listed(look.pilots, time.time()):
                table.add_row(*map(Text, row))
            more = len(look.pilots) - ROWS
            below = [Text(f"and {more} more: `hpcq pilots`")] if more > 0 else []
            live.update(Group(Text("\n".join(lines(look))), Text(), table, *below), refresh=True)
