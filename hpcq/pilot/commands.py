"""Shell commands: a child of this process for each, ``/bin/sh -c`` in an environment that is the same for all.

A command works in the runner's own directory, in one made for it when something there cannot be removed, or in its
sandbox. ``posix_spawn`` does not copy the runner's memory map (glibc shares it until the ``exec``).
"""

from __future__ import annotations

import os
import signal
from typing import Any

from hpcq import messages as m
from hpcq.outcome import Outcome
from hpcq.pilot.children import ChildRunner, End

_DEFAULTS = (signal.SIGPIPE, signal.SIGINT, signal.SIGXFSZ)
"""Signals that Python, or we, ignore and a command should not."""


class CommandRunner(ChildRunner):
    """Executes each command in a shell."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._environment = dict(os.environb)

    def _run_child(self, task: m.TaskSpec) -> End:
        directory = self._sandbox
        if self._littered and not directory:
            directory = f"{self._home}/task-{task.id}"
        try:
            if directory:
                if not self._sandbox:
                    os.mkdir(directory, 0o700)  # noqa: PTH102 - a hot path of strings
                os.chdir(directory)
            return self._shell(task)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            message = f"the command could not be started in {directory or self._home}: {why}"
            return End(Outcome.EXIT_CODE, message, exit_code=126)
        finally:
            if directory:
                os.chdir(self._home)

    def _shell(self, task: m.TaskSpec) -> End:
        environment = {**self._environment, b"HPCQ_TASK_ID": b"%d" % task.id}
        if task.env:
            environment.update((os.fsencode(name), os.fsencode(value)) for name, value in task.env.items())
        child = os.posix_spawn("/bin/sh", [b"sh", b"-c", task.payload], environment, setsigdef=_DEFAULTS)
        _, status, used = os.wait4(child, 0)
        memory, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return End(Outcome.SUCCESS, "", b"", 0, memory, cpu)
        why = f"exited with status {code}" if code > 0 else f"was ended by signal {-code}"
        return End(Outcome.EXIT_CODE, f"the command {why}", b"", code if code > 0 else 128 - code, memory, cpu)
