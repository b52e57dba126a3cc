"""What a batch system is to the rest of hpcq: the types, and the interface that ``slurm`` and ``local`` fill.

An adapter builds argvs and scripts, and parses output; it decides nothing. Which jobs to ask about and when
is the tracker's business, what a pilot does inside its job is the pilot's.
"""

from __future__ import annotations

import abc
import enum
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from hpcq.batch import records
from hpcq.batch.command import CommandResult, CommandRunner
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

_ADAPTERS = {"local": "hpcq.batch.local:LocalBatch", "slurm": "hpcq.batch.slurm:SlurmBatch"}
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
    """``count`` pilots to submit, each a batch job of its own.

    ``memory_mb`` is per job, in MB of 2**20 bytes; ``walltime_s`` in seconds; None leaves them to the site's
    defaults. ``options`` are passed to the batch system as they are, one directive each ("--constraint=knl").
    ``setup`` are lines of shell to run before the pilot ("module load gcc"). ``pilot_argv`` is the command
    that the script becomes (see ``pilot_command``). ``environment`` is set in the script, which is no place
    for secrets.

    Raises:
        UsageError: a value that no batch system could use, by name.
    """

    queue: str
    pilot_argv: tuple[str, ...]
    count: int = 1
    cores: int = 1
    memory_mb: int | None = None
    walltime_s: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    template: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    job_name: str = ""

    def __post_init__(self) -> None:
        check_queue_name(self.queue)
        _check_range("count", self.count, 1, MAX_COUNT)
        _check_range("cores", self.cores, 1, MAX_CORES)
        for name in ("memory_mb", "walltime_s"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 1, 2**53)
        for name in ("partition", "account", "qos", "constraint"):
            if getattr(self, name) == "":
                raise UsageError(f"{name} is empty; leave it out to use the site's default")
        for name in self.environment:
            if _VARIABLE_NAME.fullmatch(name) is None:
                raise UsageError(f"environment: {name!r} is not a variable's name")
        if not self.pilot_argv:
            raise UsageError("pilot_argv is empty: there is nothing for the job to run")
        self._check_text()

    def _check_text(self) -> None:
        for name in ("partition", "account", "qos", "constraint", "job_name"):
            refuse_unprintable(name, getattr(self, name))
        for name in ("options", "setup", "pilot_argv"):
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


@dataclass(frozen=True)
class RenderedJob:
    """The exact script, and the exact command that submits it."""

    script: str
    command: tuple[str, ...]


class BatchSystem(abc.ABC):
    """One batch system. Methods block for as long as its commands do, at most their time limit."""

    name: ClassVar[str]

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
            UsageError, TemplateError: as ``render``.
            BatchError: the batch system is missing, refused (its message is in the error) or did not answer.
        """
        directory = records.new_directory(request.queue)
        rendered = self.render(request, directory)
        ensure_jobs_dir(request.queue)
        records.write_script(directory, rendered.script)
        jobs = self._launch(request, rendered, directory)
        try:
            records.save_submission(directory, jobs, _summary(request))
        except OSError as error:
            ids = ", ".join(job.id for job in jobs)
            raise BatchError(f"submitted {ids}, but cannot record it in {directory}: {error}") from error
        return jobs

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


def _summary(request: PilotRequest) -> dict[str, object]:
    """Return what was asked for, for the record: without the command line and environment, which are in the
    script.
    """
    return {
        "count": request.count,
        "cores": request.cores,
        "memory_mb": request.memory_mb,
        "walltime_s": request.walltime_s,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "options": list(request.options),
        "template": None if request.template is None else str(request.template),
        "job_name": request.name,
    }
