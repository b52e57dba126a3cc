"""From the manager's pilots and the batch systems' jobs to the rows of ``hpcq pilots``. Pure.

The manager knows pilots that have reported; the batch system knows jobs. A job without a pilot is waiting,
starting, or has failed to start; a pilot without a job on record was started by other means; a job of several nodes has
several pilots.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from hpcq.batch.base import BatchJob, JobState, JobStatus
from hpcq.batch.inline import PLACEHOLDER
from hpcq.batch.text import printable
from hpcq.units import format_bytes, format_duration

HEADS = ("BATCH JOB", "STATE", "REASON", "HOST", "CORES", "TUNNEL", "IN/OUT", "LEFT", "DONE", "LAST WORD")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One pilot or job, as ``--json`` prints it.

    ``state`` is the pilot's (starting, ready, draining, gone, failed) once it has reported, else the job's.
    ``failed_start`` is set for a job that ended without its pilot having reported; then ``output`` has the
    end of its output. ``cores_busy`` and ``tasks_done`` are None where no manager told; ``time_left`` is in
    seconds, to the end of the job's walltime, None where that is not known. Bytes are those of its tunnel, None where
    none are counted.
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
    tunnel_gateway: str = ""
    tunnel_passed_over: list[str] = []
    bytes_sent: int | None = None
    bytes_received: int | None = None
    bytes_unattributed: int | None = None
    time_left: float | None = None
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
    now: float = 0.0,
) -> list[Row]:
    """Return a row for every job (for each of its pilots), and for every pilot that has none. ``now`` is wall time.

    ``pilots`` is the manager's answer, empty when none answered; ``reported`` are the jobs whose pilot is on record
    as having reported to this or an earlier program of the queue.
    """
    reports: dict[str, list[Mapping[str, Any]]] = {}
    for pilot in pilots:
        reports.setdefault(str(pilot.get("job_id") or ""), []).append(pilot)
    rows = [
        _job_row(job, statuses[job.id], report, job.id in reported, now)
        for job in jobs
        for report in _current(reports.get(job.id, []))
    ]
    known = {job.id for job in jobs}
    strangers = [pilot for pilot in pilots if str(pilot.get("job_id") or "") not in known]
    return rows + [
        _row(str(p.get("job_id") or p.get("name") or ""), str(p.get("batch") or ""), p, now) for p in strangers
    ]


def _current(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last pilot of each host: earlier ones are former incarnations of a job that was requeued; those of other
    hosts too, unless they are still there. An empty report when none has come.
    """
    latest = {str(report.get("hostname") or ""): report for report in reports}
    alive = [report for report in latest.values() if report.get("state") != "gone"]
    return alive or list(latest.values())[-1:] or [{}]


def _job_row(job: BatchJob, status: JobStatus, report: Mapping[str, Any], reported: bool, now: float) -> Row:
    silent = not report and not reported
    failed_start = silent and status.state.is_final and status.state is not JobState.CANCELLED
    row = _row(job.id, job.batch, report, now)
    if status.state in (JobState.PENDING, JobState.HELD) and row.state == "gone":
        word = f"requeued; its pilot on {row.hostname} has ended: {row.message or 'it said nothing'}"
        row = msgspec.structs.replace(row, message=word)
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


def _row(job_id: str, batch: str, report: Mapping[str, Any], now: float) -> Row:
    ends_at = report.get("ends_at") if report.get("state") != "gone" else None
    return Row(
        time_left=max(0.0, ends_at - now) if ends_at else None,
        job_id=job_id,
        batch=batch,
        state=str(report.get("state") or ""),
        hostname=str(report.get("hostname") or ""),
        cores=report.get("cores"),
        cores_busy=report.get("cores_busy"),
        tunnel_mode=str(report.get("tunnel_mode") or ""),
        tunnel_kind=str(report.get("tunnel_kind") or ""),
        tunnel_seconds=report.get("tunnel_seconds"),
        tunnel_gateway=str(report.get("tunnel_gateway") or ""),
        tunnel_passed_over=[str(line) for line in report.get("tunnel_passed_over") or ()],
        bytes_sent=report.get("bytes_sent"),
        bytes_received=report.get("bytes_received"),
        bytes_unattributed=report.get("bytes_unattributed"),
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
        in_and_out(row.bytes_received, row.bytes_sent),
        "" if row.time_left is None else format_duration(row.time_left),
        "" if row.tasks_done is None else str(row.tasks_done),
        word,
    )
    return tuple(printable(" ".join(text.split())) or "-" for text in texts)


def in_and_out(received: int | None, sent: int | None) -> str:
    """Bytes each way for people; nothing where they are not known."""
    return "" if received is None or sent is None else f"{format_bytes(received)}/{format_bytes(sent)}"


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


def story(job: BatchJob, rows: Sequence[Row], script: str, output: Sequence[str]) -> list[str]:
    """Return the lines of ``hpcq pilots show``: what is known of a job's pilots, its script, the end of its output."""
    lines = [f"job {job.id} of {job.batch}, submitted {_clock(job.submitted_at)}"]
    for row in rows:
        told = zip(HEADS[1:], cells(row)[1:], strict=True)
        lines += [f"  {head.lower():<10} {cell}" for head, cell in told if cell != "-"]
        lines += [f"  {'auto':<10} {printable(line)}" for line in row.tunnel_passed_over]
        if row.exit_code is not None:
            lines.append(f"  {'exit':<10} {row.exit_code}")
        if row.failed_start:
            lines.append("  it ended and its pilot never reported: what stopped it should be in its output")
        elif row.failed_layer:
            lines.append(f"  its pilot could not serve: {row.failed_layer}: {row.message}")
    lines += ["", f"script {job.script}", *(f"  | {line}" for line in script.splitlines())]
    if not output:
        elsewhere = "; if its node does not see that file, look there for hpcq-… in $TMPDIR, else /tmp"
        hint = elsewhere if PLACEHOLDER in script else ""
        return [*lines, "", f"it printed nothing {'' if _over(rows) else 'yet '}to {job.output}{hint}"]
    return [*lines, "", f"the end of its output, {job.output}", *(f"  | {line}" for line in output)]


def _over(rows: Sequence[Row]) -> bool:
    return all(row.state in {state.value for state in JobState if state.is_final} | {"gone", "failed"} for row in rows)


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
