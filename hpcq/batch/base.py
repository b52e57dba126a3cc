"""What a batch system is to the rest of hpcq: the types, and the interface that the adapters fill.

An adapter builds argvs and scripts, and parses output; it decides nothing. Which jobs to ask about and when
is the tracker's business, what a pilot does inside its job is the pilot's.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from hpcq.batch import inline, records
from hpcq.batch.command import CommandResult, CommandRunner, NoAnswerError
from hpcq.batch.interrupts import interrupts_wait
from hpcq.batch.records import BatchJob, load_jobs, output_tail
from hpcq.batch.text import refuse_unprintable
from hpcq.errors import BatchError, UsageError
from hpcq.state_dir import check_queue_name, ensure_jobs_dir

__all__ = [
    "BatchJob",
    "BatchSystem",
    "CommandResult",
    "CommandRunner",
    "JobState",
    "JobStatus",
    "PilotRequest",
    "RenderedJob",
    "get_batch_system",
    "load_jobs",
    "output_tail",
]

log = logging.getLogger("hpcq.batch")

_ADAPTERS = {
    "local": "hpcq.batch.local:LocalBatch",
    "pbs": "hpcq.batch.pbs:PbsBatch",
    "slurm": "hpcq.batch.slurm:SlurmBatch",
    "torque": "hpcq.batch.pbs:TorqueBatch",
}
_NAMES = ("partition", "account", "qos", "constraint", "reservation", "mail")
MAX_COUNT = 100_000
MAX_CORES = 100_000
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class JobState(enum.Enum):
    """What a batch job is doing, in words common to all batch systems.

    ``COMPLETING`` is still there (processes may be alive); ``HELD`` waits for somebody to release it;
    ``UNKNOWN`` is a job the batch system says nothing about, or in a state we have no word for, and it
    changes nothing.
    """

    PENDING = "pending"
    HELD = "held"
    RUNNING = "running"
    SUSPENDED = "suspended"
    COMPLETING = "completing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    NODE_FAIL = "node_fail"
    PREEMPTED = "preempted"
    OUT_OF_MEMORY = "out_of_memory"
    UNKNOWN = "unknown"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended. UNKNOWN is not an end."""
        return self in _FINAL


_FINAL = frozenset(
    {
        JobState.DONE,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.TIMEOUT,
        JobState.NODE_FAIL,
        JobState.PREEMPTED,
        JobState.OUT_OF_MEMORY,
    }
)


@dataclass(frozen=True)
class JobStatus:
    """One job as the batch system reports it.

    ``reason`` is the scheduler's own word for why it waits or ended; ``hosts`` is empty until it has some;
    ``exit_code`` is None where the batch system does not tell (-N: killed by signal N); ``raw_state`` is its
    own name for the state, empty when the job is not listed at all.
    """

    id: str
    state: JobState
    reason: str = ""
    hosts: str = ""
    exit_code: int | None = None
    raw_state: str = ""

    @property
    def is_listed(self) -> bool:
        """Whether the batch system mentioned the job. One that it has forgotten ended some time ago."""
        return bool(self.raw_state)


