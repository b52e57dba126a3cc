"""The warm interpreter: executes tasks one after the other until its pilot hangs up.

``python -m hpcq.pilot.run TASK_FD RESULT_FD``. Tasks come as datagrams (one message each; a large one as a file
passed along), results leave as frames on a stream, one write per task, before the next task begins. So whatever the
pilot has not got a result for, and what comes first among it, is what we were doing when we died.

Standard output and error are files the pilot opened for us; what a task, its threads, its C code or its subprocesses
write there is read back when it ends and the files are emptied. Each shell command gets a directory of its own, removed
afterwards; a function shares ours, which is emptied. A task with files finds a sandbox made for it, and leaves it. No
child of a task outlives it: we are the reaper of all that we started, and kill what is left.

This module is imported in every runner, so it imports little. May not live here: limits, retries, the manager.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import msgspec

from hpcq import messages as m
from hpcq import serialize
from hpcq.errors import SerializationError
from hpcq.pilot import datagrams
from hpcq.pilot.scratch import remove_tree
from hpcq.protocol import frame
from hpcq.task import OUTPUT_LIMIT, Outcome

_PR_SET_CHILD_SUBREAPER = 36


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The runner's first word."""

    pid: int


FromRunner = Ready | m.TaskResult


def become_reaper() -> None:
    """Orphans of our tasks become our children, so that they can be found and ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


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
        size = os.fstat(self._file).st_size
        if not size:
            return b"", 0
        kept = read_bounded(self._file, size)
        os.ftruncate(self._file, 0)
        return kept, max(0, size - OUTPUT_LIMIT)

    def _restore(self) -> None:
        flushed = self._flush()  # where the task had led it
        os.dup2(self._file, self._descriptor)
        if not flushed:
            self._flush()  # what could not be written there
            if self._stream.closed:
                self._stream = open(self._descriptor, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        setattr(sys, self._name, self._stream)

    def _flush(self) -> bool:
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

    def __init__(self, tasks: socket.socket, results: socket.socket) -> None:
        self._tasks = tasks
        self._results = results
        self._functions: dict[bytes, bytes | Callable[..., Any]] = {}
        self._output = Captured("stdout", 1)
        self._errors = Captured("stderr", 2)
        self._pid = os.getpid()
        self._home = os.getcwd()  # noqa: PTH109 - compared and used as a string for every task

    def run(self) -> None:
        """Until the pilot hangs up."""
        self._results.sendall(frame(Ready(os.getpid())))
        while (message := datagrams.receive(self._tasks)) is not None:
            kind = type(message)
            if kind is m.Execute:
                self._results.sendall(frame(self._execute(message.task, message.directory)))
            elif kind is m.Define:
                self._functions[message.key] = message.body
            else:
                self._functions.pop(message.key, None)

    def _execute(self, task: m.TaskSpec, directory: str) -> m.TaskResult:
        started_at = time.time()
        began = time.perf_counter()
        exit_code: int | None = None
        payload = b""
        with _environment(task.env):
            if task.function:
                outcome, payload, message = self._call(task, directory)
            else:
                outcome, exit_code, message = self._shell(task, directory)
        if os.getpid() != self._pid:
            os._exit(outcome is not Outcome.SUCCESS)  # a fork that came back from the function: not us
        self._clean_up()
        seconds = time.perf_counter() - began
        output, left_out = self._output.take()
        errors, errors_left_out = self._errors.take()
        return m.TaskResult(
            task.id, outcome.value, payload, exit_code, output, errors, message, started_at, seconds,
            left_out + errors_left_out,
        )  # fmt: skip

    # --- functions ---

    def _call(self, task: m.TaskSpec, directory: str) -> tuple[Outcome, bytes, str]:
        try:
            function = self._function(task.function)
            args, kwargs = serialize.load_arguments(task.payload)
        except BaseException as error:
            return Outcome.UNSERIALIZABLE, b"", _cannot_rebuild(error)
        try:
            if directory:
                os.chdir(directory)
            value = function(*args, **kwargs)
        except BaseException as error:
            return Outcome.EXCEPTION, serialize.dump_exception(error, skip=1), serialize.one_line(error)
        try:
            return Outcome.SUCCESS, serialize.dump_value(value), ""
        except SerializationError as error:
            return Outcome.UNSERIALIZABLE, b"", str(error)

    def _function(self, key: bytes) -> Callable[..., Any]:
        known = self._functions[key]
        if isinstance(known, bytes):
            known = self._functions[key] = serialize.load_function(known)
        return known

    # --- commands ---

    def _shell(self, task: m.TaskSpec, given: str) -> tuple[Outcome, int | None, str]:
        directory = given or f"{self._home}/task-{task.id}"
        try:
            if not given:
                os.mkdir(directory, 0o700)  # noqa: PTH102 - a hot path of strings
            os.chdir(directory)
            child = os.posix_spawn(
                "/bin/sh",
                [b"sh", b"-c", task.payload],
                {**os.environ, "HPCQ_TASK_ID": str(task.id)},
                setsigdef=(signal.SIGPIPE, signal.SIGINT),
            )
            _, status = os.waitpid(child, 0)
        except OSError as error:
            return Outcome.EXIT_CODE, 126, f"the command could not be started in {directory}: {error.strerror}"
        finally:
            os.chdir(self._home)
            if not given:
                _remove_directory(directory)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return Outcome.SUCCESS, 0, ""
        if code > 0:
            return Outcome.EXIT_CODE, code, f"the command exited with status {code}"
        return Outcome.EXIT_CODE, 128 - code, f"the command was ended by signal {-code}"

    # --- between tasks ---

    def _clean_up(self) -> None:
        self._end_children()
        try:
            os.chdir(self._home)
            for name in os.listdir(self._home):  # noqa: PTH208 - a hot path of strings
                _remove(f"{self._home}/{name}")
        except OSError:  # a task has removed it, or made something that cannot be removed
            with contextlib.suppress(OSError):
                os.makedirs(self._home, 0o700, exist_ok=True)  # noqa: PTH103
                os.chdir(self._home)

    def _end_children(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if os.readlink("/proc/self") != str(os.getpid()):  # noqa: PTH115
            return  # /proc shows another pid namespace: we cannot name them; they end with the pilot
        from hpcq.pilot.processes import kill_descendants  # noqa: PLC0415 - psutil is only needed here

        kill_descendants(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)


def _remove_directory(path: str) -> None:
    try:
        os.rmdir(path)  # noqa: PTH106 - most are empty, and this is a tenth of rmtree's cost
    except OSError:
        remove_tree(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):  # noqa: PTH112, PTH114
        remove_tree(path)
    else:
        os.unlink(path)  # noqa: PTH108


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
    for channel in (tasks, results):
        channel.set_inheritable(False)
    sys.argv = ["hpcq-runner"]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        Runner(tasks, results).run()
