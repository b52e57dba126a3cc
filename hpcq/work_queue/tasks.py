"""`Task` and `PythonTask` with Work Queue's attributes: how they ended.

Each ``submit`` makes a new task of hpcq from what is specified then (see `build`), so that a task may be submitted
again after `WorkQueue.wait` returned it. May not live here: queues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcq.errors import RemoteTraceback
from hpcq.outcome import Outcome
from hpcq.work_queue.constants import (
    RESULT_NAMES,
    WORK_QUEUE_RESULT_RESOURCE_EXHAUSTION,
    WORK_QUEUE_RESULT_SUCCESS,
    WORK_QUEUE_SCHEDULE_UNSET,
    unsupported,
)
from hpcq.work_queue.specification import Specified
from hpcq.work_queue.summary import Resources

MEASURED_ELSEWHERE = {
    "exhausted_attempts": "attempts that ended for want of memory or disk are not counted one by one",
    "total_cmd_exhausted_execute_time": "attempts that ended for want of memory or disk are not timed one by one",
    "app_delay": "the queue works in a thread of its own and waits for no application",
    "send_input_start": "transfers are not timed for each task",
    "send_input_finish": "transfers are not timed for each task",
    "receive_output_start": "transfers are not timed for each task",
    "receive_output_finish": "transfers are not timed for each task",
    "total_bytes_received": "transfers are not counted for each task",
    "total_bytes_sent": "transfers are not counted for each task",
    "total_bytes_transferred": "transfers are not counted for each task",
    "total_transfer_time": "transfers are not timed for each task",
}
"""Attributes of a task that hpcq does not measure, and why."""


class PythonTaskNoResult(Exception):  # noqa: N818 - Work Queue's name
    """What ``output`` is when a function's task did not come to an end by itself."""


class Task(Specified):
    """A shell command. See the table in `hpcq.work_queue`."""

    @property
    def tag(self) -> str | None:
        """As specified."""
        return self._tag

    @property
    def category(self) -> str:
        """As specified, else ``default``."""
        return self._category or "default"

    @property
    def command(self) -> str | None:
        """As specified."""
        return self._command

    @property
    def priority(self) -> float:
        """As specified."""
        return self._priority

    @property
    def algorithm(self) -> int:
        """``WORK_QUEUE_SCHEDULE_UNSET``."""
        return WORK_QUEUE_SCHEDULE_UNSET

    @property
    def id(self) -> int:
        """The number that ``submit`` returned; 0 before."""
        return self._id

    @property
    def std_output(self) -> str | None:
        """Standard output and error of the task; None while it has not ended."""
        if self._run is None or not self._run.done:
            return None
        return str(self._run.std_output + self._run.std_error)

    @property
    def output(self) -> Any:
        """The same."""
        return self.std_output

    @property
    def return_status(self) -> int:
        """The exit status (128 + N after signal N); -1 when it never ended by itself."""
        return self._return_status

    @property
    def result(self) -> int:
        """One of ``WORK_QUEUE_RESULT_…``; ``UNKNOWN`` while it has not ended."""
        return self._result

    @property
    def result_str(self) -> str:
        """The name of ``result``."""
        return RESULT_NAMES[self._result]

    @property
    def message(self) -> str:
        """What happened in one line, where there is something to say (hpcq's own)."""
        return self._problem or (str(self._run.message) if self._run is not None else "")

    @property
    def total_submissions(self) -> int:
        """How often it was begun."""
        return int(self._run.attempts) if self._run is not None else 0

    @property
    def host(self) -> str | None:
        """The host it ran on (Work Queue adds an address and a port)."""
        return self.hostname

    @property
    def hostname(self) -> str | None:
        """The host it ran on."""
        return self._run.hostname if self._run is not None else None

    def _time(self, name: str) -> int:
        moment = getattr(self._run, name, None)
        return int(moment * 1e6) if moment is not None else 0

    @property
    def submit_time(self) -> int:
        """When it was submitted (µs since the epoch)."""
        return self._time("submitted_at")

    @property
    def finish_time(self) -> int:
        """When it ended (µs since the epoch, by its pilot's clock)."""
        return self._time("finished_at")

    @property
    def execute_cmd_start(self) -> int:
        """When it began (µs since the epoch, by its pilot's clock)."""
        return self._time("started_at")

    @property
    def execute_cmd_finish(self) -> int:
        """The same as ``finish_time``."""
        return self._time("finished_at")

    @property
    def cmd_execution_time(self) -> int:
        """How long it ran (µs)."""
        return self.execute_cmd_finish - self.execute_cmd_start

    @property
    def total_cmd_execution_time(self) -> int:
        """The same; refused for a task that was begun more than once."""
        if self.total_submissions > 1:
            unsupported("total_cmd_execution_time of a task that ran more than once", "use cmd_execution_time")
        return self.cmd_execution_time

    @property
    def resources_measured(self) -> Resources | None:
        """What it used; None when it never ran."""
        used = self._run.resources_measured if self._run is not None else {}
        if not used:
            return None
        start, wall = self._time("started_at"), used["wall"]
        average = used["cpu"] / wall if wall > 0 else 0.0
        carried = {f"bytes_{name}": used[name] / 2**20 for name in ("sent", "received") if name in used}
        return Resources(
            start=start, end=start + int(wall * 1e6), wall_time=wall, cpu_time=used["cpu"], cores_avg=average,
            memory=used["memory"], disk=used["disk"], **carried,
        )  # fmt: skip

    @property
    def resources_requested(self) -> Resources:
        """What was specified for it, -1 where nothing was."""
        return Resources(**{name: self._resources.get(name, -1) for name in ("cores", "memory", "disk", "gpus")})

    @property
    def resources_allocated(self) -> Resources:
        """What it took of its pilot; refused where its category decides while it waits."""
        if self._run is None:
            return Resources(cores=0, memory=0, disk=0, gpus=0)
        if self._learned:
            unsupported("resources_allocated in a category that learns", "resources_measured has what it used")
        options = self._run.options
        return Resources(cores=options.cores, memory=options.memory, disk=options.disk, gpus=options.gpus)

    _learned = False

    @property
    def limits_exceeded(self) -> Resources | None:
        """What it used of memory or disk when that was too much; else None."""
        if self._result != WORK_QUEUE_RESULT_RESOURCE_EXHAUSTION:
            return None
        used = self._run.resources_measured
        return Resources(**{name: used[name] for name in ("memory", "disk") if name in self._run.message})

    def __getattr__(self, name: str) -> Any:
        if name in MEASURED_ELSEWHERE:
            unsupported(name, MEASURED_ELSEWHERE[name])
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


