"""Functions in forks: a child of this process for each task, from an interpreter that never runs one itself.

The parent loads functions, so that their modules are imported once, and waits; so it has no threads but those that
imports start. The child runs the task, leaves what came of it in a file in memory and ends without running exit
handlers. Whatever else it does, a signal or ``os._exit``, is a crash of that task only; nothing it left half written
is taken for a result. What is ended for a limit is ended alone (`processes.kill_descendants`).
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any, NoReturn

import msgspec

from hpcq import messages as m
from hpcq import serialize
from hpcq.outcome import Outcome
from hpcq.pilot.children import ChildRunner, End
from hpcq.pilot.guard import die_with, forks_die_with_us
from hpcq.pilot.runner import flush_c_streams

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, bytes, str, list[int] | None]).decode

REHEARSALS = 32
"""How often what a child does is done before there is one: until the interpreter has specialised all of it."""


class ForkRunner(ChildRunner):
    """Executes each function in a child."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._dies_with_us = forks_die_with_us()
        self._answer = os.memfd_create("hpcq-answer", os.MFD_CLOEXEC)
        self._rehearse()

    def _run_child(self, task: m.TaskSpec) -> End:
        if isinstance(self._functions[task.function], bytes):
            with contextlib.suppress(BaseException):  # the child will fail in the same way, and tell
                self._function(task.function)
            gc.collect()
            gc.freeze()  # children that collect garbage must not copy all pages of what is here
        child = os.fork()
        if child == 0:
            self._run_in_child(task)
        _, status, used = os.wait4(child, 0)
        memory, cpu = used.ru_maxrss / 1024, used.ru_utime + used.ru_stime
        answer = self._take_answer()
        if status == 0 and answer:
            outcome, payload, message, self._pieces = _decode(answer)
            return End(Outcome(outcome), message, payload, memory=memory, cpu=cpu)
        from hpcq.pilot.deaths import how_it_died  # noqa: PLC0415 - rarely needed

        died = how_it_died(os.waitstatus_to_exitcode(status))
        return End(Outcome.CRASH, died, memory=memory, cpu=cpu)

    def _rehearse(self) -> None:
        """Do what every child does: what is looked up and specialised on the way is then so in all of them, and not
        written, each time, to pages that they share with us."""
        self._functions[b""] = int
        arguments = serialize.dump_arguments((), {})
        assert isinstance(arguments, bytes)
        task = m.TaskSpec(0, b"", arguments)
        for _ in range(REHEARSALS):
            self._leave_answer(self._answer_to(task))
            self._take_answer()
        del self._functions[b""]

    def _take_answer(self) -> bytes:
        size = os.fstat(self._answer).st_size
        answer = os.pread(self._answer, size, 0)
        os.ftruncate(self._answer, 0)
        return answer

    def _run_in_child(self, task: m.TaskSpec) -> NoReturn:
        status = 1
        try:
            if not self._dies_with_us:
                die_with(self._pid)
            _seed_numpy()
            me = os.getpid()
            if task.env:
                os.environ.update(task.env)
            answer = self._answer_to(task)
            if os.getpid() == me:  # else a fork of the function's came back from it
                self._leave_answer(answer)
            status = 0
        finally:
            os._exit(status)

    def _answer_to(self, task: m.TaskSpec) -> bytes:
        outcome, payload, message = self._call(task)
        return _encode((outcome.value, payload, message, self._pieces))

    def _leave_answer(self, answer: bytes) -> None:
        self._output.flush()
        self._errors.flush()
        flush_c_streams(None)
        written = 0
        while written < len(answer):
            written += os.pwrite(self._answer, memoryview(answer)[written:], written)


def _seed_numpy() -> None:
    """Python's own generator is seeded anew in a fork, numpy's is not: every task would draw the same numbers."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
