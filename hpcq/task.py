"""What a task is to the user who makes it, and what is read from it afterwards.

A `Task` is a shell command, a `PythonTask` a function with its arguments. Options (see `options`) are frozen after
``submit``. Results are filled in by the queue; a value is unpickled when it is first read.

May not live here: where a task runs, how it travels, what is retried (see `scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from hpcq.errors import TaskFailedError, UsageError
from hpcq.options import DEFAULTS, Options, changed, is_text
from hpcq.outcome import Attempt, Outcome

_UNREAD = object()


def _option(name: str) -> Any:
    def read(task: Task) -> Any:
        return getattr(task._options, name)

    def write(task: Task, value: object) -> None:
        task.set(**{name: value})

    return property(read, write, doc=f"The option ``{name}``.")


class Task:
    """A shell command: ``hpcq.Task("sort in.txt", cores=2)``.

    ``output`` is its standard output, ``exit_code`` its exit status (``128 + N`` when signal N ended it). Standard
    output and error are kept whole up to 16 MiB each; of more, the first and last 8 MiB.
    """

    __slots__ = ("_attempt", "_options", "_value", "command", "id", "submitted_at")

    cores: int = _option("cores")
    memory: int = _option("memory")
    disk: int = _option("disk")
    gpus: int = _option("gpus")
    walltime: float | None = _option("walltime")
    priority: float = _option("priority")
    tag: str | None = _option("tag")
    category: str | None = _option("category")
    retries: int = _option("retries")
    env: Mapping[str, str] | None = _option("env")
    network: str = _option("network")
    isolation: str = _option("isolation")
    features: frozenset[str] = _option("features")
    inputs: Mapping[str, Any] | None = _option("inputs")
    outputs: Mapping[str, Any] | None = _option("outputs")

    def __init__(self, command: str, **options: Any) -> None:
        if not isinstance(command, str):
            raise UsageError(f"a Task takes a shell command as one string, not {type(command).__name__}")
        if not command.strip():
            raise UsageError("a Task's command is empty")
        if "\0" in command:
            raise UsageError("a Task's command holds a NUL byte")
        if not is_text(command, "surrogateescape"):
            raise UsageError(f"a Task's command holds a character that cannot be passed on: {command!r}")
        self._begin(command, options)

    def _begin(self, command: str, options: Mapping[str, object]) -> None:
        self.command = command
        self.id: int | None = None
        self.submitted_at: float | None = None
        self._options = changed(DEFAULTS, options) if options else DEFAULTS
        self._attempt: Attempt | None = None
        self._value: Any = _UNREAD

    def set(self, **options: Any) -> Self:
        """Set options by name; returns the task.

        Raises:
            UsageError: an unknown option or bad value, or the task was already submitted.
        """
        if self.id is not None:
            raise UsageError(f"task {self.id} was already submitted; its options can no longer be changed")
        self._options = changed(self._options, options)
        return self

    def file(self, name: str) -> Any:
        """The output ``name`` of this task, to be an input of another one.

        Raises:
            UsageError: no such output is declared.
        """
        from hpcq.files import sources  # noqa: PLC0415 - as above

        declared = self._options.outputs or {}
        if name not in declared:
            raise UsageError(
                f"{self.label} declares no output {name!r}; it has {', '.join(map(repr, declared)) or 'none'}"
            )
        return sources.TaskFile(self, name)

    @property
    def options(self) -> Options:
        """All options as one frozen value."""
        return self._options

    def _finish(self, attempt: Attempt) -> None:
        self._attempt = attempt

    @property
    def done(self) -> bool:
        """Whether the task has ended, in whatever way."""
        return self._attempt is not None

    @property
    def outcome(self) -> str | None:
        """One of the outcomes of `Outcome`; None while the task has not ended."""
        return None if self._attempt is None else self._attempt.outcome.value

    @property
    def message(self) -> str:
        """What happened, in one line, for every outcome but success."""
        return "" if self._attempt is None else self._attempt.message

    @property
    def std_output(self) -> str:
        """What the task wrote to standard output."""
        return "" if self._attempt is None else self._attempt.std_output.decode(errors="replace")

    @property
    def std_error(self) -> str:
        """What the task wrote to standard error."""
        return "" if self._attempt is None else self._attempt.std_error.decode(errors="replace")

    @property
    def output_left_out(self) -> int:
        """Bytes of output over the limit that were not kept."""
        return 0 if self._attempt is None else self._attempt.left_out

    @property
    def exit_code(self) -> int | None:
        """Exit status of the command; None for a function or when it never ended by itself."""
        return None if self._attempt is None else self._attempt.exit_code

    @property
    def pilot(self) -> str | None:
        """Name of the pilot of the last attempt."""
        return None if self._attempt is None else self._attempt.pilot

    @property
    def hostname(self) -> str | None:
        """Host of the last attempt."""
        return None if self._attempt is None else self._attempt.hostname

    @property
    def attempts(self) -> int:
        """How often the task was begun, as far as is known: its pilot may have been gone before it could tell."""
        return 0 if self._attempt is None else self._attempt.attempts

    @property
    def started_at(self) -> float | None:
        """When the last attempt began, by the clock of its pilot's host (seconds since the epoch)."""
        return None if self._attempt is None else self._attempt.started_at

    @property
    def finished_at(self) -> float | None:
        """When the last attempt ended, by the clock of its pilot's host (seconds since the epoch)."""
        return None if self._attempt is None else self._attempt.finished_at

    @property
    def resources_measured(self) -> Mapping[str, float]:
        """What the last attempt used: ``memory`` and ``disk`` at their most (MB), ``cpu`` and ``wall`` in seconds.

        Empty when it never ran. ``memory`` counts the interpreter too. What a task used for less than half a second
        in other processes than its own may be missed. Where its bytes through the tunnel were counted, ``sent`` and
        ``received`` are those of its TCP connections.
        """
        attempt = self._attempt
        if attempt is None or attempt.started_at is None or attempt.finished_at is None:
            return {}
        wall = attempt.finished_at - attempt.started_at
        used = {"memory": attempt.memory, "disk": attempt.disk, "cpu": attempt.cpu, "wall": wall}
        if attempt.sent is not None and attempt.received is not None:
            used.update(sent=attempt.sent, received=attempt.received)
        return used

    @property
    def exception(self) -> BaseException | None:
        """The exception a function raised, its remote traceback as ``__cause__``; else None."""
        return None

    @property
    def output(self) -> Any:
        """A command's standard output; None while it has not ended."""
        return None if self._attempt is None else self.std_output

    def result(self) -> Any:
        """The output, or an exception for any outcome but success.

        Raises:
            TaskFailedError: the task did not succeed; says how it ended.
        """
        if self._attempt is None:
            raise TaskFailedError(f"{self.label} has not ended yet; wait for it")
        if self._attempt.outcome is not Outcome.SUCCESS:
            raise TaskFailedError(f"{self.label} ended as {self.outcome}: {self.message}")
        return self.output

    @property
    def label(self) -> str:
        """How messages name this task."""
        number = "an unsubmitted task" if self.id is None else f"task {self.id}"
        return f"{number} ({self.summary})"

    @property
    def summary(self) -> str:
        """The command, shortened for a line of output."""
        return self.command if len(self.command) <= 60 else self.command[:57] + "..."

    def __repr__(self) -> str:
        state = self.outcome or ("submitted" if self.id is not None else "new")
        return f"<{type(self).__name__} {self.id or '-'} {self.summary!r} {state}>"