@dataclass(frozen=True, kw_only=True)
class PilotRequest:
    """``count`` batch jobs to submit, with one pilot on each of their ``nodes``.

    ``cores``, ``gpus`` and ``memory_mb`` (MB of 2**20 bytes) are those of one node; ``walltime_s`` is in seconds; None
    leaves them to the site's defaults. ``mail`` is an address that is told of ends and failures. ``options`` are passed
    to the batch system as they are, one directive each ("--constraint=knl"). ``modules`` are loaded, ``setup`` are
    lines of shell to run before the pilot, ``epilogue`` lines to run after it. ``pilot_argv`` is the command
    that the script becomes (see ``pilot_command``). ``environment`` is set in the script, which is no place
    for secrets. With ``inline`` the script carries the connection data (see ``hpcq.batch.inline``).

    Raises:
        UsageError: a value that no batch system could use, by name.
    """

    queue: str
    pilot_argv: tuple[str, ...]
    count: int = 1
    nodes: int = 1
    cores: int = 1
    gpus: int | None = None
    memory_mb: int | None = None
    walltime_s: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    mail: str | None = None
    options: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()
    template: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    job_name: str = ""
    inline: bool = False

    def __post_init__(self) -> None:
        check_queue_name(self.queue)
        _check_range("count", self.count, 1, MAX_COUNT)
        _check_range("nodes", self.nodes, 1, MAX_COUNT)
        _check_range("cores", self.cores, 1, MAX_CORES)
        if self.gpus is not None:
            _check_range("gpus", self.gpus, 0, MAX_CORES)
        if not isinstance(self.exclusive, bool):
            raise UsageError(f"exclusive must be true or false, not {self.exclusive!r}")
        for name in ("memory_mb", "walltime_s"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 1, 2**53)
        for name in _NAMES:
            if getattr(self, name) == "":
                raise UsageError(f"{name} is empty; leave it out to use the site's default")
        for name in self.environment:
            if _VARIABLE_NAME.fullmatch(name) is None:
                raise UsageError(f"environment: {name!r} is not a variable's name")
        if not self.pilot_argv:
            raise UsageError("pilot_argv is empty: there is nothing for the job to run")
        self._check_text()

    def _check_text(self) -> None:
        for name in (*_NAMES, "job_name"):
            refuse_unprintable(name, getattr(self, name))
        for name in ("options", "modules", "setup", "epilogue", "pilot_argv"):
            refuse_unprintable(name, list(getattr(self, name)))
        refuse_unprintable("environment", dict(self.environment))

    @property
    def name(self) -> str:
        """The job's name in the batch system's listings."""
        return self.job_name or f"hpcq-{self.queue}"


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} {value!r} is not a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} {value} is out of range: it must be between {low} and {high}")


class PartlySubmittedError(BatchError):
    """Some of the jobs were submitted before the batch system refused; ``jobs`` are there and on record."""

    def __init__(self, jobs: Sequence[BatchJob], asked: int, error: BaseException) -> None:
        what = str(error) or "interrupted"
        super().__init__(f"{len(jobs)} of {asked} pilots are submitted ({jobs[0].id} to {jobs[-1].id}), then: {what}")
        self.jobs = list(jobs)


@dataclass(frozen=True)
class RenderedJob:
    """The exact script, but for connection data that it is to carry, and the exact command that submits it."""

    script: str
    command: tuple[str, ...]


