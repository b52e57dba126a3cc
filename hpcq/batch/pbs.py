"""PBS: argvs for qsub, qstat and qdel, and what their answers mean. No decisions.

Two dialects. ``pbs`` is OpenPBS and PBS Pro: ``-l select=``, arrays, listings in JSON that keep ended jobs.
``torque`` is Torque and what imitates it (Slurm's wrappers): ``-l nodes=…:ppn=…``, a job for each pilot, listings in
text that drop ended jobs. What differs is in the two classes; what both mean by a listing is in ``pbs_listing``.

PBS hands a job's output over after its end only, and loses it where it cannot: so the script itself writes to the
pilot's output file, and what PBS adds ("job killed: walltime …") goes to another one beside it. A job that no listing
has is UNKNOWN.

Exit statuses and messages are those of OpenPBS 23.06; see qsub(1B), qstat(1B), qdel(1B).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hpcq import state_dir
from hpcq.batch import pbs_listing, records
from hpcq.batch.base import (
    BatchJob,
    BatchSystem,
    JobState,
    JobStatus,
    PartlySubmittedError,
    PilotRequest,
    RenderedJob,
    shared_values,
)
from hpcq.batch.command import CommandResult, refusal
from hpcq.batch.directives import check_directives, refuse_quotes
from hpcq.batch.interrupts import interrupts_wait
from hpcq.batch.pbs_options import split_option
from hpcq.batch.ranges import ranges
from hpcq.batch.slurm import ALWAYS_HIDDEN
from hpcq.batch.templates import check_shell_syntax, render_template
from hpcq.batch.text import last_lines
from hpcq.errors import BatchError, UsageError
from hpcq.units import format_duration

_UNKNOWN_JOB, _FINISHED = 153, 35
_ADVICE = {
    3: "the site allows smaller arrays only: submit them in parts",
    38: "the limit is one of the queue's for each user: submit fewer, or wait",
    159: "ask the site who may use the queue or account",
    162: "the server is down: try again later",
    166: "see --option, --memory and --walltime",
    170: "`qstat -Q` lists the queues",
    173: "the site has closed the queue: use another --partition",
    187: "see --option and --constraint",
    188: "ask for less, or for another --partition",
}
"""What to do, by qsub's exit status; its message says what is wrong."""

_GONE = ("Unknown Job Id", "Job has finished", "Request invalid for state of job", "invalid state for job")
_NO_HISTORY = "not configured to maintain job history"
_JOB_ID = re.compile(r"(?P<number>\d+)(?:\[(?P<index>\d*)\])?(?P<server>\.[\w.-]+)?", re.ASCII)
_SAFE_PATH = re.compile(r"[\w/.,:@%+=-]+", re.ASCII)