class PythonTask(Task):
    """A function call. ``output`` is its value or the exception it raised, else a `PythonTaskNoResult`."""

    def __init__(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not callable(func):
            raise TypeError(f"a PythonTask takes a function, not {type(func).__name__}")
        super().__init__(f"{getattr(func, '__qualname__', repr(func))}(…)")
        self._call = (func, args, kwargs)

    def specify_command(self, command: str) -> None:
        """Refused: a function has none."""
        unsupported("specify_command of a PythonTask", "make a Task")

    def specify_environment(self, env_file: str | None) -> None:
        """Refused, but for None."""
        if env_file:
            unsupported(
                "PythonTask.specify_environment",
                "an environment belongs to a pilot: Factory.python_env, or hpcq submit-pilots --environment",
            )

    specify_package = specify_environment

    @property
    def output(self) -> Any:
        """The value, the exception object, or a `PythonTaskNoResult`; None while it has not ended."""
        if self._output is None and self._run is not None and self._run.done:
            self._output = (self._value(),)
        return self._output[0] if self._output else None

    def _value(self) -> Any:
        if self._run.outcome not in (Outcome.SUCCESS, Outcome.EXCEPTION):
            return PythonTaskNoResult(self.message)
        try:
            value, text = self._run.output, ""
            if self._arrival:
                _, value, text = value
        except Exception as error:  # as in Work Queue: what cannot be rebuilt here
            return error
        if text:
            value.__cause__ = RemoteTraceback(text)
            return value  # that it raised is more to know than that it therefore wrote no outputs
        return value if self._result == WORK_QUEUE_RESULT_SUCCESS else PythonTaskNoResult(self.message)


class RemoteTask(Task):
    """Refused: there are no coprocesses."""

    def __init__(self, fn: str, coprocess: str, *args: Any, **kwargs: Any) -> None:
        unsupported("RemoteTask", "use PythonTask, which calls functions in an interpreter that stays warm")
