"""The runner: executes tasks one after the other until its pilot hangs up.

``python -m hpcq.pilot.run TASK_FD RESULT_FD ISOLATION SHARE FILES``. What of an earlier task the next one finds:

- ``warm``: the interpreter as it was left; replaced when it holds too much memory (half of what the task had asked
  for, or SHARE MB a core) or the task called `hpcq.recycle`; it then ends between two tasks, the pilot starts another;
- ``fork``: nothing; each runs in a fork of an interpreter that has loaded functions and run no task (see `forks`);
- ``fresh``: nothing; the runner takes one task and ends;
- ``shell``: nothing; commands only, no user's code runs in the runner (see `commands`).

Those that run functions themselves have a guard (see `guard`).

Tasks come as datagrams (one message each; a large one as a file passed along), results leave as frames on a stream, one
write per task, before the next task begins. So whatever the pilot has not got a result for, and what comes first among
it, is what we were doing when we died.

Standard output and error are files the pilot opened for us; what a task, its threads, its C code or its subprocesses
write there is read back when it ends and the files are emptied. A task works in our directory, which is emptied, or in
the sandbox made for it when it has files, and leaves that. No child of a task outlives it: we are the reaper of all
that we started, and kill what is left.

This module is imported in every runner, so it imports little. May not live here: limits, retries, the manager.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from hpcq import inside, serialize
from hpcq import messages as m
from hpcq.errors import SerializationError
from hpcq.outcome import OUTPUT_LIMIT, Outcome
from hpcq.pilot import datagrams
from hpcq.pilot.attention import Attention, usable_cpus
from hpcq.pilot.guard import become_reaper, end_children, stay_behind
from hpcq.pilot.usage import Meter, disk_bytes, resident_mb
from hpcq.protocol import frame

if TYPE_CHECKING:
    from hpcq.parcels import Pieces

flush_c_streams = ctypes.CDLL(None).fflush
flush_c_streams.argtypes = [ctypes.c_void_p]
flush_c_streams.restype = None


SETTLED_NS = 3 * 10**9
"""Nanoseconds after which a time of change would be another one if there were another change; some file systems count
in seconds."""


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The runner's first word."""

    pid: int


class Held(msgspec.Struct, array_like=True, tag=True):
    """What the interpreter still holds after its tasks: memory the next one is not to blame for, in MB."""

    memory: float


class Watched(msgspec.Struct, array_like=True, tag=True):
    """CPU seconds of the interpreter that were no task's: it was watching for one."""

    cpu: float


FromRunner = Ready | Held | Watched | m.TaskResult

WATCHED = 0.05
"""CPU seconds that are worth telling."""


