"""``hpcq pilots``: the table, and one job's whole story."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from hpcq.batch import records
from hpcq.batch.base import BatchJob, load_jobs, output_tail
from hpcq.batch.inline import conceal
from hpcq.batch.states import job_states
from hpcq.cli.cancel import choose_named
from hpcq.cli.common import (
    ask_manager,
    json_option,
    name_option,
    print_json,
    print_table,
    require_queue,
    verbose_option,
)
from hpcq.cli.pilot_rows import HEADS, Row, cells, explanation, merge, story
from hpcq.errors import BatchError, QueueNotFoundError, UsageError

KEEP_ENDED = 24 * 3600
"""Seconds for which ``hpcq pilots`` shows a job that has ended, without ``--all``."""
TAIL_LINES = 40
"""Lines of a job's output that ``hpcq pilots show`` ends with, by default."""


@click.group("pilots", invoke_without_command=True)
@name_option
@click.option("--all", "show_all", is_flag=True, help="Also jobs that ended more than a day ago.")
@json_option
@verbose_option
@click.pass_context
def pilots(ctx: click.Context, *, name: str | None, show_all: bool, as_json: bool) -> None:
    """Show the pilots of a queue and their batch jobs; `pilots show ID` tells all about one.

    A job that ended without its pilot having reported is shown with the end of its output.
    """
    ctx.obj = name
    if ctx.invoked_subcommand is not None:
        return
    queue = require_queue(name)
    jobs = load_jobs(queue) if show_all else _recent(load_jobs(queue))
    rows, errors = _rows(queue, jobs, strangers=True)
    if as_json:
        print_json([msgspec.to_builtins(row) for row in rows])
    else:
        _show_rows(queue, rows)
    _say(ctx, errors)


@pilots.command("show")
@click.argument("job_id", metavar="ID")
@name_option
@click.option("--lines", type=click.IntRange(0), default=TAIL_LINES, show_default=True, help="Lines of output.")
@json_option
@verbose_option
@click.pass_context
def show(ctx: click.Context, *, job_id: str, name: str | None, lines: int, as_json: bool) -> None:
    """Show one job's script, the end of its output, and what became of it.

    ID is as `hpcq pilots` shows it (4711_3, 18[3].pbs1; 4711 or 18 where it is the only one).
    """
    queue = require_queue(name or ctx.obj)
    jobs = choose_named(load_jobs(queue), [job_id])
    if len(jobs) > 1:
        raise UsageError(f"{job_id} is {len(jobs)} jobs, {jobs[0].id} to {jobs[-1].id}; say which")
    [job] = jobs
    rows, errors = _rows(queue, jobs, strangers=False)
    script, output = _script(job), output_tail(job, lines)
    if as_json:
        told = [msgspec.to_builtins(row) for row in rows]
        print_json({"job_id": job.id, "pilots": told, "script": script, "output": output})
    else:
        click.echo("\n".join(story(job, rows, script, output)))
    _say(ctx, errors)


def _rows(queue: str, jobs: Sequence[BatchJob], *, strangers: bool) -> tuple[list[Row], list[BatchError]]:
    statuses, errors = job_states(jobs)
    reports = _ask_for_pilots(queue)  # after the batch system: what a pilot of an ended job said is there by then
    if not strangers:
        own = {job.id for job in jobs}
        reports = [report for report in reports if report.get("job_id") in own]
    reported = {job.id for job in jobs if records.has_reported(job)}
    return _with_output(merge(jobs, statuses, reports, reported, time.time()), jobs), errors


def _script(job: BatchJob) -> str:
    try:
        return conceal(job.script.read_text(encoding="utf-8"))
    except OSError as error:
        return f"({job.script} cannot be read: {error.strerror})"


def _say(ctx: click.Context, errors: Sequence[BatchError]) -> None:
    for error in errors:
        click.echo(f"hpcq: {error}", err=True)
    if errors:
        ctx.exit(BatchError.exit_status)


def _recent(jobs: Sequence[BatchJob]) -> list[BatchJob]:
    """Leave out jobs that ended too long ago to matter."""
    now, kept = time.time(), []
    for job in jobs:
        ending = records.load_ending(job)
        if ending is None or now - ending.seen_at < KEEP_ENDED:
            kept.append(job)
    return kept


def _ask_for_pilots(queue: str) -> list[dict[str, Any]]:
    try:
        return ask_manager(queue, "pilots")
    except QueueNotFoundError as error:
        click.echo(f"hpcq: only batch jobs are shown: {error}", err=True)
        return []


def _with_output(rows: Sequence[Row], jobs: Sequence[BatchJob]) -> list[Row]:
    by_id = {job.id: job for job in jobs}
    return [
        msgspec.structs.replace(row, output=output_tail(by_id[row.job_id])) if row.failed_start else row for row in rows
    ]


def _show_rows(queue: str, rows: Sequence[Row]) -> None:
    if not rows:
        click.echo(f"queue {queue} has no pilots")
        return
    print_table(HEADS, map(cells, rows))
    for row in rows:
        if row.failed_start:
            click.echo("\n".join(["", *explanation(row)]))
