"""What a task is: its options, its outcomes, and what the user reads from it afterwards.

A `Task` is a shell command, a `PythonTask` a function with its arguments. Options are validated when they are set, so
that a mistake is refused at the line that made it; after ``submit`` they are frozen. Results are filled in by the
queue; a value is unpickled when it is first read.

May not live here: where a task runs, how it travels, what is retried (see `scheduler`).
"""

from __future__ import annotations

import difflib
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import msgspec

from hpcq.errors import TaskFailedError, UsageError

OUTPUT_LIMIT = 16 * 1024 * 1024
"""Bytes of standard output, and as many of standard error, that are kept whole for a task."""

NETWORKS = ("any", "wan", "host")
ISOLATIONS = ("warm", "fork", "fresh")


class Outcome(enum.StrEnum):
    """How a task ended."""

    SUCCESS = "success"
    EXCEPTION = "exception"
    EXIT_CODE = "exit_code"
    WALLTIME = "walltime"
    RESOURCES = "resources"
    LOST = "lost"
    CRASH = "crash"
    NETWORK = "network"
    CANCELLED = "cancelled"
    UNSERIALIZABLE = "unserializable"
    FILES = "files"


class Options(msgspec.Struct, frozen=True, gc=False):
    """Everything `Task.set` takes, with the defaults."""

    cores: int = 1
    memory: int = 0
    walltime: float | None = None
    priority: float = 0
    tag: str | None = None
    category: str | None = None
    retries: int = 3
    env: Mapping[str, str] | None = None
    network: str = "any"
    isolation: str = "warm"
    disk: int = 0
    gpus: int = 0
    features: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None


DEFAULTS = Options()


def whole_number(name: str, value: object, least: int) -> int:
    """``value`` if it is a whole number of at least ``least``.

    Raises:
        UsageError: it is not; names the option.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    number = value.__index__()
    if number < least:
        raise UsageError(f"{name} must be at least {least}, not {number}")
    return int(number)


def _number(name: str, value: object) -> float:
    try:
        number = float(value) if hasattr(value, "__float__") and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # as an array, or an integer of 400 digits
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} must be a finite number, not {value!r}")
    return number


def _walltime(name: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = _number(name, value)
    if seconds <= 0:
        raise UsageError(f"{name} must be more than 0 seconds, not {value!r}")
    return seconds


def _label(name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"{name} must be a string, not {value!r}")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if value in allowed and isinstance(value, str):
            return value
        raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")

    return check


def _environment(name: str, value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must map variable names to strings, not {value!r}")
    for key, text in value.items():
        if not isinstance(key, str) or not key or "=" in key or "\0" in key:
            raise UsageError(f"{name} has a variable name that cannot be used: {key!r}")
        if not isinstance(text, str) or "\0" in text:
            raise UsageError(f"{name}[{key!r}] must be a string without NUL, not {text!r}")
        if not _is_text(key + text):
            raise UsageError(f"{name}[{key!r}] must be text that UTF-8 can express, not {text!r}")
    return dict(value)


def _files(name: str, value: object) -> Any:
    from hpcq.files import sources  # noqa: PLC0415 - runners and tasks without files do without

    return (sources.check_inputs if name == "inputs" else sources.check_outputs)(name, value)


def _is_text(value: str, errors: str = "strict") -> bool:
    try:
        value.encode(errors=errors)
    except UnicodeEncodeError:
        return False
    return True


def _features(name: str, value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a set of strings, not {value!r}")
    features = frozenset(value)
    for feature in features:
        if not isinstance(feature, str) or not feature:
            raise UsageError(f"{name} must be a set of strings, and one of them is {feature!r}")
    return features


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "cores": lambda name, value: whole_number(name, value, 1),
    "memory": lambda name, value: whole_number(name, value, 0),
    "disk": lambda name, value: whole_number(name, value, 0),
    "gpus": lambda name, value: whole_number(name, value, 0),
    "walltime": _walltime,
    "priority": _number,
    "tag": _label,
    "category": _label,
    "retries": lambda name, value: whole_number(name, value, 0),
    "env": _environment,
    "network": _one_of(NETWORKS),
    "features": _features,
    "isolation": _one_of(ISOLATIONS),
    "inputs": _files,
    "outputs": _files,
}


def changed(options: Options, changes: Mapping[str, object]) -> Options:
    """``options`` with ``changes`` applied.

    Raises:
        UsageError: an unknown option (with the nearest known one) or a bad value, by name.
    """
    checked = {}
    for name, value in changes.items():
        check = _CHECKS.get(name)
        if check is None:
            raise UsageError(_unknown(name))
        checked[name] = check(name, value)
    return msgspec.structs.replace(options, **checked)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _CHECKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(_CHECKS)}"
    return f"unknown task option {name!r}{hint}"


class Attempt(msgspec.Struct, frozen=True, gc=False):
    """What the queue knows of a finished task; times are wall-clock seconds since the epoch, by the pilot's clock.

    ``load`` is a large value or exception (`hpcq.parcels.Load`); ``payload`` is empty then.
    """

    outcome: Outcome
    message: str = ""
    payload: bytes = b""
    exit_code: int | None = None
    std_output: bytes = b""
    std_error: bytes = b""
    left_out: int = 0
    pilot: str | None = None
    hostname: str | None = None
    attempts: int = 0
    started_at: float | None = None
    finished_at: float | None = None
    memory: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0
    load: Any = None


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
        if not _is_text(command, "surrogateescape"):
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
        """How often the task was begun."""
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
        in other processes than its own may be missed.
        """
        attempt = self._attempt
        if attempt is None or attempt.started_at is None or attempt.finished_at is None:
            return {}
        wall = attempt.finished_at - attempt.started_at
        return {"memory": attempt.memory, "disk": attempt.disk, "cpu": attempt.cpu, "wall": wall}

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
            BaseException: what the function raised, its remote traceback as ``__cause__``.
            TaskFailedError: the task ended in any other way than success.
        """
        raised = self.exception
        if raised is not None:
            raise raised
        return super().result()
