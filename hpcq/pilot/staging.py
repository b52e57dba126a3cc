"""Tasks with files, before and after they run.

::

    Run --> STAGING (sandbox made, inputs obtained) --> in the core --> COLLECTING (outputs sent or kept) --> result
              | an input cannot be had: files            | not success            | missing, bad, disk full: files
              | withdrawn: Returned                      +----> result            | cancelled: result

While it is staged or collected a task holds no core and no runner. Its sandbox is a directory of its own below the
pilot's scratch directory, removed when the task leaves us. May not live here: how contents travel (`contents`), what an
output may be (`collect`).
"""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq.errors import HpcqError, UsageError
from hpcq.files import cache, digests, names, wire
from hpcq.pilot import collect, sandbox
from hpcq.pilot.contents import Contents, LostError
from hpcq.pilot.lanes import Report
from hpcq.pilot.processes import kill_tree
from hpcq.task import Outcome

log = logging.getLogger("hpcq.pilot")

STAGED_AT_ONCE = 8
"""Inputs obtained at the same time."""

COLLECTED_AT_ONCE = 4
"""Tasks whose outputs are sent at the same time."""


class FilesError(Exception):
    """Why a task ends as ``files``; names the file. ``lost`` is the digest of an input that nobody has any more."""

    def __init__(self, message: str, lost: bytes = b"") -> None:
        super().__init__(message)
        self.lost = lost


class Phase(enum.Enum):
    """Where a task with files is."""

    STAGING = enum.auto()
    CORE = enum.auto()
    COLLECTING = enum.auto()


class Job:
    """One task with files that is here."""

    __slots__ = ("activity", "files", "phase", "result", "sandbox", "task")

    def __init__(self, task: m.TaskSpec, sandbox: Path) -> None:
        assert task.files is not None
        self.task = msgspec.structs.replace(task, files=None)
        self.files = task.files
        self.sandbox = sandbox
        self.phase = Phase.STAGING
        self.activity: asyncio.Task[None] | None = None
        self.result: m.TaskResult | None = None


