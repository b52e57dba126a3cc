"""What Work Queue lets a program specify for a task. A part of `Task`; nothing here knows how it ends."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple, Self

from hpcq.work_queue.constants import (
    WORK_QUEUE_CACHE,
    WORK_QUEUE_FAILURE_ONLY,
    WORK_QUEUE_INPUT,
    WORK_QUEUE_NOCACHE,
    WORK_QUEUE_OUTPUT,
    WORK_QUEUE_PREEXIST,
    WORK_QUEUE_RESULT_UNKNOWN,
    WORK_QUEUE_SCHEDULE_UNSET,
    WORK_QUEUE_SUCCESS_ONLY,
    WORK_QUEUE_WATCH,
    unsupported,
)
from hpcq.work_queue.sandbox import Output


class Input(NamedTuple):
    """One declared input. ``kind`` is ``file``, ``directory`` (an empty one), ``buffer``, ``url``, ``command`` or
    ``piece``, whose ``span`` is its first and last byte."""

    kind: str
    source: Any
    flags: int = 0
    span: tuple[int, int] = (0, 0)


class Specified:
    """What a task is to be; `hpcq.work_queue.tasks.Task` adds how it ended."""

    def __init__(self, command: str | None) -> None:
        self._command = command
        self._tag: str | None = None
        self._category: str | None = None
        self._features: set[str] = set()
        self._inputs: dict[str, Input] = {}
        self._outputs: dict[str, Output] = {}
        self._environment: dict[str, str | None] = {}
        self._resources: dict[str, int] = {}
        self._priority = 0.0
        self._max_retries = 0
        self._end_time = self._start_time_min = 0.0
        self._running_time_max = self._running_time_min = 0.0
        self._forget()

    def _forget(self) -> None:
        """As before it was submitted."""
        self._id = 0
        self._run: Any = None
        self._result = WORK_QUEUE_RESULT_UNKNOWN
        self._return_status = -1
        self._arrival = ""
        self._output: Any = None
        self._problem = ""

    def clone(self) -> Self:
        """A copy that can be submitted too."""
        new = copy.copy(self)
        new._features, new._inputs, new._outputs = self._features.copy(), self._inputs.copy(), self._outputs.copy()
        new._environment, new._resources = self._environment.copy(), self._resources.copy()
        new._forget()
        return new

    # --- what is specified ---

    def specify_command(self, command: str) -> None:
        """The shell command."""
        self._command = command

    def specify_coprocess(self, coprocess: str) -> None:
        """Refused."""
        unsupported("specify_coprocess", "a PythonTask runs in an interpreter that stays warm")

    def specify_algorithm(self, algorithm: int) -> None:
        """Refused, but for ``WORK_QUEUE_SCHEDULE_UNSET``."""
        if algorithm != WORK_QUEUE_SCHEDULE_UNSET:
            unsupported(f"specify_algorithm({algorithm})", "leave it out; the scheduler chooses among pilots itself")

    def specify_tag(self, tag: str) -> None:
        """A name for `WorkQueue.wait_for_tag` and `cancel_by_tasktag`."""
        self._tag = str(tag)

    def specify_category(self, name: str) -> None:
        """Tasks of one category are alike in what they need."""
        self._category = str(name)

    def specify_feature(self, name: str) -> None:
        """Only on pilots with this feature, as ``host=NAME`` or ``tunnel=MODE``."""
        self._features.add(str(name))

    def specify_file(
        self,
        local_name: Any,
        remote_name: Any = None,
        type: int | None = None,
        flags: int | None = None,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """A file or directory that goes to the task or comes from it; returns 1."""
        local = str(local_name)
        remote = _remote(remote_name, local)
        return self._specify("file", local, remote, type, _flags(flags, cache, failure_only))

    def specify_url(
        self,
        url: Any,
        remote_name: Any,
        type: int | None = None,
        flags: int | None = None,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """An input that the pilot fetches; returns 1."""
        _refuse_output("specify_url", type)
        return self._specify("url", str(url), str(remote_name), type, _flags(flags, cache, failure_only))

    def specify_file_command(
        self,
        cmd: str,
        remote_name: Any,
        type: int | None = None,
        flags: int | None = None,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """An input that a shell command writes on a pilot, where ``%%`` stands for its name; returns 1."""
        _refuse_output("specify_file_command", type)
        if "%%" not in cmd:
            raise ValueError("specify_file_command: the command must hold %%, which stands for the file to be written")
        return self._specify("command", cmd, str(remote_name), type, _flags(flags, cache, failure_only))

    def specify_file_piece(
        self,
        local_name: Any,
        remote_name: Any = None,
        start_byte: int = 0,
        end_byte: int = 0,
        type: int | None = None,
        flags: int | None = None,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """Bytes ``start_byte`` to ``end_byte`` of a file, the last one included, as an input; returns 1."""
        if type == WORK_QUEUE_OUTPUT:
            unsupported("specify_file_piece of an output", "use specify_output_file")
        if not 0 <= start_byte <= end_byte:
            raise ValueError(f"specify_file_piece: bytes {start_byte} to {end_byte} are no piece of a file")
        local = str(local_name)
        remote = _remote(remote_name, local)
        span = (start_byte, end_byte)
        return self._specify("piece", local, remote, type, _flags(flags, cache, failure_only), span)

    def specify_input_file(
        self, local_name: Any, remote_name: Any = None, flags: int | None = None, cache: bool | None = None
    ) -> int:
        """A file or directory that goes to the task; returns 1."""
        return self.specify_file(local_name, remote_name, WORK_QUEUE_INPUT, flags, cache)

    def specify_output_file(
        self,
        local_name: Any,
        remote_name: Any = None,
        flags: int | None = None,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """A file or directory that comes from the task; returns 1."""
        return self.specify_file(local_name, remote_name, WORK_QUEUE_OUTPUT, flags, cache, failure_only)

    def specify_directory(
        self,
        local_name: Any,
        remote_name: Any = None,
        type: int | None = None,
        flags: int | None = None,
        recursive: bool = False,
        cache: bool | None = None,
        failure_only: bool | None = None,
    ) -> int:
        """A directory: with all that is in it (``recursive``, or an output), or an empty one; returns 1."""
        if not local_name and not remote_name:
            raise ValueError("specify_directory: neither a local nor a remote name")
        local = str(local_name) if local_name else ""
        remote = _remote(remote_name, local)
        kind = "file" if recursive or type == WORK_QUEUE_OUTPUT else "directory"
        return self._specify(kind, local, remote, type, _flags(flags, cache, failure_only))

    def specify_buffer(self, buffer: Any, remote_name: Any, flags: int | None = None, cache: bool | None = None) -> int:
        """Bytes or text that the task sees as a file; returns 1."""
        return self._specify("buffer", buffer, str(remote_name), WORK_QUEUE_INPUT, _flags(flags, cache, None))

    def _specify(
        self, kind: str, source: Any, remote: str, type: int | None, flags: int, span: tuple[int, int] = (0, 0)
    ) -> int:
        if flags & WORK_QUEUE_PREEXIST:
            unsupported("WORK_QUEUE_PREEXIST", "it is internal to Work Queue")
        if flags & WORK_QUEUE_WATCH:
            unsupported("WORK_QUEUE_WATCH", "outputs come back when the task has ended")
        if not remote or remote.startswith("/"):
            raise ValueError(f"the remote name {remote!r} must be a path relative to the task's directory")
        if type == WORK_QUEUE_OUTPUT:
            output = Output(os.path.normpath(remote), os.path.abspath(source), flags)  # noqa: PTH100
            if self._outputs.setdefault(output.remote, output) != output:
                raise ValueError(f"the output {remote!r} is already specified as {self._outputs[output.remote].local}")
            return 1
        if type not in (None, WORK_QUEUE_INPUT):
            raise ValueError(f"type must be WORK_QUEUE_INPUT or WORK_QUEUE_OUTPUT, not {type!r}")
        if flags & (WORK_QUEUE_FAILURE_ONLY | WORK_QUEUE_SUCCESS_ONLY):
            raise ValueError(f"{remote!r} is an input: FAILURE_ONLY and SUCCESS_ONLY are for outputs")
        wanted = Input(kind, source, flags, span)
        if self._inputs.setdefault(remote, wanted) != wanted:
            raise ValueError(f"the input {remote!r} is already specified as {self._inputs[remote].source!r}")
        return 1

    def specify_snapshot_file(self, filename: str) -> None:
        """Refused."""
        unsupported("specify_snapshot_file", "resources_measured has what the whole task used")

    def specify_max_retries(self, max_retries: int) -> None:
        """How often it may run again after it was lost; 0: without end."""
        self._max_retries = max(0, int(max_retries))

    def specify_cores(self, cores: int) -> None:
        """Cores."""
        self._claim("cores", cores)

    def specify_memory(self, memory: int) -> None:
        """Memory in MB."""
        self._claim("memory", memory)

    def specify_disk(self, disk: int) -> None:
        """Disk in MB."""
        self._claim("disk", disk)

    def specify_gpus(self, gpus: int) -> None:
        """GPUs."""
        self._claim("gpus", gpus)

    def _claim(self, name: str, amount: int) -> None:
        if amount == 0 and name == "cores":
            unsupported("specify_cores(0)", "every task takes at least one core")
        if amount < 0:
            self._resources.pop(name, None)
        else:
            self._resources[name] = int(amount)

    def specify_priority(self, priority: float) -> None:
        """Larger goes first; 0 unless specified."""
        self._priority = float(priority)

    def specify_end_time(self, useconds: float) -> None:
        """When it must have ended, in microseconds since the epoch."""
        self._end_time = max(0, int(useconds)) / 1e6

    def specify_start_time_min(self, useconds: float) -> None:
        """When it may begin, in microseconds since the epoch."""
        self._start_time_min = max(0, int(useconds)) / 1e6

    def specify_running_time(self, useconds: float) -> None:
        """The microseconds it may run for."""
        self._running_time_max = max(0, int(useconds)) / 1e6

    def specify_running_time_max(self, seconds: float) -> None:
        """The seconds it may run for."""
        self._running_time_max = float(max(0, int(seconds)))

    def specify_running_time_min(self, seconds: float) -> None:
        """The seconds it needs; together with a ``specify_running_time_max`` only."""
        self._running_time_min = float(max(0, int(seconds)))

    def specify_environment_variable(self, name: str, value: str | None = None) -> None:
        """Set a variable for the task; None unsets it."""
        if not name or not name.replace("_", "a").isalnum() or not name.isascii() or name[0].isdigit():
            raise ValueError(f"{name!r} is not a variable's name")
        self._environment[name] = None if value is None else str(value)

    def specify_monitor_output(self, directory: str) -> None:
        """Refused."""
        unsupported("specify_monitor_output", "resources_measured has what the task used")


def _remote(remote_name: Any, local: str) -> str:
    """The name that the task sees."""
    return str(remote_name) if remote_name else os.path.basename(local)  # noqa: PTH119 - "a/" has none


def _refuse_output(name: str, type: int | None) -> None:
    if type == WORK_QUEUE_OUTPUT:
        raise ValueError(f"{name} does not currently support output files.")


def _flags(flags: int | None, cache: bool | None, failure_only: bool | None) -> int:
    flags = WORK_QUEUE_NOCACHE if flags is None else flags
    for wanted, flag in ((cache, WORK_QUEUE_CACHE), (failure_only, WORK_QUEUE_FAILURE_ONLY)):
        if wanted is not None:
            flags = flags | flag if wanted else flags & ~flag
    return flags
