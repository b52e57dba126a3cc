"""Shell commands: a child of this process for each, ``/bin/sh -c`` in an environment that is the same for all.

A command works in the runner's own directory, in one made for it when something there cannot be removed, or in its
sandbox. Its shell is a copy of one that is ready (see `shells`), or started for it; ``posix_spawn`` does not copy the
runner's memory map (glibc shares it until the ``exec``).
"""

from __future__ import annotations

import os
from typing import Any

from hpcq import messages as m
from hpcq.outcome import Outcome
from hpcq.pilot.children import ChildRunner, End
from hpcq.pilot.guard import end_children
from hpcq.pilot.shells import DEFAULTS, ReadyShell


class CommandRunner(ChildRunner):
    """Executes each command in a shell."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._environment = dict(os.environb)
        self._ready = ReadyShell(self._environment)
        for captured in (self._output, self._errors):
            captured.written()  # what the loader says where it cannot load our library

    def _run_child(self, task: m.TaskSpec) -> End:
        directory = self._sandbox
        if self._littered and not directory:
            directory = f"{self._home}/task-{task.id}"
        try:
            if directory:
                if not self._sandbox:
                    os.mkdir(directory, 0o700)  # noqa: PTH102 - a hot path of strings
                os.chdir(directory)
            return self._shell(task, directory or self._home)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            message = f"the command could not be started in {directory or self._home}: {why}"
            return End(Outcome.EXIT_CODE, message, exit_code=126)
        finally:
            if directory:
                os.chdir(self._home)

    def _end_children(self) -> bool:
        if self._ready.is_alone():
            return False
        self._counted += self._ready.stop()
        return end_children()

    def _shell(self, task: m.TaskSpec, directory: str) -> End:
        changes = {b"HPCQ_TASK_ID": b"%d" % task.id}
        if task.env:
            changes.update((os.fsencode(name), os.fsencode(value)) for name, value in task.env.items())
        child = self._ready.spawn(directory, task.payload, changes)
        if not child:
            environment = {**self._environment, **changes}
            argv = [b"sh", b"-c", task.payload]
            child = os.posix_spawn("/bin/sh", argv, environment, setsigdef=DEFAULTS, setpgroup=0)
        _, status, used = os.wait4(child, 0)
        memory, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return End(Outcome.SUCCESS, "", b"", 0, memory, cpu)
        why = f"exited with status {code}" if code > 0 else f"was ended by signal {-code}"
        return End(Outcome.EXIT_CODE, f"the command {why}", b"", code if code > 0 else 128 - code, memory, cpu)
