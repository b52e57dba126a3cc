"""What is kept of every submission, on disk: ``jobs/<submission>/`` with the script, the jobs and their
output.

| file | what |
|---|---|
| ``script.sh`` | the rendered script, written before it is submitted |
| ``job.json`` | the jobs that came of it and what was asked for, written as soon as the ids are known |
| ``output.txt``, ``output_3.txt`` | the output of the job, or of the third of several |
| ``<id>.OU``, ``messages_3.txt`` | what PBS itself had to say of a job, once it is over |
| ``ended-<id>.json`` | the job's last state, once somebody saw it end |
| ``starts-<id>`` | a line for each time PBS started the job |
| ``reported-<id>`` | there once the job's pilot has reported to a program of the queue |

The directory's name is ours, because a job may start, and need the directory for its output, before the batch
system has even told us its id; ``jobs/<batch job id>`` is a link to it. Every file is written whole or not at
all, so a record survives a kill at any point: a directory without ``job.json`` is a submission whose outcome
is not known.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hpcq import state_dir
from hpcq.batch.text import last_lines

logger = logging.getLogger(__name__)

_SUBJOB = re.compile(r"\[\d*\]", re.ASCII)
TAIL_BYTES = 64 * 1024
"""How much of the end of an output file is looked at for its last lines."""


@dataclass(frozen=True)
class BatchJob:
    """One job of a batch system.

    ``directory`` holds the files of its submission, ``script`` and ``output`` among them (the output exists
    once the job has started). ``submitted_at`` is seconds since the epoch. ``cluster`` is set where a Slurm
    federation named one; ``messages`` is where the batch system puts its own words about the job, if it has such a
    file.
    """

    id: str
    batch: str
    queue: str
    directory: Path
    script: Path
    output: Path
    submitted_at: float
    cluster: str = ""
    messages: Path | None = None


class _Entry(msgspec.Struct, frozen=True):
    id: str
    output: str
    messages: str = ""


class _Submission(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    batch: str
    queue: str
    submitted_at: float
    cluster: str = ""
    jobs: list[_Entry]
    request: dict[str, object] = {}


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """The last state of a job: ``state`` is a ``JobState`` value, ``seen_at`` is seconds since the epoch."""

    state: str
    reason: str = ""
    hosts: str = ""
    exit_code: int | None = None
    seen_at: float


def new_directory(queue: str) -> Path:
    """Return a path for a new submission's files. It sorts by time and is unique; nothing is created."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    return state_dir.jobs_dir(queue) / f"{stamp}.{nanoseconds // 1000:06}-{secrets.token_hex(3)}"


def script_path(directory: Path) -> Path:
    """Return where a submission's script is."""
    return directory / "script.sh"


def output_path(directory: Path, index: int | str | None = None) -> Path:
    """Return where a job's output is: ``index`` is its place among several (or its id, where the batch system gives no
    places), None when it is the only one.
    """
    return directory / ("output.txt" if index is None else f"output_{index}.txt")


def write_script(directory: Path, script: str) -> Path:
    """Make the submission's directory with the script in it."""
    state_dir.ensure_private_dir(directory)
    path = script_path(directory)
    state_dir.write_private(path, script.encode())
    path.chmod(0o700)
    return path


def save_submission(directory: Path, jobs: Sequence[BatchJob], request: Mapping[str, object]) -> None:
    """Record the jobs of a submission and link their id to it."""
    first = jobs[0]
    submission = _Submission(
        batch=first.batch,
        queue=first.queue,
        submitted_at=first.submitted_at,
        cluster=first.cluster,
        jobs=[_Entry(job.id, job.output.name, job.messages.name if job.messages else "") for job in jobs],
        request=dict(request),
    )
    state_dir.write_private(directory / "job.json", msgspec.json.format(msgspec.json.encode(submission)))
    link = directory.parent / base_id(first.id)
    with contextlib.suppress(OSError):  # a convenience for people; the record does not need it
        link.unlink(missing_ok=True)
        link.symlink_to(directory.name)


