"""Slurm: argvs for sbatch, squeue, sacct and scancel, and parsers of what they print. No decisions.

Site banners and warnings may surround any output, so only lines of the expected form count and the rest is
kept for error messages. A job leaves squeue's listing some minutes after its end (MinJobAge), however it ended: sacct
is asked about those, and where a site keeps no accounts, or sacct knows nothing either, they are UNKNOWN.

sbatch takes options from the command line, then ``SBATCH_*`` variables, then ``#SBATCH`` lines. So what hpcq
must be able to find again (``--output``, ``--array``) is on the command line, and variables that would
overrule what the user told hpcq are hidden from sbatch. The others stay: sites set them as defaults.

Sources: sbatch(1), squeue(1), sacct(1), scancel(1) of 22.05; states as of 25.05.
"""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcq.batch import records
from hpcq.batch.base import (
    BatchJob,
    BatchSystem,
    JobState,
    JobStatus,
    PilotRequest,
    RenderedJob,
    shared_values,
)
from hpcq.batch.command import CommandResult, refusal
from hpcq.batch.directives import check_directives
from hpcq.batch.ranges import ranges
from hpcq.batch.slurm_options import check_option
from hpcq.batch.templates import check_shell_syntax, render_template
from hpcq.batch.text import last_lines
from hpcq.errors import BatchError, UsageError
from hpcq.units import format_slurm_time

log = logging.getLogger("hpcq.batch")

STATES = {
    "PENDING": JobState.PENDING,
    "CONFIGURING": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.HELD,
    "RESV_DEL_HOLD": JobState.HELD,
    "SPECIAL_EXIT": JobState.HELD,
    "RUNNING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "SUSPENDED": JobState.SUSPENDED,
    "STOPPED": JobState.SUSPENDED,
    "COMPLETING": JobState.COMPLETING,
    "STAGE_OUT": JobState.COMPLETING,
    "COMPLETED": JobState.DONE,
    "FAILED": JobState.FAILED,
    "LAUNCH_FAILED": JobState.FAILED,
    "CANCELLED": JobState.CANCELLED,
    "TIMEOUT": JobState.TIMEOUT,
    "DEADLINE": JobState.TIMEOUT,
    "NODE_FAIL": JobState.NODE_FAIL,
    "BOOT_FAIL": JobState.NODE_FAIL,
    "PREEMPTED": JobState.PREEMPTED,
    "OUT_OF_MEMORY": JobState.OUT_OF_MEMORY,
    "DELETED": JobState.CANCELLED,
    "EXPEDITING": JobState.PENDING,
    "POWER_UP_NODE": JobState.PENDING,
    "UPDATE_DB": JobState.COMPLETING,
    # Another cluster of the federation runs it: it has not ended, and here nothing more will be heard of it.
    "REVOKED": JobState.UNKNOWN,
}
"""Every state that ``%T`` and sacct's ``State`` can print, as a word of ours; one that is not here is UNKNOWN."""

WARNING_S = 120
"""Seconds before the end of the walltime at which the pilot gets SIGTERM (Slurm may send it 60 s earlier)."""

CLOCK_TOLERANCE = 24 * 3600
"""Seconds that the clock of Slurm's accounts may be behind ours."""
_NO_ACCOUNTS = "accounting storage is disabled"

_MARK = "hpcq"
_FORMAT = f"{_MARK}|%i|%T|%N|%r"
_STATUS_LINE = re.compile(rf"{_MARK}\|(?P<id>\d+(?:_\d+)?)\|(?P<state>[A-Z_]+)\|(?P<hosts>[^|]*)\|(?P<reason>.*)")
_ACCOUNT_LINE = re.compile(
    r"(?P<id>\d+(?:_\d+)?)\|(?P<state>[A-Z_]+)(?: by \S+)?\+?\|(?P<code>\d+):(?P<signal>\d+)"
    r"\|(?P<hosts>[^|]*)\|(?P<reason>.*)",
    re.ASCII,
)
_ACCOUNT_FIELDS = "JobID,State,ExitCode,NodeList,Reason"
_SUBMITTED_LINE = re.compile(r"(?P<id>\d+)(?:;(?P<cluster>[\w.-]+))?", re.ASCII)
_GONE = ("Invalid job id specified", "already completing or completed")