class PythonTask(Task):
    """A function call: ``hpcq.PythonTask(my_sum, 10, y=20)``; all arguments go to the function.

    ``output`` is the function's value or, as in Work Queue, the exception object when it raised; ``result()`` returns
    the value or raises.
    """

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        if not callable(function):
            raise UsageError(f"a PythonTask takes a function, not {type(function).__name__}")
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self._begin("", {})

    @property
    def summary(self) -> str:
        """The function's name, for a line of output."""
        return f"{getattr(self.function, '__qualname__', repr(self.function))}(…)"

    def _load(self) -> Any:
        if self._value is _UNREAD:
            from hpcq import serialize  # noqa: PLC0415 - tasks are made without cloudpickle

            attempt = self._attempt
            assert attempt is not None
            data = attempt.payload if attempt.load is None else attempt.load.views()
            if attempt.outcome is Outcome.EXCEPTION:
                self._value = serialize.load_exception(data)
            else:
                self._value = serialize.load_value(data)
        return self._value

    @property
    def exception(self) -> BaseException | None:
        """The exception the function raised, its remote traceback as ``__cause__``; else None."""
        if self._attempt is None or self._attempt.outcome is not Outcome.EXCEPTION:
            return None
        raised = self._load()
        assert isinstance(raised, BaseException)
        return raised

    @property
    def output(self) -> Any:
        """The function's value, or the exception it raised; None for other outcomes."""
        if self._attempt is None or self._attempt.outcome not in (Outcome.SUCCESS, Outcome.EXCEPTION):
            return None
        return self._load()

    def result(self) -> Any:
        """The function's value.

        Raises:
            Exception: what the function raised, its remote traceback as ``__cause__``.
            TaskFailedError: the task ended in any other way than success; also when the function left by ``sys.exit``
                and its like, which would end this program: it is the ``__cause__``.
        """
        raised = self.exception
        if raised is not None and not isinstance(raised, Exception):
            raise TaskFailedError(f"{self.label}: the function raised {raised!r}") from raised
        if raised is not None:
            raise raised
        return super().result()
