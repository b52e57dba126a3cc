"""From what was specified to a task of hpcq, and from how that ended to Work Queue's result."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hpcq
from hpcq.files.sources import URL, Buffer, File, Temp
from hpcq.outcome import Outcome
from hpcq.work_queue import sandbox
from hpcq.work_queue.constants import (
    WORK_QUEUE_CACHE,
    WORK_QUEUE_RESULT_FORSAKEN,
    WORK_QUEUE_RESULT_INPUT_MISSING,
    WORK_QUEUE_RESULT_MAX_RETRIES,
    WORK_QUEUE_RESULT_OUTPUT_MISSING,
    WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR,
    WORK_QUEUE_RESULT_RESOURCE_EXHAUSTION,
    WORK_QUEUE_RESULT_SIGNAL,
    WORK_QUEUE_RESULT_STDOUT_MISSING,
    WORK_QUEUE_RESULT_SUCCESS,
    WORK_QUEUE_RESULT_TASK_MAX_RUN_TIME,
    WORK_QUEUE_RESULT_TASK_TIMEOUT,
    WORK_QUEUE_SYMLINK,
    unsupported,
)
from hpcq.work_queue.specification import Input
from hpcq.work_queue.tasks import PythonTask, Task

WITHOUT_END = 1_000_000_000
"""Retries of a task that may be tried without end."""

PIECE = 1 << 20
"""Bytes of a file piece that are copied at a time."""

KILLED = 9
"""The return status of a task that was ended."""

RESULTS = {
    Outcome.SUCCESS: (WORK_QUEUE_RESULT_SUCCESS, 0),
    Outcome.EXCEPTION: (WORK_QUEUE_RESULT_SUCCESS, 0),
    Outcome.EXIT_CODE: (WORK_QUEUE_RESULT_SUCCESS, -1),
    Outcome.WALLTIME: (WORK_QUEUE_RESULT_TASK_MAX_RUN_TIME, KILLED),
    Outcome.RESOURCES: (WORK_QUEUE_RESULT_RESOURCE_EXHAUSTION, -1),
    Outcome.LOST: (WORK_QUEUE_RESULT_MAX_RETRIES, -1),
    Outcome.CRASH: (WORK_QUEUE_RESULT_SIGNAL, -1),
    Outcome.CANCELLED: (WORK_QUEUE_RESULT_FORSAKEN, -1),
    Outcome.UNSERIALIZABLE: (WORK_QUEUE_RESULT_OUTPUT_MISSING, 1),
    Outcome.FILES: (WORK_QUEUE_RESULT_INPUT_MISSING, -1),
}
"""Outcomes of hpcq as result and return status, before what is told apart further."""


class _Command(hpcq.Task):
    """A command in its wrapping; shown as the user wrote it."""

    __slots__ = ("owner", "shown")
    owner: Task
    shown: str

    @property
    def summary(self) -> str:
        """As in `hpcq.Task`."""
        return self.shown if len(self.shown) <= 60 else self.shown[:57] + "..."


class _Call(hpcq.PythonTask):
    """A function, perhaps in its wrapping."""

    __slots__ = ("owner", "shown")
    owner: Task
    shown: str

    @property
    def summary(self) -> str:
        """As in `hpcq.PythonTask`."""
        return self.shown


class Builder:
    """Makes tasks of hpcq. ``staging`` holds what exists for a task's sake only; ``produce`` submits a task whose
    output others take, and tells nobody when it is done."""

    def __init__(self, staging: str, produce: Callable[[hpcq.Task], None]) -> None:
        self._staging = staging
        self._produce = produce
        self._commands: dict[str, Temp] = {}

    def build(self, task: Task, resources: Mapping[str, int], now: float) -> Any:
        """A new task of hpcq; ``resources`` are those that its category adds, ``now`` in seconds since the epoch.

        Raises:
            NotImplementedError: something is specified that cannot be honoured.
            ValueError: something is specified that makes no sense.
        """
        outputs = list(task._outputs.values())
        unset = [name for name, value in task._environment.items() if value is None]
        if isinstance(task, PythonTask):
            run: Any = _call(task, outputs, unset)
        else:
            if not task._command:
                raise ValueError("the task has no command; see specify_command")
            run = _Command(sandbox.script(task._command, outputs, unset))
        run.shown, run.owner = task._command, task
        run.set(**self._options(task, resources, now))
        run.set(inputs=self._inputs(task))
        if outputs:
            _check_apart(outputs)
            task._arrival = sandbox.arrival(outputs)
            run.set(outputs={sandbox.GATHERED: task._arrival})
        return run

    def _options(self, task: Task, resources: Mapping[str, int], now: float) -> dict[str, Any]:
        options: dict[str, Any] = {**resources, **task._resources}
        env = {name: value for name, value in task._environment.items() if value is not None}
        for name in ("cores", "memory", "disk", "gpus"):
            if name in options:
                env.setdefault(name.upper(), str(options[name]))
        options.update(
            tag=task._tag, category=task._category, priority=task._priority, features=task._features,
            retries=task._max_retries or WITHOUT_END, env=env or None, walltime=_walltime(task, now),
        )  # fmt: skip
        return options

    def _inputs(self, task: Task) -> dict[str, Any] | None:
        names = [os.path.normpath(name) + "/" for name in task._inputs]
        inputs = {}
        for remote, wanted in task._inputs.items():
            below = os.path.normpath(remote) + "/"
            if wanted.kind == "directory" and any(name != below and name.startswith(below) for name in names):
                continue  # it is there for what lies in it
            inputs[remote] = self._source(wanted)
        return inputs or None

    def _source(self, wanted: Input) -> Any:
        cache = bool(wanted.flags & WORK_QUEUE_CACHE)
        if wanted.kind == "file":
            return File(wanted.source, cache=cache, link=cache and bool(wanted.flags & WORK_QUEUE_SYMLINK))
        if wanted.kind == "buffer":
            return Buffer(wanted.source)
        if wanted.kind == "url":
            return URL(wanted.source, cache=cache)
        if wanted.kind == "command":
            return self._made_by(wanted.source, cache)
        if wanted.kind == "directory":
            return File(tempfile.mkdtemp(dir=self._staging), cache=False)
        return self._piece(wanted.source, *wanted.span)

    def _made_by(self, command: str, cache: bool) -> Temp:
        """A file that a command writes on a pilot; with ``cache`` the same one for all tasks."""
        if cache and command in self._commands:
            return self._commands[command]
        made = Temp()
        self._produce(hpcq.Task(command.replace("%%", "made"), outputs={"made": made}))
        if cache:
            self._commands[command] = made
        return made

    def _piece(self, source: str, first: int, last: int) -> File:
        """A part of a file as a file of its own; of one that cannot be read, the same name: the task will say so."""
        descriptor, path = tempfile.mkstemp(dir=self._staging)
        try:
            with open(descriptor, "wb") as piece, Path(source).open("rb") as whole:  # noqa: PTH123 - a descriptor
                whole.seek(first)
                left = last - first + 1
                while left > 0 and (data := whole.read(min(left, PIECE))):
                    piece.write(data)
                    left -= len(data)
        except OSError:
            Path(path).unlink()
            return File(source, cache=False)
        return File(path, cache=False)


def _call(task: PythonTask, outputs: list[sandbox.Output], unset: list[str]) -> _Call:
    function, args, kwargs = task._call
    if not outputs and not unset:
        return _Call(function, *args, **kwargs)
    gathered = [(output.remote, output.when) for output in outputs] if outputs else None
    return _Call(sandbox.inside, function, args, kwargs, gathered, unset)


def _check_apart(outputs: list[sandbox.Output]) -> None:
    for output in outputs:
        for other in outputs:
            if other is not output and other.remote.startswith(output.remote + "/"):
                raise ValueError(f"the output {other.remote!r} lies in the output {output.remote!r}")


def _walltime(task: Task, now: float) -> float | None:
    if task._running_time_min > task._running_time_max:
        unsupported(
            "specify_running_time_min without a longer specify_running_time_max",
            "a task is not placed where less time is left than its running_time_max",
        )
    limits = [task._running_time_max] if task._running_time_max else []
    if task._end_time:
        limits.append(max(1e-3, task._end_time - max(now, task._start_time_min)))
    return min(limits, default=None)


def settle(task: Task, now: float) -> None:
    """The task has ended: what its result is for Work Queue; its outputs are put in their places."""
    run = task._run
    task._result, task._return_status = RESULTS.get(run.outcome, (WORK_QUEUE_RESULT_FORSAKEN, -1))
    if run.outcome in (Outcome.WALLTIME, Outcome.CANCELLED) and 0 < task._end_time <= now:
        task._result, task._return_status = WORK_QUEUE_RESULT_TASK_TIMEOUT, KILLED
    elif run.outcome == Outcome.EXIT_CODE and task._arrival:  # not the task, which exits inside: the gathering failed
        task._result, task._problem = WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR, f"outputs: {task._run.std_output[-500:]}"
    elif run.outcome == Outcome.EXIT_CODE:
        task._return_status = -1 if run.exit_code is None else run.exit_code
    elif run.outcome == Outcome.FILES and run.message.startswith("output"):
        task._result = WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR
    elif run.outcome == Outcome.SUCCESS:
        if run.output_left_out:
            task._result = WORK_QUEUE_RESULT_STDOUT_MISSING
        if task._arrival:
            _place(task)
    if task._arrival:
        sandbox.drop(task._arrival)


def _place(task: Task) -> None:
    status: int | None = 0
    if isinstance(task, PythonTask):
        with contextlib.suppress(Exception):  # a value that cannot be rebuilt here is `output`'s to tell
            status = task._run.output[0]
    else:
        status = sandbox.read_status(task._arrival)
        if status is None:
            task._result = WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR
            return
        task._return_status = status
    assert status is not None
    missing, failed = sandbox.place(task._arrival, list(task._outputs.values()), status)
    if failed:
        task._result, task._problem = WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR, f"outputs: {'; '.join(failed)}"
    elif missing:
        task._result, task._problem = WORK_QUEUE_RESULT_OUTPUT_MISSING, f"outputs are missing: {', '.join(missing)}"