_OVERRULES = {
    "partition": ("SBATCH_PARTITION",),
    "account": ("SBATCH_ACCOUNT",),
    "qos": ("SBATCH_QOS",),
    "constraint": ("SBATCH_CONSTRAINT",),
    "walltime_s": ("SBATCH_TIMELIMIT",),
    "memory_mb": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
}
ALWAYS_HIDDEN = (
    "SBATCH_ARRAY_INX",
    "SBATCH_ERROR",
    "HPCQ_JOB_ID",  # of a pilot that submits: the new pilots would inherit it and take it for theirs
    "HPCQ_ON_NODE",
    "HPCQ_STARTS",
    "SBATCH_JOB_NAME",
    "SBATCH_NO_REQUEUE",
    "SBATCH_OPEN_MODE",
    "SBATCH_SIGNAL",
    "SBATCH_WAIT",
)
"""Variables that sbatch, also behind Slurm's qsub, must not see: they would undo what hpcq needs."""


class SlurmBatch(BatchSystem):
    """Pilots as Slurm jobs; several at once are one job array."""

    name = "slurm"
    _has_accounts = True

    def render(self, request: PilotRequest, directory: Path | None = None) -> RenderedJob:
        """See ``BatchSystem.render``; directives that sbatch would ignore or misread are refused."""
        directory = directory or records.new_directory(request.queue)
        for option in request.options:
            check_option(option)
        script = render_template("slurm.sh.j2", request.template, template_values(request, directory))
        origin = f"template {request.template or 'slurm.sh.j2'}"
        check_directives(script, "#SBATCH", origin)
        check_shell_syntax(script, origin, self.runner)
        return RenderedJob(script, submit_argv(request.count, directory, inline=request.inline))

    def _launch(self, request: PilotRequest, rendered: RenderedJob, directory: Path) -> list[BatchJob]:
        hidden = hidden_variables(request)
        result = self.runner.run(rendered.command, keep_variable=lambda name: name not in hidden, keep_locale=True)
        script = records.script_path(directory)
        if result.status != 0:
            raise refusal(result, f"script {script}{_hint(result, request.count)}")
        job_id, cluster = parse_submitted(result, f"script {script}")
        indexes: list[int | None] = [None] if request.count == 1 else list(range(request.count))
        return [
            BatchJob(
                id=job_id if index is None else f"{job_id}_{index}",
                batch=self.name,
                queue=request.queue,
                directory=directory,
                script=script,
                output=records.output_path(directory, index),
                submitted_at=time.time(),
                cluster=cluster,
            )
            for index in indexes
        ]

    def status(self, jobs: Sequence[BatchJob]) -> dict[str, JobStatus]:
        """See ``BatchSystem.status``. One squeue call (one for each cluster, where a federation named several), and
        one of sacct for the jobs that it does not list.
        """
        statuses = {job.id: JobStatus(job.id, JobState.UNKNOWN) for job in jobs}
        for cluster, members in _by_cluster(jobs).items():
            result = self.runner.run(status_argv(members, cluster), keep_variable=_not_squeue_default)
            if result.status != 0 and not _only_gone(result):
                raise refusal(result)
            listed = parse_statuses(result.stdout)
            missing = [job for job in members if job.id not in listed]
            if missing and self._has_accounts:
                listed = self._accounts(missing, cluster) | listed
            statuses.update({id_: status for id_, status in listed.items() if id_ in statuses})
        return statuses

    def _accounts(self, jobs: Sequence[BatchJob], cluster: str) -> dict[str, JobStatus]:
        """What the accounts say of jobs that have left the listing: nothing, where there are none to be asked."""
        try:
            result = self.runner.run(account_argv(jobs, cluster), keep_variable=_not_sacct_default)
        except BatchError as error:  # not installed, or too slow: squeue did answer, and that is the answer
            log.info("no accounts of jobs that squeue does not list: %s", error)
            return {}
        if result.status != 0:
            self._has_accounts = _NO_ACCOUNTS not in result.stderr + result.stdout
            log.info("%s", refusal(result))
            return {}
        return parse_accounts(result.stdout)

    def cancel(self, jobs: Sequence[BatchJob]) -> None:
        """See ``BatchSystem.cancel``. Slurm sends SIGTERM, and SIGKILL after its KillWait (30 s)."""
        for cluster, members in _by_cluster(jobs).items():
            result = self.runner.run(cancel_argv(members, cluster), keep_variable=_not_scancel_default)
            if result.status != 0 and not _only_gone(result):
                raise refusal(result)


