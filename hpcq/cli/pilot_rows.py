"""From the manager's pilots and the batch systems' jobs to the rows of ``hpcq pilots``. Pure.

The manager knows pilots that have reported; the batch system knows jobs. A job without a pilot is waiting,
starting, or has failed to start; a pilot without a job on record was started by other means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from hpcq.batch.base import BatchJob, JobState, JobStatus

HEADS = ("BATCH JOB", "STATE", "REASON", "HOST", "CORES", "TUNNEL", "DONE", "LAST WORD")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One pilot or job, as ``--json`` prints it.

    ``state`` is the pilot's (starting, ready, draining, gone, failed) once it has reported, else the job's.
    ``failed_start`` is set for a job that ended without its pilot having reported; then ``output`` has the
    end of its output. ``cores_busy`` and ``tasks_done`` are None where no manager told.
    """

    job_id: str
    batch: str = ""
    state: str = ""
    reason: str = ""
    hostname: str = ""
    cores: int | None = None
    cores_busy: int | None = None
    tunnel_mode: str = ""
    tunnel_kind: str = ""
    tunnel_seconds: float | None = None
    tasks_done: int | None = None
    message: str = ""
    failed_layer: str = ""
    failed_start: bool = False
    exit_code: int | None = None
    script: str = ""
    output_file: str = ""
    output: list[str] = []


def merge(
    jobs: Sequence[BatchJob],
    statuses: Mapping[str, JobStatus],
    pilots: Sequence[Mapping[str, Any]],
    reported: Collection[str] = (),
) -> list[Row]:
    """Return a row for every job, and for every pilot that has none.

    ``pilots`` is the manager's answer, empty when none answered; ``reported`` are the jobs whose pilot is on record
    as having reported to this or an earlier program of the queue.
    """
    reports = {str(pilot.get("job_id") or ""): pilot for pilot in pilots}
    rows = [_job_row(job, statuses[job.id], reports.get(job.id), job.id in reported) for job in jobs]
    known = {job.id for job in jobs}
    strangers = [pilot for pilot in pilots if str(pilot.get("job_id") or "") not in known]
    return rows + [_row(str(p.get("job_id") or p.get("name") or ""), str(p.get("batch") or ""), p) for p in strangers]


def _job_row(job: BatchJob, status: JobStatus, report: Mapping[str, Any] | None, reported: bool) -> Row:
    silent = report is None and not reported
    failed_start = silent and status.state.is_final and status.state is not JobState.CANCELLED
    row = _row(job.id, job.batch, report or {})
    return msgspec.structs.replace(
        row,
        state=_state(status, row.state),
        reason=status.reason,
        hostname=row.hostname or status.hosts,
        failed_start=failed_start,
        exit_code=status.exit_code,
        script=str(job.script),
        output_file=str(job.output),
    )


def _state(status: JobStatus, pilot_state: str) -> str:
    """Say the pilot's word, unless the job has ended since and the pilot has none about that."""
    if pilot_state == "failed" or (pilot_state not in ("", "gone") and not status.state.is_final):
        return pilot_state
    if status.state is JobState.UNKNOWN:
        return pilot_state or (status.raw_state.lower() if status.is_listed else "unknown")
    return str(status.state.value)


def _row(job_id: str, batch: str, report: Mapping[str, Any]) -> Row:
    return Row(
        job_id=job_id,
        batch=batch,
        state=str(report.get("state") or ""),
        hostname=str(report.get("hostname") or ""),
        cores=report.get("cores"),
        cores_busy=report.get("cores_busy"),
        tunnel_mode=str(report.get("tunnel_mode") or ""),
        tunnel_kind=str(report.get("tunnel_kind") or ""),
        tunnel_seconds=report.get("tunnel_seconds"),
        tasks_done=report.get("tasks_done"),
        message=str(report.get("message") or ""),
        failed_layer=str(report.get("failed_layer") or ""),
    )


def cells(row: Row) -> tuple[str, ...]:
    """Return the row as text, one item for each of ``HEADS``; a dash where nothing is known."""
    busy = f"{row.cores_busy or 0:g}/{row.cores:g}" if row.cores is not None else ""
    word = f"{row.failed_layer}: {row.message}" if row.failed_layer else row.message
    texts = (
        row.job_id,
        "failed start" if row.failed_start else row.state,
        row.reason,
        row.hostname,
        busy,
        row.tunnel_kind or row.tunnel_mode,
        "" if row.tasks_done is None else str(row.tasks_done),
        word,
    )
    return tuple(" ".join(text.split()) or "-" for text in texts)


def explanation(row: Row) -> list[str]:
    """Return the lines below the table about a job that ended without its pilot having reported."""
    how = row.reason or (f"exit status {row.exit_code}" if row.exit_code is not None else row.state)
    lines = [f"{row.job_id} ended ({how}) and its pilot never reported; its script: {row.script}"]
    if not row.output:
        return [*lines, f"    it printed nothing to {row.output_file}"]
    return [
        *lines,
        f"    the end of its output, {row.output_file}:",
        *(f"    | {line}" for line in row.output),
    ]
