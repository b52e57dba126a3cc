"""``hpcq submit-pilots``, ``pilots`` and ``cancel-pilots``."""

from __future__ import annotations

import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from hpcq import state_dir
from hpcq.batch import records
from hpcq.batch.base import (
    BatchJob,
    JobState,
    RenderedJob,
    batch_system_names,
    get_batch_system,
    load_jobs,
    output_tail,
)
from hpcq.batch.request import pilot_request
from hpcq.batch.states import Statuses, by_batch, is_gone, job_states, recorded_end
from hpcq.cli.common import (
    ask_manager,
    choose_queue,
    create_queue,
    json_option,
    name_option,
    print_json,
    print_table,
    queue_not_found,
    require_queue,
    tell_manager,
    verbose_option,
)
from hpcq.cli.pilot_rows import HEADS, Row, cells, explanation, merge
from hpcq.errors import BatchError, QueueNotFoundError, UsageError
from hpcq.units import parse_duration
from vpn import MODES

KEEP_ENDED = 24 * 3600
"""Seconds for which ``hpcq pilots`` shows a job that has ended, without ``--all``."""
CANCEL_TIMEOUT = "60"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0
"""Seconds between the looks of a waiting ``cancel-pilots``: they double, since sites ban users who poll."""


@click.command("submit-pilots")
@name_option
@click.option("-n", "--count", type=int, default=1, show_default=True, help="How many pilots.")
@click.option("--batch", default="local", show_default=True, help=f"{', '.join(batch_system_names())}.")
@click.option("--cores", type=int, default=1, show_default=True, help="Cores of each pilot.")
@click.option("--memory", metavar="SIZE", help="Memory of each pilot: 32GB, or MB.")
@click.option("--disk", metavar="SIZE", help="Disk for tasks of each pilot.  [default: what is free]")
@click.option("--gpus", type=int, help="GPUs of each pilot, if not all of its job (as by --option=--gres=gpu:2).")
@click.option("--walltime", metavar="TIME", help="Time limit: H:MM:SS, or seconds.")
@click.option("--partition", help="Partition of the batch system.")
@click.option("--account", help="Account to charge.")
@click.option("--qos", help="Quality of service.")
@click.option("--constraint", help="Required features of the nodes.")
@click.option("--option", "options", multiple=True, metavar="OPT", help="Any other option: '--reservation=x'.")
@click.option("--template", type=click.Path(path_type=Path), metavar="FILE", help="Your own batch template.")
@click.option("--environment-setup", "setup", multiple=True, metavar="LINE", help="Shell to run before the pilot.")
@click.option(
    "--environment",
    type=click.Path(path_type=Path),
    metavar="DIR|TARBALL",
    help="The pilots' Python environment: a directory they see, or an archive of `hpcq pack-environment`.",
)
@click.option("--vpn", type=click.Choice(MODES), help="How tasks get out.  [default: none]")
@click.option("--gateway", metavar="NAME", help="The gateway that tunnels end at.")
@click.option("--require", multiple=True, metavar="TARGET", help="What must answer before the first task.")
@click.option("--scratch", type=click.Path(path_type=Path), metavar="DIR", help="Where tasks run on the nodes.")
@click.option("--cache-size", metavar="SIZE", help="Of each node's cache of files; 10GB or half the free space.")
@click.option("--manager-timeout", metavar="TIME", help="How long a pilot waits for the queue's program.")
@click.option("--create", is_flag=True, help="Make the queue, for a program that starts later.")
@click.option("--dry-run", is_flag=True, help="Print the exact script and command; do nothing.")
@json_option
@verbose_option
def submit_pilots(name: str | None, batch: str, create: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Put pilots for a queue through the batch system.

    Each pilot is one batch job: it finds the queue's program by its connection file, brings its tunnel up,
    proves it on every --require (root://HOST:PORT, http://HOST, cvmfs:REPOSITORY), and takes tasks.
    """
    queue = choose_queue(name)
    system = get_batch_system(batch)
    request = pilot_request(queue, batch, values.pop("count"), values, flags=True)
    if not state_dir.connection_file(queue).exists() and not create:
        raise queue_not_found(queue, "start the program that makes it first, or pass --create")
    if dry_run:
        _show_rendered(system.render(request), as_json)
        return
    if create and not state_dir.connection_file(queue).exists():
        system.render(request)  # refuse what cannot be submitted before a queue is made for it
        create_queue(queue)
    jobs = system.submit(request)
    _show_submitted(queue, jobs, as_json)
    tell_manager(queue)
    if batch == "local" and shutil.which("sbatch"):
        click.echo("hpcq: the pilots run on this very host; --batch slurm puts them on compute nodes", err=True)


def _show_rendered(rendered: RenderedJob, as_json: bool) -> None:
    if as_json:
        print_json({"script": rendered.script, "command": list(rendered.command)})
        return
    click.echo(rendered.script, nl=False)
    click.echo(f"# command: {shlex.join(rendered.command)}")


def _show_submitted(queue: str, jobs: Sequence[BatchJob], as_json: bool) -> None:
    if as_json:
        listed = [{"job_id": job.id, "output_file": str(job.output)} for job in jobs]
        print_json({"queue": queue, "batch": jobs[0].batch, "script": str(jobs[0].script), "jobs": listed})
        return
    ids = jobs[0].id if len(jobs) == 1 else f"{jobs[0].id} to {jobs[-1].id}"
    many = "1 pilot" if len(jobs) == 1 else f"{len(jobs)} pilots"
    click.echo(f"submitted {many} for queue {queue} to {jobs[0].batch}: {ids}")
    click.echo(f"script and output: {jobs[0].directory}")


@click.command("pilots")
@name_option
@click.option("--all", "show_all", is_flag=True, help="Also jobs that ended more than a day ago.")
@json_option
@verbose_option
@click.pass_context
def pilots(ctx: click.Context, *, name: str | None, show_all: bool, as_json: bool) -> None:
    """Show the pilots of a queue and their batch jobs.

    A job that ended without its pilot having reported is shown with the end of its output.
    """
    queue = require_queue(name)
    jobs = load_jobs(queue) if show_all else _recent(load_jobs(queue))
    reports = _ask_for_pilots(queue)
    statuses, errors = job_states(jobs)
    reported = {job.id for job in jobs if records.has_reported(job)}
    rows = _with_output(merge(jobs, statuses, reports, reported), jobs)
    if as_json:
        print_json([msgspec.to_builtins(row) for row in rows])
    else:
        _show_rows(queue, rows)
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


@click.command("cancel-pilots")
@name_option
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "everything", is_flag=True, help="Every pilot of the queue.")
@click.option("--pending", is_flag=True, help="Those that have not started.")
@click.option("--timeout", default=CANCEL_TIMEOUT, show_default=True, help="How long to wait for their end.")
@json_option
@verbose_option
def cancel_pilots(
    *, name: str | None, ids: tuple[str, ...], everything: bool, pending: bool, timeout: str, as_json: bool
) -> None:
    """Cancel pilots and wait until they are gone.

    ID is a batch job as `hpcq pilots` shows it (4711_3), or a whole submission (4711).
    """
    limit = parse_duration(timeout, name="--timeout")
    if bool(ids) + everything + pending != 1:
        raise UsageError("say which pilots: their ids, --all, or --pending")
    chosen = _choose(load_jobs(require_queue(name)), ids, pending)
    for batch, members in by_batch(chosen).items():
        get_batch_system(batch).cancel(members)
    left = _wait_until_gone(chosen, limit)
    gone = [job.id for job in chosen if job.id not in left]
    if as_json:
        print_json({"gone": gone, "left": left})
    else:
        click.echo(f"gone: {', '.join(gone)}" if gone else "nothing was cancelled")
    if left:
        states = ", ".join(f"{job_id} ({state})" for job_id, state in left.items())
        raise BatchError(f"not gone after {limit:g} s, seen from {socket.gethostname()}: {states}")


def _choose(jobs: Sequence[BatchJob], ids: Sequence[str], pending: bool) -> list[BatchJob]:
    """Return the jobs to cancel: named, pending, or all, without those that have ended."""
    unknown = set(ids) - {job.id for job in jobs} - {records.base_id(job.id) for job in jobs}
    if unknown:
        raise UsageError(f"no pilot of this queue is {', '.join(sorted(unknown))}; see `hpcq pilots --all`")
    if ids:
        jobs = [job for job in jobs if job.id in ids or records.base_id(job.id) in ids]
    alive = [job for job in jobs if recorded_end(job) is None]
    if not pending:
        return alive
    statuses, errors = job_states(alive)
    if errors:
        raise errors[0]
    return [job for job in alive if statuses[job.id].state in (JobState.PENDING, JobState.HELD)]


def _wait_until_gone(jobs: Sequence[BatchJob], limit: float) -> dict[str, str]:
    """Look until every job is gone or the time is up; return what is left, with its state."""
    deadline, pause = time.monotonic() + limit, FIRST_PAUSE
    while True:
        statuses, errors = job_states(jobs) if jobs else ({}, [])
        left = _left(jobs, statuses, answered=not errors)
        remaining = deadline - time.monotonic()
        if not left or remaining <= 0:
            return left
        # A batch system tells nobody when a job ends: there is only looking again.
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, LONGEST_PAUSE)


def _left(jobs: Sequence[BatchJob], statuses: Statuses, *, answered: bool) -> dict[str, str]:
    states = {job.id: statuses[job.id] for job in jobs}
    return {
        job_id: status.raw_state.lower() or status.reason or "state unknown"
        for job_id, status in states.items()
        if not is_gone(status, answered=answered)
    }