class PbsBatch(BatchSystem):
    """Pilots as jobs of OpenPBS or PBS Pro; several at once are one job array."""

    name = "pbs"
    name_limit: ClassVar[int] = 230
    submitted: ClassVar[re.Pattern[str]] = re.compile(r"(\d+(?:\[\])?\.[\w.-]+)", re.ASCII)
    other_dialect: ClassVar[str] = "torque"
    _has_history = True
    _has_json = True

    def render(self, request: PilotRequest, directory: Path | None = None) -> RenderedJob:
        """See ``BatchSystem.render``; what PBS has no word for is refused."""
        directory = directory or records.new_directory(request.queue)
        self._check(request)
        values = template_values(request, directory, self.name, self.name_limit)
        script = render_template("pbs.sh.j2", request.template, values)
        origin = f"template {request.template or 'pbs.sh.j2'}"
        check_directives(script, "#PBS", origin)
        refuse_quotes(script, "#PBS", origin)
        check_shell_syntax(script, origin, self.runner)
        return RenderedJob(script, self._submit_argv(request.count, directory))

    def _check(self, request: PilotRequest) -> None:
        if request.qos is not None:
            raise UsageError("qos means nothing to PBS; where the scheduler is Moab, use --option='-l qos=NAME'")
        if request.reservation is not None and request.partition is not None:
            raise UsageError("a reservation of PBS is a queue of its own: leave partition out")
        if ":" in str(state_dir.jobs_dir(request.queue)):
            raise UsageError(
                f"qsub would take {state_dir.queue_dir(request.queue)} for a host and a path: set "
                "HPCQ_STATE_DIR to a directory without a colon"
            )
        if request.inline and request.nodes > 1:
            raise UsageError("connection inline reaches the first node of a PBS job only: use jobs of one node")

    def _submit_argv(self, count: int, directory: Path) -> tuple[str, ...]:
        array = () if count == 1 else ("-J", f"0-{count - 1}")
        # -f: without it the first qsub leaves a helper behind that holds on to what it inherits. -o a directory: there
        # each job's file is named after its id.
        return ("qsub", "-f", *array, "-j", "oe", "-o", str(directory), str(records.script_path(directory)))

    def _launch(self, request: PilotRequest, rendered: RenderedJob, directory: Path) -> list[BatchJob]:
        job_id = self._submit(rendered.command, request, directory)
        if request.count == 1:
            return [self._job(request, directory, job_id, None, f"{job_id}.OU")]
        ids = [job_id.replace("[]", f"[{index}]") for index in range(request.count)]
        return [self._job(request, directory, one, str(index), f"{one}.OU") for index, one in enumerate(ids)]

    def _submit(self, command: Sequence[str], request: PilotRequest, directory: Path) -> str:
        result = self.runner.run(command, keep_variable=_not_hidden, keep_locale=True)
        where = f"script {records.script_path(directory)}"
        if result.status != 0:
            advice = _ADVICE.get(result.status, "")
            raise refusal(result, f"{where}; {advice}" if advice else where)
        job_id = self._parse_submitted(result, where)
        if ("[]" in job_id) != ("-J" in command):
            raise BatchError(f"qsub answered {job_id} for {request.count} pilots ({where}); see `qstat -t`")
        return job_id

    def _parse_submitted(self, result: CommandResult, where: str) -> str:
        """The job's id from qsub's output: a line that is nothing else.

        Raises:
            BatchError: there is none, although qsub claims success; carries what it did print.
        """
        lines = [line.strip() for line in result.stdout.splitlines()]
        found = [match[1] for line in lines if (match := self.submitted.fullmatch(line))]
        if found:
            return found[-1]
        said = " | ".join(last_lines(result.stdout + "\n" + result.stderr, 5)) or "nothing"
        raise BatchError(
            f"qsub reported no job id as {self.name} has them (host {socket.gethostname()}, {where}); "
            f"it printed: {said}; a qsub of another kind may need --batch {self.other_dialect}"
        )

    def _job(self, request: PilotRequest, directory: Path, job_id: str, output: str | None, messages: str) -> BatchJob:
        return BatchJob(
            id=job_id,
            batch=self.name,
            queue=request.queue,
            directory=directory,
            script=records.script_path(directory),
            output=records.output_path(directory, output),
            submitted_at=time.time(),
            messages=directory / messages,
        )

    def status(self, jobs: Sequence[BatchJob]) -> dict[str, JobStatus]:
        """See ``BatchSystem.status``. One qstat call; a second only where the first shows that this PBS keeps no
        ended jobs, or cannot write JSON.
        """
        statuses = {job.id: JobStatus(job.id, JobState.UNKNOWN) for job in jobs}
        if jobs:
            listed = self._list(jobs)
            statuses.update({job_id: status for job_id, status in listed.items() if job_id in statuses})
        return statuses

    def _list(self, jobs: Sequence[BatchJob]) -> dict[str, JobStatus]:
        result = self.runner.run(self._status_argv(jobs), keep_variable=_not_hidden)
        if self._has_history and _NO_HISTORY in result.stderr:
            self._has_history = False
            return self._list(jobs)
        if result.status not in (0, _UNKNOWN_JOB, _FINISHED):
            raise refusal(result)
        if not self._has_json:
            return pbs_listing.parse_text(result.stdout)
        try:
            return pbs_listing.parse_json(result.stdout)
        except pbs_listing.NotJsonError:
            if result.status != 0 and not result.stdout.strip():
                return {}
            self._has_json = False
            return self._list(jobs)

    def _status_argv(self, jobs: Sequence[BatchJob]) -> tuple[str, ...]:
        ids = sorted({records.base_id(job.id) for job in jobs}, key=_number)
        history = ("-x",) if self._has_history else ()
        form = ("-F", "json") if self._has_json else ()
        arrays = ("-t",) if any("[" in job_id for job_id in ids) else ()
        return ("qstat", *history, *arrays, "-f", *form, *ids)

    def cancel(self, jobs: Sequence[BatchJob]) -> None:
        """See ``BatchSystem.cancel``. PBS sends SIGTERM, and SIGKILL after its kill_delay (10 s)."""
        if not jobs:
            return
        result = self.runner.run(self._cancel_argv(jobs), keep_variable=_not_hidden)
        if result.status != 0 and not _only_gone(result):
            raise refusal(result)

    def _cancel_argv(self, jobs: Sequence[BatchJob]) -> tuple[str, ...]:
        single = [job.id for job in jobs if not _index(job.id)]
        arrays: dict[str, list[int]] = {}
        for job in jobs:
            if _index(job.id):
                arrays.setdefault(records.base_id(job.id), []).append(int(_index(job.id)))
        subjobs = [base.replace("[]", f"[{part}]") for base, indexes in arrays.items() for part in ranges(indexes)]
        return ("qdel", *single, *subjobs)