class BatchSystem(abc.ABC):
    """One batch system. Methods block for as long as its commands do, at most their time limit."""

    name: ClassVar[str]
    min_gap: ClassVar[float] = 10.0
    """Seconds that two questions about jobs are apart at least: sites ban users who poll more."""

    cancel_waits: ClassVar[bool] = False
    """Whether ``cancel`` returns only when the jobs have ended."""

    submits_at_once: ClassVar[bool] = True
    """Whether one command submits all jobs of a request: then Ctrl-C is heard when they are on record."""

    def __init__(self, runner: CommandRunner | None = None) -> None:
        self.runner = runner or CommandRunner()

    @abc.abstractmethod
    def render(self, request: PilotRequest, directory: Path | None = None) -> RenderedJob:
        """Return the script and command for ``request``; nothing is run or written.

        ``directory`` is where the submission's files will be; None picks a new one, as ``submit`` would.

        Raises:
            UsageError: a value this batch system cannot take, by name.
            TemplateError: the template cannot be rendered.
        """

    def submit(self, request: PilotRequest) -> list[BatchJob]:
        """Submit ``request.count`` jobs and return them; the script and a record of them stay in the queue's
        files.

        Raises:
            KeyboardInterrupt: Ctrl-C; what was submitted is on record.
            UsageError, TemplateError: as ``render``.
            BatchError: the batch system is missing, refused (its message is in the error) or did not answer.
        """
        directory = records.new_directory(request.queue)
        rendered = self.render(request, directory)
        ensure_jobs_dir(request.queue)
        script = inline.fill_in(rendered.script, request.queue) if request.inline else rendered.script
        records.write_script(directory, script)
        jobs: list[BatchJob] = []
        try:
            with interrupts_wait() if self.submits_at_once else contextlib.nullcontext():
                jobs = self._launch(request, rendered, directory)
                self.record(jobs, request, directory)
        except KeyboardInterrupt:
            if jobs:
                log.warning("%d pilots had been submitted: %s to %s", len(jobs), jobs[0].id, jobs[-1].id)
            raise
        except PartlySubmittedError as error:
            self.record(error.jobs, request, directory)
            raise
        except NoAnswerError as error:
            advice = (
                f"a job {request.name!r} may be there all the same, unknown to us: look for it, and cancel it there"
            )
            raise BatchError(f"{error}; {advice}") from error
        return jobs

    def record(self, jobs: Sequence[BatchJob], request: PilotRequest, directory: Path) -> None:
        """Put on record what jobs came of a submission so far.

        Raises:
            BatchError: it cannot be written; names the jobs.
        """
        try:
            records.save_submission(directory, jobs, _summary(request))
        except OSError as error:
            ids = ", ".join(job.id for job in jobs)
            raise BatchError(f"submitted {ids}, but cannot record it in {directory}: {error}") from error

    @abc.abstractmethod
    def _launch(self, request: PilotRequest, rendered: RenderedJob, directory: Path) -> list[BatchJob]:
        """Hand the written script to the batch system; return the jobs that came of it."""

    @abc.abstractmethod
    def status(self, jobs: Sequence[BatchJob]) -> dict[str, JobStatus]:
        """Return the state of every one of ``jobs``, by id, from one call; UNKNOWN where nothing is said.

        Raises:
            BatchError: no answer to be had. The jobs' states are then simply not known.
        """

    @abc.abstractmethod
    def cancel(self, jobs: Sequence[BatchJob]) -> None:
        """Ask for ``jobs`` to be ended: SIGTERM, later SIGKILL. One that has ended already is no error.

        Raises:
            BatchError: the batch system refused or did not answer.
        """


def shared_values(request: PilotRequest) -> dict[str, object]:
    """Return the template variables that mean the same to every batch system; None where an option was not given."""
    return {
        "job_name": request.name,
        "queue": request.queue,
        "count": request.count,
        "nodes": request.nodes,
        "cores": request.cores,
        "gpus": request.gpus or None,
        "memory_mb": request.memory_mb,
        "walltime_s": request.walltime_s,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "reservation": request.reservation,
        "exclusive": request.exclusive or None,
        "mail": request.mail,
        "modules": request.modules,
        "setup": request.setup,
        "environment": dict(request.environment),
        "epilogue": request.epilogue,
        "pilot_argv": request.pilot_argv,
        "connection": inline.PLACEHOLDER if request.inline else None,
    }


def get_batch_system(name: str, runner: CommandRunner | None = None) -> BatchSystem:
    """Return the batch system called ``name``.

    Raises:
        UsageError: an unknown name; lists the known ones.
    """
    if name not in _ADAPTERS:
        raise UsageError(f"unknown batch system {name!r}; known are {', '.join(sorted(_ADAPTERS))}")
    module, _, attribute = _ADAPTERS[name].partition(":")
    adapter: type[BatchSystem] = getattr(importlib.import_module(module), attribute)
    return adapter(runner)


def batch_system_names() -> list[str]:
    """Return the names that ``get_batch_system`` takes, sorted."""
    return sorted(_ADAPTERS)


_SUMMARY = ("count", "nodes", "cores", "gpus", "memory_mb", "walltime_s", *_NAMES, "exclusive")


def _summary(request: PilotRequest) -> dict[str, object]:
    """Return what was asked for, for the record: without the command line and environment, which are in the
    script.
    """
    return {
        **{name: getattr(request, name) for name in _SUMMARY},
        "options": list(request.options),
        "template": None if request.template is None else str(request.template),
        "job_name": request.name,
    }