def template_values(request: PilotRequest, directory: Path) -> dict[str, object]:
    """Return the variables of ``slurm.sh.j2``; None where an option was not given."""
    walltime = request.walltime_s
    return {
        **shared_values(request),
        "walltime": None if walltime is None else format_slurm_time(walltime),
        "warning_s": WARNING_S if walltime is None else min(WARNING_S, walltime // 4),
        "options": request.options,
        "directory": str(directory) if request.inline else None,
    }


def submit_argv(count: int, directory: Path, *, inline: bool = False) -> tuple[str, ...]:
    """Return the sbatch command for ``count`` jobs whose files are in ``directory``, which with ``inline`` the nodes
    need not see: Slurm would not start a job whose output it cannot open there, so the script sees to that.

    Raises:
        UsageError: the directory has a backslash, which turns off Slurm's file name patterns.
    """
    if "\\" in str(directory):
        raise UsageError(f"the state directory {directory} has a backslash in it, which Slurm cannot write to")
    folder = str(directory).replace("%", "%%")
    array = () if count == 1 else (f"--array=0-{count - 1}",)
    output = "/dev/null" if inline else f"{folder}/output.txt" if count == 1 else f"{folder}/output_%a.txt"
    return ("sbatch", "--parsable", *array, f"--output={output}", str(records.script_path(directory)))


def status_argv(jobs: Sequence[BatchJob], cluster: str = "") -> tuple[str, ...]:
    """Return the squeue command that lists ``jobs``, arrays expanded, ended jobs included."""
    where = (f"--clusters={cluster}",) if cluster else ()
    return (
        "squeue",
        "--me",
        "--states=all",
        "--noheader",
        "--array",
        *where,
        f"--format={_FORMAT}",
        f"--jobs={_base_ids(jobs)}",
    )


def _base_ids(jobs: Sequence[BatchJob]) -> str:
    """The ids of ``jobs``, each array once."""
    return ",".join(sorted({records.base_id(job.id) for job in jobs}, key=int))


def account_argv(jobs: Sequence[BatchJob], cluster: str = "") -> tuple[str, ...]:
    """Return the sacct command for ``jobs``: only of this time, since Slurm uses its ids again."""
    where = (f"--clusters={cluster}",) if cluster else ()
    since = time.localtime(min(job.submitted_at for job in jobs) - CLOCK_TOLERANCE)
    return (
        "sacct",
        "--allocations",
        "--noheader",
        "--parsable2",
        *where,
        f"--starttime={time.strftime('%Y-%m-%dT%H:%M:%S', since)}",
        f"--format={_ACCOUNT_FIELDS}",
        f"--jobs={_base_ids(jobs)}",
    )


def cancel_argv(jobs: Sequence[BatchJob], cluster: str = "") -> tuple[str, ...]:
    """Return the scancel command for ``jobs``; the members of an array go into one request
    (``4711_[0,2,5]``).
    """
    where = (f"--clusters={cluster}",) if cluster else ()
    arrays: dict[str, list[int]] = {}
    for job in jobs:
        base, _, index = job.id.partition("_")
        arrays.setdefault(base, []).extend([int(index)] if index else [])
    return ("scancel", "--quiet", *where, *(_array_expression(base, arrays[base]) for base in arrays))


def _array_expression(base: str, indexes: list[int]) -> str:
    if not indexes:
        return base
    return f"{base}_{indexes[0]}" if len(indexes) == 1 else f"{base}_[{','.join(ranges(indexes))}]"


def parse_submitted(result: CommandResult, where: str) -> tuple[str, str]:
    """Return the job id and the cluster (or "") from ``sbatch --parsable``: a line ``ID`` or ``ID;CLUSTER``.

    Raises:
        BatchError: there is no such line, although sbatch claims success; carries what it did print.
    """
    found = [match for line in result.stdout.splitlines() if (match := _SUBMITTED_LINE.fullmatch(line.strip()))]
    if not found:
        said = " | ".join(last_lines(result.stdout + "\n" + result.stderr, 5)) or "nothing"
        raise BatchError(f"sbatch reported no job id (host {socket.gethostname()}, {where}); it printed: {said}")
    return found[-1]["id"], found[-1]["cluster"] or ""


def parse_statuses(output: str) -> dict[str, JobStatus]:
    """Return what squeue says, by job id; lines that are not ours are passed over."""
    statuses = {}
    for line in output.splitlines():
        match = _STATUS_LINE.fullmatch(line.strip())
        if match:
            reason = _value(match["reason"])
            statuses[match["id"]] = JobStatus(
                id=match["id"],
                state=_state(match["state"], reason),
                reason=reason,
                hosts=_value(match["hosts"]),
                raw_state=match["state"],
            )
    return statuses


def parse_accounts(output: str) -> dict[str, JobStatus]:
    """Return what sacct says, by job id; lines that are not ours are passed over. The last line of a job counts."""
    statuses = {}
    for line in output.splitlines():
        match = _ACCOUNT_LINE.fullmatch(line.strip())
        if match:
            code, signal = int(match["code"]), int(match["signal"])
            state = STATES.get(match["state"], JobState.UNKNOWN)
            statuses[match["id"]] = JobStatus(
                id=match["id"],
                state=state,
                reason=_value(match["reason"]),
                hosts=_value(match["hosts"]),
                exit_code=(-signal if signal else code) if state.is_final else None,
                raw_state=match["state"],
            )
    return statuses


def _state(name: str, reason: str) -> JobState:
    state = STATES.get(name, JobState.UNKNOWN)
    # Slurm has no state for a held job that has never run, only a reason (JobHeldUser, JobHeldAdmin).
    return JobState.HELD if state is JobState.PENDING and reason.startswith("JobHeld") else state


def _value(text: str) -> str:
    return "" if text.strip() in ("None", "(null)", "n/a", "N/A", "None assigned", "Unknown") else text.strip()


def hidden_variables(request: PilotRequest) -> frozenset[str]:
    """Return the ``SBATCH_*`` variables that would overrule what ``request`` says or what hpcq needs."""
    stated = [names for field, names in _OVERRULES.items() if getattr(request, field) is not None]
    return frozenset(ALWAYS_HIDDEN).union(*stated)


def _hint(result: CommandResult, count: int) -> str:
    """Return what to do about a refusal whose message does not say."""
    if "Invalid job array specification" in result.stderr:
        return f"; the site allows arrays of fewer than {count} jobs: submit them in parts"
    return ""


def _only_gone(result: CommandResult) -> bool:
    """Whether all that a command complains about is jobs that have ended: not an error, they are just not
    listed.
    """
    complaints = [line for line in result.stderr.splitlines() if "error: " in line]
    return bool(complaints) and all(any(words in line for words in _GONE) for line in complaints)


def _by_cluster(jobs: Iterable[BatchJob]) -> dict[str, list[BatchJob]]:
    clusters: dict[str, list[BatchJob]] = {}
    for job in jobs:
        clusters.setdefault(job.cluster, []).append(job)
    return clusters


def _not_squeue_default(name: str) -> bool:
    return not name.startswith("SQUEUE_")


def _not_sacct_default(name: str) -> bool:
    return not name.startswith("SACCT_") and name != "SLURM_TIME_FORMAT"


def _not_scancel_default(name: str) -> bool:
    return not name.startswith("SCANCEL_")
