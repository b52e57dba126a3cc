"""``hpcq cancel-pilots``: ask, then look until they are gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

import click

from hpcq.batch import records
from hpcq.batch.base import BatchJob, JobState, get_batch_system, load_jobs
from hpcq.batch.states import Statuses, by_batch, is_gone, job_states, record_cancelled, recorded_end
from hpcq.cli.common import json_option, name_option, print_json, require_queue, verbose_option
from hpcq.errors import BatchError, UsageError
from hpcq.units import parse_duration

CANCEL_TIMEOUT = "60"
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 15.0
"""Seconds between the looks of a waiting ``cancel-pilots``: they double, since sites ban users who poll."""


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

    ID is a batch job as `hpcq pilots` shows it (4711_3, 18[3].pbs1), or a whole submission (4711, 18).
    """
    limit = parse_duration(timeout, name="--timeout")
    if bool(ids) + everything + pending != 1:
        raise UsageError("say which pilots: their ids, --all, or --pending")
    queue = require_queue(name)
    chosen = _choose(load_jobs(queue), ids, pending)
    refused: list[BatchError] = []
    for batch, members in by_batch(chosen).items():
        try:
            get_batch_system(batch).cancel(members)
        except BatchError as error:  # the jobs of other batch systems are ended all the same
            refused.append(error)
    left = wait_until_gone(chosen, 0 if refused else limit)
    gone = [job for job in chosen if job.id not in left]
    for job in gone:
        record_cancelled(job)
    if as_json:
        print_json({"gone": [job.id for job in gone], "left": left})
    else:
        click.echo(f"gone: {', '.join(job.id for job in gone)}" if gone else "nothing was cancelled")
    if refused:
        raise refused[0]
    if left:
        states = ", ".join(f"{job_id} ({state})" for job_id, state in left.items())
        raise BatchError(f"not gone after {limit:g} s, seen from {socket.gethostname()}: {states}")


def choose_named(jobs: Sequence[BatchJob], ids: Sequence[str]) -> list[BatchJob]:
    """The jobs that ``ids`` name, one by one or by whole submissions.

    Raises:
        UsageError: an id that is no job of this queue.
    """
    by_name: dict[str, list[BatchJob]] = {}
    for job in jobs:
        for known in records.names(job):
            by_name.setdefault(known, []).append(job)
    unknown = set(ids) - by_name.keys()
    if unknown:
        raise UsageError(f"no pilot of this queue is {', '.join(sorted(unknown))}; see `hpcq pilots --all`")
    wanted = {job.id for one in ids for job in by_name[one]}
    return [job for job in jobs if job.id in wanted]


def _choose(jobs: Sequence[BatchJob], ids: Sequence[str], pending: bool) -> list[BatchJob]:
    """Return the jobs to cancel: named, pending, or all, without those that have ended."""
    if ids:
        jobs = choose_named(jobs, ids)
    alive = [job for job in jobs if recorded_end(job) is None]
    if not pending:
        return alive
    statuses, errors = job_states(alive)
    if errors:
        raise errors[0]
    return [job for job in alive if statuses[job.id].state in (JobState.PENDING, JobState.HELD)]


def wait_until_gone(jobs: Sequence[BatchJob], limit: float) -> dict[str, str]:
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