def base_id(job_id: str) -> str:
    """Return the id that a submission's jobs share: "4711" for "4711_3", "18[].pbs1" for "18[3].pbs1"."""
    if "[" in job_id:
        return _SUBJOB.sub("[]", job_id, count=1)
    return job_id.partition("_")[0] if "." not in job_id else job_id


def names(job: BatchJob) -> set[str]:
    """Return all that a user may call a job, or the submission it is of: with the server's name and without."""
    full = {job.id, base_id(job.id)}
    short = {name.partition(".")[0] for name in full}
    return full | short | {name.removesuffix("[]") for name in short}


def load_jobs(queue: str, passed_over: Collection[Path] = ()) -> list[BatchJob]:
    """Return every job recorded for ``queue``, oldest first, without those of the submissions ``passed_over`` (their
    directories). A record that cannot be read is logged and left out.
    """
    wanted = [directory for directory in _submissions(queue) if directory not in passed_over]
    return [job for directory in wanted for job in _read_submission(directory)]


def _submissions(queue: str) -> list[Path]:
    try:
        entries = list(os.scandir(state_dir.jobs_dir(queue)))
    except OSError:
        return []
    return sorted(Path(e.path) for e in entries if e.is_dir(follow_symlinks=False))


def _read_submission(directory: Path) -> list[BatchJob]:
    path = directory / "job.json"
    try:
        submission = msgspec.json.decode(path.read_bytes(), type=_Submission)
    except FileNotFoundError:
        return []  # the submission was refused, or is under way
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("cannot read the batch record %s: %s", path, error)
        return []
    return [
        BatchJob(
            id=entry.id,
            batch=submission.batch,
            queue=submission.queue,
            directory=directory,
            script=script_path(directory),
            output=directory / Path(entry.output).name,
            submitted_at=submission.submitted_at,
            cluster=submission.cluster,
            messages=directory / Path(entry.messages).name if entry.messages else None,
        )
        for entry in submission.jobs
    ]


def save_ending(job: BatchJob, ending: Ending, *, replace: bool = False) -> None:
    """Record that ``job`` ended, so that nobody has to ask about it again; a record that exists is kept, unless
    ``replace``. One that cannot be written is logged and does without: it must keep nobody from cancelling jobs.
    """
    path = _ending_path(job)
    if replace or not path.exists():
        try:
            state_dir.write_private(path, msgspec.json.encode(ending))
        except OSError as error:
            logger.warning("how job %s ended is not on record: %s", job.id, error)


def load_ending(job: BatchJob) -> Ending | None:
    """Return how ``job`` ended, or None when nobody has seen it end."""
    try:
        return msgspec.json.decode(_ending_path(job).read_bytes(), type=Ending)
    except (OSError, msgspec.MsgspecError):
        return None


def _ending_path(job: BatchJob) -> Path:
    return job.directory / f"ended-{job.id}.json"


def mark_reported(job: BatchJob) -> None:
    """Record that the job's pilot has reported: whatever becomes of it, it did not fail to start. Where that cannot be
    written it is logged.
    """
    try:
        _report_path(job).touch(mode=0o600)
    except OSError as error:
        logger.warning("that the pilot of job %s has reported is not on record: %s", job.id, error)


def has_reported(job: BatchJob) -> bool:
    """Whether the job's pilot is on record as having reported."""
    return _report_path(job).exists()


def _report_path(job: BatchJob) -> Path:
    return job.directory / f"reported-{job.id}"


def output_tail(job: BatchJob, lines: int = 20) -> list[str]:
    """Return the last ``lines`` non-blank lines of the job's output, and of the batch system's own words about it;
    empty when there is nothing yet.
    """
    own = _tail(job.output, lines)
    added = _tail(job.messages, lines) if job.messages else []
    return [*own, *added][-lines:]


def _tail(path: Path, lines: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read(TAIL_BYTES)
    except OSError:
        return []
    return last_lines(data.decode("utf-8", errors="replace"), lines)