class Staging:
    """All of them. ``run`` gives staged tasks to the core, ``report`` tells the manager."""

    def __init__(  # noqa: PLR0917 - what a pilot has
        self,
        scratch: Path,
        contents: Contents,
        spawn: Callable[..., Any],
        run: Callable[[list[m.TaskSpec]], None],
        report: Callable[[Report], None],
        sandboxes: dict[int, str],
    ) -> None:
        self._scratch = scratch
        self.contents = contents
        self._spawn = spawn
        self._run = run
        self._report = report
        self._sandboxes = sandboxes
        self._loop = asyncio.get_running_loop()
        self._jobs: dict[int, Job] = {}
        self._activities: set[asyncio.Task[None]] = set()
        self._staged = asyncio.Semaphore(STAGED_AT_ONCE)
        self._collected = asyncio.Semaphore(COLLECTED_AT_ONCE)
        self._draining = False
        self._made = 0
        self.idle = asyncio.Event()
        self.idle.set()

    # --- from the manager ---

    def take(self, message: m.Run) -> m.Run:
        """Begin with the tasks that have files; returns the message with the others."""
        ours = [task for task in message.tasks if task.files is not None]
        if not ours:
            return message
        if self._draining:
            self._report(Report([], [], [task.id for task in ours]))
        else:
            for task in ours:
                self._admit(task)
        return m.Run(message.functions, [task for task in message.tasks if task.files is None], message.forget)

    def _admit(self, task: m.TaskSpec) -> None:
        self._made += 1
        job = self._jobs[task.id] = Job(task, self._scratch / f"task-{task.id}-{self._made}")
        self.idle.clear()
        self._start(job, self._stage(job))

    def _start(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        job.activity = self._loop.create_task(self._guarded(job, work))
        self._activities.add(job.activity)
        job.activity.add_done_callback(self._activities.discard)

    async def _guarded(self, job: Job, work: Coroutine[Any, Any, None]) -> None:
        """A fault of ours ends the task too: nobody waits for ever."""
        try:
            await work
        except Exception as error:
            log.exception("files of task %d", job.task.id)
            self._end(job, Outcome.FILES, f"its files failed on {_host()}: {type(error).__name__}: {error}")

    def withdraw(self, tasks: list[int], cancel: bool = False) -> list[int]:
        """Give back those being staged, and (``cancel``) end those being collected; returns the others."""
        back = [number for number in tasks if self._phase(number) is Phase.STAGING]
        for number in back:
            self._leave(self._jobs[number])
        if back:
            self._report(Report([], [], back))
        stopped = [number for number in tasks if cancel and self._phase(number) is Phase.COLLECTING]
        for number in stopped:
            self._end(self._jobs[number], Outcome.CANCELLED, "cancelled")
        gone = {*back, *stopped}
        return [number for number in tasks if number not in gone]

    def _phase(self, number: int) -> Phase | None:
        job = self._jobs.get(number)
        return None if job is None else job.phase

    def drain(self) -> None:
        """Take nothing new, hand back what has not begun."""
        self._draining = True
        self.withdraw(list(self._jobs))

    async def abandon(self) -> None:
        """End everything; what was being collected is lost. Afterwards we can begin anew."""
        self.withdraw(list(self._jobs))
        for job in list(self._jobs.values()):
            if job.phase is Phase.COLLECTING:
                self._end(job, Outcome.LOST, "its outputs could not be sent before its pilot ended")
            else:
                self._leave(job)
        while self._activities:
            await asyncio.wait(self._activities)
        self.contents.hang_up()
        self._draining = False

    # --- from the core ---

    def ended(self, report: Report) -> Report:
        """What can be told now; tasks with outputs to collect follow."""
        if not self._jobs:
            return report
        for number in report.returned:
            if number in self._jobs:
                self._leave(self._jobs[number])
        return Report(report.started, [r for r in report.results if not self._holds_back(r)], report.returned)

    def _holds_back(self, result: m.TaskResult) -> bool:
        job = self._jobs.get(result.id)
        if job is None:
            return False
        if result.outcome != Outcome.SUCCESS or not job.files.outputs:
            self._leave(job)
            return False
        job.phase, job.result = Phase.COLLECTING, result
        self._start(job, self._collect(job, result))
        return True

    # --- the end of a task here ---

    def _leave(self, job: Job) -> None:
        """It is no longer ours: its sandbox goes."""
        self._jobs.pop(job.task.id, None)
        self._sandboxes.pop(job.task.id, None)
        if job.activity is not None and job.activity is not _current_task():
            job.activity.cancel()
        cleaning = self._loop.create_task(self._remove(job))
        self._activities.add(cleaning)
        cleaning.add_done_callback(self._activities.discard)
        if not self._jobs:
            self.idle.set()

    async def _remove(self, job: Job) -> None:
        if job.activity is not None and not job.activity.done():
            await asyncio.wait({job.activity})
        await asyncio.to_thread(sandbox.remove_tree, job.sandbox)

    def _end(self, job: Job, outcome: Outcome, message: str, lost: bytes = b"") -> None:
        result = job.result or m.TaskResult(job.task.id, "")
        result = msgspec.structs.replace(
            result, outcome=outcome.value, message=message, payload=b"", kept=None, lost_input=lost, parcel=None
        )
        self._report(Report([], [result], []))
        self._leave(job)

    # --- inputs ---

    async def _stage(self, job: Job) -> None:
        try:
            await self.contents.thread(job.sandbox.mkdir, 0o700)
            for spec in job.files.inputs:
                async with self._staged:
                    await self._input(job, spec)
        except FilesError as error:
            self._end(job, Outcome.FILES, str(error), error.lost)
            return
        except OSError as error:
            self._end(job, Outcome.FILES, f"the sandbox cannot be made on {_host()}: {wire.describe(error)}")
            return
        job.phase = Phase.CORE
        self._sandboxes[job.task.id] = str(job.sandbox)
        self._run([job.task])

    async def _input(self, job: Job, spec: m.InputSpec) -> None:
        what = f"input {spec.name!r} ({spec.origin})"
        try:
            target = job.sandbox / names.checked(spec.name)
            await self.contents.thread(sandbox.make_parents, job.sandbox, target)
            await (self._url if spec.kind == "url" else self._content)(job, spec, target)
        except LostError as error:
            raise FilesError(f"{what} cannot be had: {error}", error.digest) from error
        except (HpcqError, UsageError) as error:
            raise FilesError(f"{what} cannot be had: {error}") from error
        except OSError as error:
            raise FilesError(f"{what} cannot be written on {_host()}: {wire.describe(error)}") from error

    async def _content(self, job: Job, spec: m.InputSpec, target: Path) -> None:
        contents, mode = self.contents, 0o755 if spec.executable else 0o644
        if not spec.cache and spec.kind == "file":
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                await contents.fetch(spec.digest, spec.size, job.task.id, descriptor)
            finally:
                os.close(descriptor)
            return
        descriptor = await contents.obtain(spec.digest, spec.size, job.task.id)
        try:
            await self._place(descriptor, spec, target, mode)
        finally:
            os.close(descriptor)

    async def _place(self, descriptor: int, spec: m.InputSpec, target: Path, mode: int) -> None:
        contents = self.contents
        if spec.kind == "dir":
            await contents.thread(sandbox.unpack, descriptor, target)
        elif not spec.link or not await contents.thread(contents.cache.link, spec.digest, target):
            await contents.thread(cache.copy, descriptor, target, mode)

    async def _url(self, job: Job, spec: m.InputSpec, target: Path) -> None:
        contents = self.contents
        if not spec.cache:
            descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                await self._fetch_url(spec, descriptor)
            finally:
                os.close(descriptor)
            return
        key = digests.of_bytes(b"url:" + spec.origin.encode()).digest
        descriptor = await contents.once(key, 0, lambda part: self._fetch_url(spec, part), grows=True)
        try:
            await contents.thread(cache.copy, descriptor, target, 0o644)
        finally:
            os.close(descriptor)

    async def _fetch_url(self, spec: m.InputSpec, descriptor: int) -> None:
        """Run the fetching program inside the tunnel; it writes to ``descriptor`` and says what is wrong on stderr."""
        complaint = os.memfd_create("hpcq-url")
        try:
            with open(os.devnull, "rb") as nothing:  # noqa: ASYNC230 - /dev/null does not block
                process = await self._spawn(
                    [sys.executable, "-P", "-m", "hpcq.files.urls", spec.origin, str(descriptor)],
                    cwd=self._scratch, stdin=nothing.fileno(), stdout=complaint, stderr=complaint,
                    pass_fds=(descriptor,),
                )  # fmt: skip
            await _finished(process, spec.timeout)
            status = await process.wait()
            said = os.pread(complaint, 4096, 0).decode(errors="replace").strip().splitlines()
        finally:
            os.close(complaint)
        if status:
            raise wire.SourceError(said[-1] if said else f"the program that fetches it ended with status {status}")

    # --- outputs ---

    async def _collect(self, job: Job, result: m.TaskResult) -> None:
        kept: list[m.KeptFile] = []
        try:
            async with self._collected:
                opened = await self.contents.thread(_open_all, job)
                try:
                    for spec, output in zip(job.files.outputs, opened, strict=True):
                        await self._output(job, spec, output, kept)
                finally:
                    for output in opened:
                        os.close(output.descriptor)
        except (collect.OutputError, FilesError) as error:
            self._end(job, Outcome.FILES, str(error))
            return
        except wire.DataError as error:
            self._end(job, Outcome.LOST, f"its outputs could not be sent: {error}")
            return
        self._report(Report([], [msgspec.structs.replace(result, kept=kept or None)], []))
        self._leave(job)

    async def _output(self, job: Job, spec: m.OutputSpec, output: collect.Output, kept: list[m.KeptFile]) -> None:
        what = f"output {spec.name!r}"
        contents = self.contents
        try:
            if spec.keep:
                content = await contents.thread(contents.keep, output.chunks(), output.kind, output.executable)
                kept.append(m.KeptFile(spec.name, content.digest, content.size, content.kind, content.executable))
                contents.announce([content.digest])
            else:
                request = wire.Store(job.task.id, spec.name, output.kind, output.executable)
                await contents.store(request, output.chunks)
        except wire.SourceError as error:
            raise FilesError(f"{what} could not be stored: {error}") from error
        except OSError as error:
            raise FilesError(f"{what} could not be kept on {_host()}: {wire.describe(error)}") from error


def _open_all(job: Job) -> list[collect.Output]:
    opened: list[collect.Output] = []
    try:
        for spec in job.files.outputs:
            opened.append(collect.open_output(str(job.sandbox), spec.name))
    except BaseException:
        for output in opened:
            os.close(output.descriptor)
        raise
    return opened


async def _finished(process: Any, timeout: float) -> None:
    ended = asyncio.ensure_future(process.wait())
    try:
        done, _ = await asyncio.wait({ended}, timeout=timeout)
        if not done:
            raise wire.SourceError(f"it did not arrive within {timeout:g} s")
    finally:
        if not ended.done():
            kill_tree(process.pid)
            await ended


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _host() -> str:
    return socket.gethostname()
