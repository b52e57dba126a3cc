"""Tasks with files, before and after they run.

::

    Run --> STAGING (sandbox made, inputs obtained) --> in the core --> COLLECTING (outputs sent or kept) --> result
              | an input cannot be had: files            | not success            | missing, bad, disk full: files
              | URL, and the tunnel is down: network     +----> result            | cancelled: result
              | withdrawn: Returned

While it is staged or collected a task holds no core and no runner. Its sandbox is a directory of its own below the
pilot's scratch directory, removed when the task leaves us. May not live here: what is common to all such errands
(`errands`), how contents travel (`contents`), what an output may be (`collect`).
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq.errors import HpcqError, UsageError
from hpcq.files import cache, digests, names, wire
from hpcq.outcome import Outcome
from hpcq.pilot import collect, sandbox
from hpcq.pilot.contents import Contents, LostError
from hpcq.pilot.errands import Errands, Job, Phase
from hpcq.pilot.lanes import Report
from hpcq.pilot.processes import kill_tree
from hpcq.pilot.scratch import remove_tree
from vpn import TunnelError

STAGED_AT_ONCE = 8
"""Inputs obtained at the same time."""

COLLECTED_AT_ONCE = 4
"""Tasks whose outputs are sent at the same time."""


class FilesError(Exception):
    """Why a task ends as ``files``, or ``network``; names the file. ``lost`` is the digest of an input that nobody has
    any more.
    """

    def __init__(self, message: str, lost: bytes = b"", outcome: Outcome = Outcome.FILES) -> None:
        super().__init__(message)
        self.lost = lost
        self.outcome = outcome


class Staged(Job):
    """One task with files that is here."""

    __slots__ = ("files", "sandbox", "task")

    def __init__(self, task: m.TaskSpec, sandbox: Path) -> None:
        super().__init__(task.id, Phase.BEFORE)
        assert task.files is not None
        self.task = msgspec.structs.replace(task, files=None)
        self.files = task.files
        self.sandbox = sandbox


class Staging(Errands[Staged]):
    """All of them. ``run`` gives staged tasks to the core, ``report`` tells the manager, ``judge`` says why the tunnel
    leads nowhere (or nothing if it does) when an URL cannot be had.
    """

    brings = "its outputs"

    def __init__(  # noqa: PLR0917 - what a pilot has
        self,
        scratch: Path,
        contents: Contents,
        spawn: Callable[..., Any],
        judge: Callable[[], Awaitable[str]],
        run: Callable[[list[m.TaskSpec]], None],
        report: Callable[[Report], None],
        sandboxes: dict[int, str],
    ) -> None:
        super().__init__(report)
        self._scratch = scratch
        self.contents = contents
        self._spawn = spawn
        self._judge = judge
        self._run = run
        self._sandboxes = sandboxes
        self._staged = asyncio.Semaphore(STAGED_AT_ONCE)
        self._collected = asyncio.Semaphore(COLLECTED_AT_ONCE)
        self._made = 0

    def concerns(self, task: m.TaskSpec) -> bool:
        """Whether it has files."""
        return task.files is not None

    def begin(self, task: m.TaskSpec) -> None:
        """Make its sandbox and obtain its inputs."""
        self._made += 1
        job = self.enter(Staged(task, self._scratch / f"task-{task.id}-{self._made}"))
        self.start(job, self._stage)

    def holds_back(self, result: m.TaskResult) -> bool:
        """Outputs of a task that succeeded are collected first."""
        job = self._jobs.get(result.id)
        if job is None:
            return False
        if result.outcome != Outcome.SUCCESS or not job.files.outputs:
            self.leave(result.id)
            return False
        job.phase, job.result = Phase.AFTER, result
        self.start(job, self._collect, result)
        return True

    def left(self, job: Staged) -> None:
        """Its sandbox goes."""
        self._sandboxes.pop(job.number, None)
        self.keep(self._loop.create_task(self._remove(job)))

    async def _remove(self, job: Staged) -> None:
        if job.activity is not None and not job.activity.done():
            await asyncio.wait({job.activity})
        await asyncio.to_thread(remove_tree, job.sandbox)

    def hang_up(self) -> None:
        """Connections for contents are of no more use."""
        self.contents.hang_up()

    # --- inputs ---

    async def _stage(self, job: Staged) -> None:
        try:
            await self.contents.thread(job.sandbox.mkdir, 0o700)
            for spec in job.files.inputs:
                async with self._staged:
                    await self._input(job, spec)
        except FilesError as error:
            self.end(job.number, error.outcome, str(error), error.lost)
            return
        except OSError as error:
            self.end(job.number, Outcome.FILES, f"the sandbox cannot be made on {_host()}: {wire.describe(error)}")
            return
        job.phase = Phase.CORE
        self._sandboxes[job.task.id] = str(job.sandbox)
        self._run([job.task])

    async def _input(self, job: Staged, spec: m.InputSpec) -> None:
        what = f"input {spec.name!r} ({spec.origin})"
        try:
            target = job.sandbox / names.checked(spec.name)
            await self.contents.thread(sandbox.make_parents, job.sandbox, target)
            await (self._url if spec.kind == "url" else self._content)(job, spec, target)
        except LostError as error:
            raise FilesError(f"{what} cannot be had: {error}", error.digest) from error
        except (HpcqError, UsageError) as error:
            if spec.kind == "url" and (why := await self._judge()):
                raise FilesError(f"{what}: the tunnel was down: {why}", outcome=Outcome.NETWORK) from error
            raise FilesError(f"{what} cannot be had: {error}") from error
        except TunnelError as error:
            raise FilesError(f"{what}: the tunnel was down: {error}", outcome=Outcome.NETWORK) from error
        except OSError as error:
            raise FilesError(f"{what} cannot be written on {_host()}: {wire.describe(error)}") from error

    async def _content(self, job: Staged, spec: m.InputSpec, target: Path) -> None:
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

    async def _url(self, job: Staged, spec: m.InputSpec, target: Path) -> None:
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
            with open(os.memfd_create("hpcq-url"), "wb") as url:  # noqa: ASYNC230 - memory does not block
                url.write(spec.origin.encode())
                url.seek(0)
                process = await self._spawn(
                    [sys.executable, "-P", "-m", "hpcq.files.urls", str(descriptor)],
                    cwd=self._scratch, stdin=url.fileno(), stdout=complaint, stderr=complaint,
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

    async def _collect(self, job: Staged, result: m.TaskResult) -> None:
        kept: list[m.KeptFile] = []
        try:
            async with self._collected:
                opened = await self.contents.thread(_open_all, job, undo=_close_all)
                try:
                    for spec, output in zip(job.files.outputs, opened, strict=True):
                        await self._output(job, spec, output, kept)
                finally:
                    _close_all(opened)
        except (collect.OutputError, FilesError) as error:
            self.end(job.number, Outcome.FILES, str(error))
            return
        except wire.DataError as error:
            self.end(job.number, Outcome.LOST, f"its outputs could not be sent: {error}")
            return
        self.tell(msgspec.structs.replace(result, kept=kept or None))

    async def _output(self, job: Staged, spec: m.OutputSpec, output: collect.Output, kept: list[m.KeptFile]) -> None:
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


def _open_all(job: Staged) -> list[collect.Output]:
    opened: list[collect.Output] = []
    try:
        for spec in job.files.outputs:
            opened.append(collect.open_output(str(job.sandbox), spec.name))
    except BaseException:
        _close_all(opened)
        raise
    return opened


def _close_all(opened: list[collect.Output]) -> None:
    for output in opened:
        os.close(output.descriptor)


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


def _host() -> str:
    return socket.gethostname()
