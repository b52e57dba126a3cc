"""What the batch systems say about recorded jobs, for whoever shows, follows or cancels them.

A job whose end somebody has seen is not asked about again: its last state is in its record.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from hpcq.batch import records
from hpcq.batch.base import BatchJob, JobState, JobStatus, get_batch_system
from hpcq.errors import BatchError

Statuses = dict[str, JobStatus]

_UNTOLD = (JobState.DONE.value, JobState.UNKNOWN.value)
FORGOTTEN_AFTER = 24 * 3600
"""Seconds from its submission after which a job that is not listed is put on record as one never to be heard
of.
"""


def job_states(jobs: Sequence[BatchJob]) -> tuple[Statuses, list[BatchError]]:
    """Return the state of every job, by id, and the errors of batch systems that did not answer.

    One call for each batch system that has jobs whose end is not on record; ends that are seen are recorded.
    """
    statuses = {job.id: status for job in jobs if (status := recorded_end(job)) is not None}
    errors = []
    for name, members in by_batch(job for job in jobs if job.id not in statuses).items():
        try:
            answer = get_batch_system(name).status(members)
        except BatchError as error:
            errors.append(error)
            statuses |= {job.id: JobStatus(job.id, JobState.UNKNOWN, "no answer") for job in members}
            continue
        for job in members:
            if answer[job.id].state.is_final or _is_forgotten(job, answer[job.id]):
                record_end(job, answer[job.id])
        statuses |= answer
    return statuses, errors


def by_batch(jobs: Iterable[BatchJob]) -> dict[str, list[BatchJob]]:
    """Return ``jobs`` grouped by their batch system."""
    groups: dict[str, list[BatchJob]] = {}
    for job in jobs:
        groups.setdefault(job.batch, []).append(job)
    return groups


def recorded_end(job: BatchJob) -> JobStatus | None:
    """Return the last state of a job whose end is on record."""
    ending = records.load_ending(job)
    if ending is None:
        return None
    known = ending.state in JobState._value2member_map_  # else a word of another version of hpcq
    state = JobState(ending.state) if known else JobState.UNKNOWN
    raw_state = "" if state is JobState.UNKNOWN else state.name
    return JobStatus(job.id, state, ending.reason, ending.hosts, ending.exit_code, raw_state)


def _is_forgotten(job: BatchJob, status: JobStatus) -> bool:
    """Whether a batch system that answered will not list the job again: it ended, nobody knows how."""
    unlisted = status.state is JobState.UNKNOWN and not status.is_listed
    return unlisted and time.time() - job.submitted_at > FORGOTTEN_AFTER


def record_end(job: BatchJob, status: JobStatus) -> None:
    """Put the end of a job on record."""
    ending = records.Ending(
        state=status.state.value,
        reason=status.reason,
        hosts=status.hosts,
        exit_code=status.exit_code,
        seen_at=time.time(),
    )
    records.save_ending(job, ending)


def record_cancelled(job: BatchJob) -> None:
    """Put on record that a job which is gone was cancelled, where the batch system has not told how it ended."""
    ending = records.load_ending(job)
    if ending is None or (ending.state in _UNTOLD and ending.exit_code is None):
        cancelled = records.Ending(
            state=JobState.CANCELLED.value, hosts=ending.hosts if ending else "", seen_at=time.time()
        )
        records.save_ending(job, cancelled, replace=True)


def is_gone(status: JobStatus, *, answered: bool = True) -> bool:
    """Whether a job that is being cancelled is no more: it ended, or a batch system that answered lists it no
    longer.

    Only good for a job that was listed or cancelled before; elsewhere, not being listed says nothing.
    """
    return status.state.is_final or (answered and status.state is JobState.UNKNOWN and not status.is_listed)
