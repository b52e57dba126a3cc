"""Runners whose tasks are processes of their own: what `commands` and `forks` share.

Such a task cannot change anything in the runner, so nothing in it is put back between two tasks: the child is waited
for, its own children ended, its output read and the directory emptied. May not live here: how a child is made.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from typing import Any, NamedTuple

from hpcq import messages as m
from hpcq.outcome import Outcome
from hpcq.pilot.guard import end_children
from hpcq.pilot.runner import Runner, remove


class End(NamedTuple):
    """How a child ended; ``memory`` is its peak in MB, ``cpu`` its seconds and those of the children it waited for."""

    outcome: Outcome
    message: str = ""
    payload: bytes = b""
    exit_code: int | None = None
    memory: float = 0.0
    cpu: float = 0.0


class ChildRunner(Runner):
    """Executes each task in a child."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._littered = False
        self._counted = _children_cpu()

    def _run_child(self, task: m.TaskSpec) -> End:
        """Make a child that does the task and wait for it."""
        raise NotImplementedError

    def _execute(self, task: m.TaskSpec, directory: str) -> m.TaskResult:
        started_at = time.time()
        began = time.perf_counter()
        self._sandbox = directory
        self._pieces = None
        end = self._run_child(task)
        cpu = end.cpu
        if self._end_children():  # theirs is not in what the child was told to have used
            cpu = _children_cpu() - self._counted
        self._counted += cpu
        self._empty_home()
        output, left_out = self._output.written()
        errors, errors_left_out = self._errors.written()
        return m.TaskResult(
            task.id, end.outcome.value, end.payload, end.exit_code, output, errors, end.message, started_at,
            time.perf_counter() - began, left_out + errors_left_out, end.memory, self._disk / 2**20, cpu,
            parcel=self._pieces,
        )  # fmt: skip

    def _end_children(self) -> bool:
        """End what the task has left running; whether there was anything."""
        return end_children()

    def _empty_home(self) -> None:
        """Remove what the task left, and undo what it did to the directory itself."""
        self._disk = 0
        try:
            if os.stat(self._home).st_mode & 0o7777 != 0o700:  # noqa: PTH116 - a hot path of strings
                os.chmod(self._home, 0o700)  # noqa: PTH101
            os.chdir(self._home)  # the directory of that name, whatever became of the one we were in
            left = os.listdir(self._home)  # noqa: PTH208
            if left:
                self._remove(left)
        except OSError:
            self._new_home()

    def _remove(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                self._disk += remove(f"{self._home}/{name}")
        self._littered = bool(os.listdir(self._home))  # noqa: PTH208

    def _new_home(self) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(self._home, 0o700, exist_ok=True)  # noqa: PTH103
            os.chdir(self._home)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
