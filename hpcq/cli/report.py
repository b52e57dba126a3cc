"""``hpcq report``: what a queue's program did, from its journal, also after its end."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec

from hpcq import journal, state_dir
from hpcq.batch.text import printable
from hpcq.cli.common import choose_queue, json_option, name_option, print_json, print_table, verbose_option
from hpcq.cli.pilot_rows import in_and_out
from hpcq.report import Failure, Group, Report, summarize
from hpcq.units import format_bytes, format_duration

WORDS = 300
"""Characters of a message that are shown."""

HOSTS = 20
"""Hosts that are listed: those with failures, then those that did most."""


@click.command("report")
@name_option
@click.option(
    "--run", type=click.IntRange(1), metavar="N", help="Which program: they are numbered.  [default: the last]"
)
@click.option(
    "--journal", "file", type=click.Path(path_type=Path), metavar="FILE", help="If it is not the queue's own."
)
@click.option("--tasks", is_flag=True, help="List each finished task instead.")
@json_option
@verbose_option
def report(name: str | None, run: int | None, file: Path | None, tasks: bool, as_json: bool) -> None:
    """Tell what a queue's program has done: tasks by kind and host, what went wrong, how well pilots were used.

    For programs that keep a journal: `Queue(journal=True)`, HPCQ_JOURNAL=1, or journal = true in config.toml.
    """
    kept = [one for one in state_dir.known_queues() if journal.default_path(one).exists()]
    found = journal.read(file or journal.default_path(choose_queue(name, kept or None)), run)
    if tasks and as_json:
        print_json([row._asdict() for row in found.tasks])
    elif tasks:
        print_table(("ID", "KIND", "TAG", "OUTCOME", "ATTEMPTS", "HOST", "WALL"), map(_task_cells, found.tasks))
    elif as_json:
        print_json(msgspec.to_builtins(summarize(found)))
    else:
        _print(summarize(found))


def _task_cells(row: journal.TaskRow) -> tuple[str, ...]:
    wall = "-" if row.started is None or row.finished is None else f"{row.finished - row.started:.1f} s"
    return (str(row.id), *map(_cell, (row.kind, row.tag, row.outcome)), str(row.attempts), _cell(row.hostname), wall)


def _cell(text: str | None) -> str:
    return printable(" ".join((text or "").split())) or "-"


def _print(told: Report) -> None:
    for line in heading(told):
        click.echo(line)
    heads = ("TASKS", "FAILED", "WAIT", "WALL", "LONGEST", "CPU", "MEMORY", "IN/OUT")
    if told.kinds:
        click.echo()
        print_table(("KIND", *heads), map(_group_cells, told.kinds))
    if told.hosts:
        click.echo()
        print_table(("HOST", *heads), map(_group_cells, _chosen(told.hosts)))
    for line in troubles(told):
        click.echo(line)


def heading(told: Report) -> list[str]:
    """The lines about the run as a whole."""
    end = "still running, or killed" if told.ended is None else f"to {_clock(told.ended)}"
    done = sum(told.outcomes.values())
    lines = [
        f"run     {told.run}: {_clock(told.began)} {end} ({format_duration(told.seconds)}), "
        f"process {told.pid} on {_cell(told.hostname)}",
        f"tasks   {done} of {told.submitted} ended: {_counts(told.outcomes)}; "
        f"{told.repeated} ran more than once; {told.rate:.2f} /s",
        f"pilots  {_counts(told.pilots)}",
    ]
    if told.used is not None:
        lines.append(f"cores   {told.core_hours:.2f} core hours, {100 * told.used:.0f} % of them used by tasks")
    if told.sent is not None and told.received is not None:
        lines.append(f"tunnels {format_bytes(told.received)} received, {format_bytes(told.sent)} sent")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _group_cells(group: Group) -> tuple[str, ...]:
    times = ("-" if value is None else f"{value:.1f} s" for value in (group.wait, group.wall, group.longest))
    cpu = "-" if group.cpu is None else f"{100 * group.cpu:.0f} %"
    carried = in_and_out(group.received, group.sent) or "-"
    return (_cell(group.name), str(group.tasks), str(group.failed), *times, cpu, f"{group.memory:.0f} MB", carried)


def _chosen(hosts: Sequence[Group]) -> list[Group]:
    return sorted(hosts, key=lambda host: host.failed == 0)[:HOSTS]


def troubles(told: Report) -> list[str]:
    """The lines about tasks that did not end well and pilots that could not serve."""
    lines = ["", "what went wrong:"] if told.failures or told.failed_pilots else []
    lines += [_failure_line(failure) for failure in told.failures]
    return lines + [
        f"  pilot {_cell(pilot['name'])} could not serve: {_cell(pilot['message'])}" for pilot in told.failed_pilots
    ]


def _failure_line(failure: Failure) -> str:
    one = f"task {failure.first}" + (f" with tag {_cell(failure.tag)}" if failure.tag else "")
    where = f" on {', '.join(map(_cell, failure.hosts))}" if failure.hosts else ""
    words = _cell(failure.message)
    shown = words if len(words) <= WORDS else f"{words[:WORDS]}…"
    return f"  {failure.tasks} {failure.outcome}: {shown}{where}; one is {one}"


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