class TorqueBatch(PbsBatch):
    """Pilots as jobs of Torque or of commands that imitate it, Slurm's among them; each is a job of its own.

    Arrays are left alone: the imitations number them in ways of their own, and a cancelled subjob may take the others
    with it.
    """

    name = "torque"
    name_limit = 15
    submitted = re.compile(r"(\d+(?:\.[\w.-]+)?)", re.ASCII)
    other_dialect = "pbs"
    submits_at_once = False
    _has_history = False
    _has_json = False

    def _check(self, request: PilotRequest) -> None:
        super()._check(request)
        if request.reservation is not None:
            raise UsageError("Torque has no reservations of its own; use --option='-l advres=NAME' or -W x=…")

    def _submit_argv(self, count: int, directory: Path) -> tuple[str, ...]:
        script, messages = str(records.script_path(directory)), str(directory / _messages_name(0))
        for path in (script, messages):
            # Slurm's qsub hands its arguments to a shell as they are.
            if _SAFE_PATH.fullmatch(path) is None:
                raise UsageError(
                    f"qsub may misread the state directory {directory}: set HPCQ_STATE_DIR to a plain path"
                )
        return ("qsub", "-j", "oe", "-o", messages, script)

    def _launch(self, request: PilotRequest, rendered: RenderedJob, directory: Path) -> list[BatchJob]:
        jobs: list[BatchJob] = []
        for index in range(request.count):
            messages = _messages_name(index)
            command = (*rendered.command[:4], str(directory / messages), *rendered.command[5:])
            try:
                with interrupts_wait():
                    job_id = self._submit(command, request, directory)
                    jobs.append(self._job(request, directory, job_id, None if request.count == 1 else job_id, messages))
                    self.record(jobs, request, directory)  # each at once: many take minutes, in which we may be killed
            except (BatchError, KeyboardInterrupt) as error:
                if not jobs or len(jobs) == request.count:
                    raise
                raise PartlySubmittedError(jobs, request.count, error) from error
        return jobs

    def _cancel_argv(self, jobs: Sequence[BatchJob]) -> tuple[str, ...]:
        return ("qdel", *(job.id for job in jobs))


def template_values(request: PilotRequest, directory: Path, dialect: str, name_limit: int) -> dict[str, object]:
    """Return the variables of ``pbs.sh.j2``; None where an option was not given."""
    walltime = request.walltime_s
    return {
        **shared_values(request),
        "dialect": dialect,
        "job_name": request.name[:name_limit],
        "walltime": None if walltime is None else format_duration(walltime),
        "options": [split_option(option) for option in request.options],
        "script": str(records.script_path(directory)),
        "output": str(directory / "output"),
        "directory": str(directory),
    }


def _messages_name(index: int) -> str:
    """The file in which Torque puts what a job printed before its script took over, and its own messages."""
    return f"messages_{index}.txt"


def _number(job_id: str) -> tuple[int, str]:
    return int(re.match(r"\d*", job_id)[0] or 0), job_id  # type: ignore[index]


def _index(job_id: str) -> str:
    """The index of a subjob, empty for another job."""
    match = _JOB_ID.fullmatch(job_id)
    return (match["index"] or "") if match else ""


def _only_gone(result: CommandResult) -> bool:
    """Whether all that qdel complains about is jobs that have ended or are ending, of which Slurm's says nothing."""
    lines = [line for line in (result.stderr + "\n" + result.stdout).splitlines() if line.startswith("qdel: ")]
    if not lines:
        return not result.stderr.strip()
    return all(any(words in line for words in _GONE) for line in lines)


def _not_hidden(name: str) -> bool:
    """Whether qsub and the others may see a variable: not one that changes what they do behind hpcq's back."""
    return not name.startswith("PBS_QSTAT") and name != "PBS_DPREFIX" and name not in ALWAYS_HIDDEN