class Captured:
    """One output stream of the runner: a file that is emptied after each task.

    What a task did to the stream (redirected, closed or replaced it) ends with the task.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor
        self._file = os.dup(descriptor)
        self._stream: TextIO = getattr(sys, name)

    def take(self) -> tuple[bytes, int]:
        """What was written since the last time, and how many bytes in the middle of it were left out."""
        self._restore()
        return self.written()

    def written(self) -> tuple[bytes, int]:
        """The same, where the task had a process of its own and cannot have changed the stream."""
        size = os.fstat(self._file).st_size
        if not size:
            return b"", 0
        kept = read_bounded(self._file, size)
        os.ftruncate(self._file, 0)
        return kept, max(0, size - OUTPUT_LIMIT)

    def _restore(self) -> None:
        flushed = self.flush()  # where the task had led it
        os.dup2(self._file, self._descriptor)
        if not flushed:
            self.flush()  # what could not be written there
            if self._stream.closed:
                self._stream = open(self._descriptor, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, self._name, self._stream)

    def flush(self) -> bool:
        """Write out what Python has buffered; whether that could be done."""
        try:
            self._stream.flush()
        except Exception:
            return False
        return True


def read_bounded(descriptor: int, size: int) -> bytes:
    """All of a file of ``size`` bytes, or its first and last halves of `OUTPUT_LIMIT` with a note between."""
    if size <= OUTPUT_LIMIT:
        return os.pread(descriptor, size, 0)
    half = OUTPUT_LIMIT // 2
    note = f"\n[... {size - OUTPUT_LIMIT} bytes left out ...]\n".encode()
    return os.pread(descriptor, half, 0) + note + os.pread(descriptor, half, size - half)


class Runner:
    """Executes messages; keeps the functions it was given."""

    def __init__(self, tasks: socket.socket, results: socket.socket, isolation: str, share: float) -> None:
        self._tasks = tasks
        self._results = results
        self._isolation = isolation
        self._share = share
        self._functions: dict[bytes, bytes | Callable[..., Any]] = {}
        self._output = Captured("stdout", 1)
        self._errors = Captured("stderr", 2)
        self._pid = os.getpid()
        self._home = os.getcwd()  # noqa: PTH109 - compared and used as a string for every task
        self._meter = Meter()
        self._new = resident_mb()
        self._disk = 0
        self._idle_cpu = 0.0
        self._empty_since = 0
        self._sandbox = ""
        self._attached = -1
        self._spill = False
        self._pieces: list[int] | None = None

    def run(self) -> None:
        """Until the pilot hangs up, or it is worn."""
        self._results.sendall(frame(Ready(os.getpid())))
        wait = Attention(partial(datagrams.receive, self._tasks), usable_cpus(), self._watched).wait
        while (message := wait()) is not None:
            kind = type(message)
            if kind is m.Execute:
                self._attached, self._spill = message.parcel, message.spill
                self._results.sendall(frame(self._execute(message.task, message.directory)))
                if message.parcel >= 0:
                    os.close(message.parcel)
                if self._worn(message.task):
                    return
            elif kind is m.Define:
                self._functions[message.key] = message.body
            else:
                self._functions.pop(message.key, None)

    def _watched(self, cpu: float) -> None:
        self._meter.leave_out(cpu)
        self._idle_cpu += cpu
        if self._idle_cpu > WATCHED:
            self._results.sendall(frame(Watched(self._idle_cpu)))
            self._idle_cpu = 0.0

    def _worn(self, task: m.TaskSpec) -> bool:
        """Whether the next task should get another interpreter."""
        if self._isolation != "warm":
            return self._isolation == "fresh"
        if self._meter.grew:
            held = resident_mb() - self._new
            if held > (task.memory / 2 if task.memory else self._share * task.cores):
                return True
            self._results.sendall(frame(Held(held)))
        return inside.recycling

    def _execute(self, task: m.TaskSpec, directory: str) -> m.TaskResult:
        started_at = time.time()
        began = time.perf_counter()
        self._pieces = None
        self._sandbox = directory
        with _environment(task.env):
            outcome, payload, message = self._call(task)
        if os.getpid() != self._pid:
            os._exit(outcome is not Outcome.SUCCESS)  # a fork that came back from the function: not us
        self._clean_up()
        seconds = time.perf_counter() - began
        cpu = self._meter.read(seconds)
        output, left_out = self._output.take()
        errors, errors_left_out = self._errors.take()
        return m.TaskResult(
            task.id, outcome.value, payload, None, output, errors, message, started_at, seconds,
            left_out + errors_left_out, self._meter.peak_mb, self._disk / 2**20, cpu,
            parcel=self._pieces,
        )  # fmt: skip

    # --- functions ---

    def _call(self, task: m.TaskSpec) -> tuple[Outcome, bytes, str]:
        try:
            function = self._function(task.function)
            args, kwargs = serialize.load_arguments(task.payload if task.parcel is None else self._views(task.parcel))
        except BaseException as error:
            return Outcome.UNSERIALIZABLE, b"", _cannot_rebuild(error)
        try:
            if self._sandbox:
                os.chdir(self._sandbox)
            value = function(*args, **kwargs)
        except BaseException as error:
            raised = serialize.dump_exception(error, skip=1)
            return self._checked(task, Outcome.EXCEPTION, raised, serialize.one_line(error))
        try:
            return self._checked(task, Outcome.SUCCESS, serialize.dump_value(value), "")
        except SerializationError as error:
            return Outcome.UNSERIALIZABLE, b"", str(error)

    def _views(self, sizes: list[int]) -> list[memoryview]:
        """Large arguments, where they are."""
        from hpcq.parcels import Parcel  # noqa: PLC0415 - small tasks do without

        return Parcel(os.fstat(self._attached).st_size, os.dup(self._attached)).views(sizes)

    def _checked(
        self, task: m.TaskSpec, outcome: Outcome, payload: bytes | Pieces, message: str
    ) -> tuple[Outcome, bytes, str]:
        """A value or exception; a large one is left with the pilot."""
        if type(payload) is bytes:
            return outcome, payload, message
        from hpcq import parcels  # noqa: PLC0415 - small tasks do without

        assert not isinstance(payload, bytes)
        sizes = payload.sizes
        try:
            parcel = parcels.new_file(parcels.total_size(sizes), self._spill, Path(self._home).parent)
            parcel.fill(payload)
        except OSError as error:
            where = f"on {socket.gethostname()}, {'on disk' if self._spill else 'in memory'}"
            return Outcome.FILES, b"", f"the result, {sum(sizes)} bytes, cannot be kept {where}: {error.strerror}"
        datagrams.leave(self._tasks, task.id, parcel.descriptor, self._spill)
        self._pieces = sizes
        return outcome, b"", message

    def _function(self, key: bytes) -> Callable[..., Any]:
        known = self._functions[key]
        if isinstance(known, bytes):
            known = self._functions[key] = serialize.load_function(known)
        return known

    # --- between tasks ---

    def _clean_up(self) -> None:
        end_children()
        flush_c_streams(None)
        self._disk = 0
        try:
            os.chdir(self._home)
            changed = os.stat(".").st_ctime_ns  # noqa: PTH116 - a hot path
            if changed != self._empty_since:
                self._clear(changed)
        except OSError:  # a task has removed it, or made something that cannot be removed
            with contextlib.suppress(OSError):
                os.makedirs(self._home, 0o700, exist_ok=True)  # noqa: PTH103
                os.chdir(self._home)

    def _clear(self, changed: int) -> None:
        """Remove what is there. As long as the directory is not ``changed`` any more it need not be listed: a look at
        its time costs a fifth of that. Times may be coarse, so one that is quite new proves nothing."""
        if os.stat(self._home).st_mode & 0o7777 != 0o700:  # noqa: PTH116 - so that it can be emptied, and written to
            os.chmod(self._home, 0o700)  # noqa: PTH101
        left = os.listdir(self._home)  # noqa: PTH208
        for name in left:
            with contextlib.suppress(OSError):
                self._disk += remove(f"{self._home}/{name}")
        settled = not left and time.time_ns() - changed > SETTLED_NS
        self._empty_since = changed if settled else 0


def remove(path: str) -> int:
    """Remove it; how many bytes that frees."""
    try:
        os.rmdir(path)  # noqa: PTH106 - most are empty directories, and this is a tenth of rmtree's cost
    except OSError:
        return _remove_full(path)
    return 0


def _remove_full(path: str) -> int:
    size = os.lstat(path).st_blocks * 512
    if os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114
        from hpcq.pilot.scratch import remove_tree  # noqa: PLC0415 - rarely needed, and large

        size += disk_bytes(path)
        remove_tree(path)
    else:
        os.unlink(path)  # noqa: PTH108
    return size


@contextlib.contextmanager
def _changed_environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


_UNCHANGED: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _environment(changes: dict[str, str] | None) -> contextlib.AbstractContextManager[None]:
    return _changed_environment(changes) if changes else _UNCHANGED


def _cannot_rebuild(error: BaseException) -> str:
    line = serialize.one_line(error)
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the function or its arguments need a module this pilot does not have ({line}); install it in the pilot's "
            "environment, or send it along with cloudpickle.register_pickle_by_value(module)"
        )
    return f"the function or its arguments cannot be rebuilt on the pilot: {line}"


def main() -> None:
    """Entry of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pilot, which ends us in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    become_reaper()
    tasks, results = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    isolation, share, files = sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
    if files > 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for channel in (tasks, results):
        channel.set_inheritable(False)
    sys.argv = ["hpcq-runner"]
    if isolation in ("warm", "fresh"):
        stay_behind([tasks, results])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _runner(isolation)(tasks, results, isolation, share).run()
    os._exit(0)  # not by way of what tasks have left: threads, exit handlers


def _runner(isolation: str) -> type[Runner]:
    if isolation == "fork":
        from hpcq.pilot.forks import ForkRunner  # noqa: PLC0415 - it builds on us

        return ForkRunner
    if isolation == "shell":
        from hpcq.pilot.commands import CommandRunner  # noqa: PLC0415 - likewise

        return CommandRunner
    return Runner
