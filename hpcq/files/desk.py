"""The manager's side of files: prepares inputs, holds tasks for their producers, commits outputs.

A task with files goes through here twice::

    submitted --> WAITING (a producer has not ended) --> DIGESTING --> released to the scheduler --> ... reported
                     | producer failed                     | unreadable                                |
                     +-----------> files <-----------------+        outputs renamed, then Finish <-----+

    a kept output is lost with its pilots: its producer runs again (at most `RERUNS` times), the consumer waits again

All methods are called in the manager's thread; what blocks runs in `workers`. May not live here: sockets (`counter`),
placement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import msgspec

from hpcq import messages as m
from hpcq.files import digests, pack, sources, threads
from hpcq.files.digests import Content, Digests
from hpcq.files.holders import Holders
from hpcq.files.landing import Landing
from hpcq.files.names import shown
from hpcq.files.wire import describe
from hpcq.outcome import Outcome
from hpcq.task import Task

log = logging.getLogger("hpcq.files")

RERUNS = 3
"""How often a task runs again because an output that stayed on pilots was lost with them."""

INLINE = 1 << 16
"""Buffers up to this size are digested at once instead of in a thread."""


class Plan(NamedTuple):
    """A task's files as the user named them."""

    task: Task
    inputs: dict[str, sources.Source]
    outputs: dict[str, sources.Destination]


class FilesError(Exception):
    """Why a task cannot have its files; the message names the file."""


class Origin(NamedTuple):
    """Where the manager has a content: a path with its signature, or bytes."""

    path: str
    signature: tuple[object, ...]
    data: bytes
    kind: str

    def chunks(self) -> Iterator[bytes]:
        """The content, as long as it is unchanged.

        Raises:
            OSError: it cannot be read, or is not what it was.
        """
        if not self.path:
            yield self.data
            return
        self._unchanged()
        if self.kind == "dir":
            yield from pack.chunks(self.path, follow=True)
        else:
            with open(digests.open_regular(self.path), "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor
                yield from digests.file_chunks(file.fileno())
        self._unchanged()

    def _unchanged(self) -> None:
        if digests.signature(self.path) != self.signature:
            raise OSError(f"{shown(self.path)} was changed after the task was submitted")


class Case:
    """One task with files that is not done (or whose outputs may be needed again)."""

    __slots__ = ("again", "digests", "needs", "plan", "revived", "since", "submission", "waits_for")

    def __init__(self, submission: Any) -> None:
        self.submission = submission
        self.plan: Plan = submission.files
        self.waits_for: set[int] = set()
        self.digests: list[bytes] = []
        self.again = False
        self.revived = 0
        self.since = time.monotonic()


class Desk:
    """All tasks with files. ``release`` gives a prepared one to the scheduler, ``finish`` ends one that cannot run."""

    def __init__(
        self,
        release: Callable[[Any], None],
        finish: Callable[[int, Outcome, str], None],
        spawn: Callable[..., None],
    ) -> None:
        self._release = release
        self._finish = finish
        self._spawn: Callable[[Callable[..., Coroutine[Any, Any, None]], Any], None] = spawn
        self.workers = ThreadPoolExecutor(8, "hpcq-files")
        self.holders = Holders()
        self._digests = Digests()
        self._closed = False
        self._cases: dict[int, Case] = {}
        self._held: set[int] = set()
        self._dependents: dict[int, list[int]] = {}
        self._origins: dict[bytes, dict[int, Origin]] = {}
        self._kept: dict[tuple[int, str], m.KeptFile] = {}
        self._producer_of: dict[bytes, int] = {}
        self._reruns: Counter[int] = Counter()
        self._landings: dict[tuple[int, str], dict[str, Landing]] = {}

    @property
    def held_count(self) -> int:
        """Tasks that the scheduler has not got yet."""
        return len(self._held)

    def held(self) -> Iterator[tuple[int, float]]:
        """Their numbers, and since when (monotonic)."""
        return ((number, self._cases[number].since) for number in self._held)

    def why_held(self, number: int) -> str | None:
        """What a task waits for that the scheduler has not got; None when it waits for nothing here."""
        if number not in self._held:
            return None
        case = self._cases[number]
        outputs = [
            f"{output!r} of {producer.label}"
            for producer, output in filter(None, map(_wanted, case.plan.inputs.values()))
            if producer.id in case.waits_for
        ]
        if not outputs:
            return "its inputs are being read"
        return f"output {outputs[0]} is not there yet" + (f", nor {len(outputs) - 1} more" if outputs[1:] else "")

    def has_inputs(self, number: int) -> bool:
        """Whether it is a task that has some."""
        return number in self._cases and bool(self._cases[number].plan.inputs)

    # --- tasks come in ---

    def admit(self, submission: Any) -> None:
        """A task with files was submitted."""
        number = submission.spec.id
        self._cases[number] = Case(submission)
        self._begin(number)

    def _begin(self, number: int) -> None:
        case = self._cases[number]
        self._held.add(number)
        try:
            case.waits_for = set(self._open_producers(case.plan))
        except FilesError as error:
            self._give_up(number, str(error))
            return
        for producer in case.waits_for:
            self._dependents.setdefault(producer, []).append(number)
        if not case.waits_for:
            self._spawn(self._prepare, number)

    def _open_producers(self, plan: Plan) -> Iterator[int]:
        for name, source in plan.inputs.items():
            producer = _producer(source)
            if producer is None:
                continue
            assert producer.id is not None
            case = self._cases.get(producer.id)
            if (case is not None and case.again) or not producer.done:
                yield producer.id
            elif producer.outcome != Outcome.SUCCESS:
                raise FilesError(f"input {name!r} is an output of {producer.label}, which ended as {producer.outcome}")

    async def _prepare(self, number: int) -> None:
        case = self._cases[number]
        try:
            inputs = [await self._input(number, name, source) for name, source in case.plan.inputs.items()]
        except FilesError as error:
            if number in self._held:
                self._give_up(number, str(error))
            return
        except Exception as error:  # a fault of ours: nobody waits for ever
            log.exception("the inputs of task %d", number)
            if number in self._held:
                self._give_up(number, f"its inputs could not be prepared: {type(error).__name__}: {error}")
            return
        if number not in self._held:
            return  # cancelled meanwhile
        self._held.discard(number)
        outputs = [m.OutputSpec(name, isinstance(to, sources.Temp)) for name, to in case.plan.outputs.items()]
        spec = msgspec.structs.replace(case.submission.spec, files=m.FileSpec(inputs, outputs))
        self._release(case.submission._replace(spec=spec, files=None))

    async def _input(self, number: int, name: str, source: sources.Source) -> m.InputSpec:
        if isinstance(source, sources.URL):
            return m.InputSpec(name, "url", b"", -1, source.url, cache=source.cache, timeout=source.timeout)
        if isinstance(source, sources.Buffer):
            small = len(source.data) <= INLINE
            content = digests.of_bytes(source.data) if small else await self._thread(digests.of_bytes, source.data)
            self._have(number, content, Origin("", (), source.data, "file"))
            return m.InputSpec(name, "file", content.digest, content.size, "a buffer")
        if isinstance(source, sources.File):
            return await self._path(number, name, source.path, source.cache, source.link)
        return await self._produced(number, name, source)

    async def _path(self, number: int, name: str, path: str, cache: bool, link: bool) -> m.InputSpec:
        try:
            content, signature = await self._thread(self._digests.of_path, path)
        except OSError as error:
            raise FilesError(f"input {name!r} cannot be read: {_about(path, error)}") from error
        self._have(number, content, Origin(path, signature, b"", content.kind))
        return m.InputSpec(
            name, content.kind, content.digest, content.size, shown(path), content.executable, cache, link
        )

    async def _produced(self, number: int, name: str, source: sources.Temp | sources.TaskFile) -> m.InputSpec:
        producer, output = source.producer or (None, "") if isinstance(source, sources.Temp) else _pair(source)
        assert producer is not None
        assert producer.id is not None
        kept = self._kept.get((producer.id, output))
        if kept is not None:
            label = f"output {output!r} of {producer.label}"
            return m.InputSpec(name, kept.kind, kept.digest, kept.size, label, kept.executable)
        destination = (producer.options.outputs or {})[output]
        if isinstance(destination, sources.Temp):
            raise FilesError(f"input {name!r}: output {output!r} of {producer.label} is not there any more")
        return await self._path(number, name, destination, True, False)

    def _have(self, number: int, content: Content, origin: Origin) -> None:
        case = self._cases.get(number)
        if case is not None:
            case.digests.append(content.digest)
            self._origins.setdefault(content.digest, {})[number] = origin

    async def _thread(
        self, function: Callable[..., Any], *args: Any, undo: Callable[[Any], object] | None = None
    ) -> Any:
        return await threads.call(self.workers, function, *args, undo=undo)

    # --- tasks go out ---

    def _give_up(self, number: int, message: str, outcome: Outcome = Outcome.FILES) -> None:
        self._held.discard(number)
        again = self._cases[number].again
        self.done(number)
        if not again:
            self._finish(number, outcome, message)

    def cancel(self, tasks: Iterable[int]) -> None:
        """End those that the scheduler has not got."""
        for number in tasks:
            if number in self._held:
                self._give_up(number, "cancelled before it began", Outcome.CANCELLED)

    def done(self, number: int) -> None:
        """A task with files has ended, in whatever way."""
        case = self._cases[number]
        for digest in case.digests:
            origins = self._origins.get(digest, {})
            origins.pop(number, None)
            if not origins:
                self._origins.pop(digest, None)
        case.digests = []
        case.again = False
        if not any(isinstance(to, sources.Temp) for to in case.plan.outputs.values()):
            del self._cases[number]
        waiting = self._dependents.pop(number, [])
        if waiting:  # looked at when the task itself knows its outcome
            asyncio.get_running_loop().call_soon(self._producer_done, number, waiting)

    def _producer_done(self, producer: int, waiting: list[int]) -> None:
        for number in waiting:
            case = self._cases.get(number)
            if case is None or number not in self._held or producer not in case.waits_for:
                continue
            case.waits_for.discard(producer)
            if not case.waits_for:
                self._begin(number)

    # --- kept outputs ---

    def keep(self, result: m.TaskResult) -> None:
        """A task has succeeded and left these on its pilot."""
        for kept in result.kept or ():
            self._kept[result.id, kept.name] = kept
            self._producer_of[kept.digest] = result.id

    def is_again(self, number: int) -> bool:
        """Whether this run is only for an output that was lost; the user has the task already."""
        return self._cases[number].again

    def revives(self, number: int, digest: bytes) -> bool:
        """Have a lost output made again and the task that needs it wait; False when that was done often enough."""
        case = self._cases[number]
        producer = self._producer_of.get(digest)
        origin = None if producer is None else self._cases.get(producer)
        case.revived += 1
        if producer is None or origin is None or case.revived > RERUNS:
            return False
        if not origin.again and not self.holders.has(digest):
            self._reruns[producer] += 1
            if self._reruns[producer] > RERUNS:
                return False
            log.warning("an output of task %d was lost with its pilots; it runs again", producer)
            for key in [key for key in self._kept if key[0] == producer]:
                del self._kept[key]
            origin.again = True
            self._begin(producer)
        self._begin(case.submission.spec.id)
        return True

    # --- contents for pilots ---

    def knows(self, digest: bytes) -> bool:
        """Whether a task needs, needed or has left this content, as far as is known now."""
        return digest in self._origins or digest in self._producer_of or digest in self.holders.given

    def origins(self, digest: bytes) -> list[Origin]:
        """Where the manager has it."""
        return list(self._origins.get(digest, {}).values())

    # --- outputs from pilots ---

    async def land(self, number: int, pilot: str, name: str, kind: str, executable: bool) -> Landing:
        """A place for an output that is about to arrive.

        Raises:
            OSError: it cannot be written, or it is not an output of that task.
        """
        case = self._cases.get(number)
        destination = None if case is None else case.plan.outputs.get(name)
        if not isinstance(destination, str) or kind not in ("file", "dir"):
            raise OSError(f"task {number} has no output {name!r}")
        landing = await self._thread(Landing, destination, kind, executable, undo=Landing.drop)
        assert isinstance(landing, Landing)
        before = self._landings.setdefault((number, pilot), {}).pop(name, None)
        if before is not None:
            await self._thread(before.drop)
        self._landings[number, pilot][name] = landing
        return landing

    def concerns(self, result: m.TaskResult) -> bool:
        """Whether a report must wait for its outputs to be put in place."""
        return result.id in self._cases

    async def settle(self, pilot: str, result: m.TaskResult) -> m.TaskResult:
        """Commit the outputs of a task that succeeded, drop those of another; returns how it ended after that."""
        landings = self._landings.pop((result.id, pilot), {})
        case = self._cases.get(result.id)
        if result.outcome != Outcome.SUCCESS or case is None:
            await self._drop(landings.values())
            return result
        wanted = [name for name, to in case.plan.outputs.items() if isinstance(to, str)]
        try:
            missing = [name for name in wanted if name not in landings or not landings[name].is_complete]
            if missing:
                raise OSError(f"output {missing[0]!r} did not arrive")
            await self._thread(_commit, [landings[name] for name in wanted])
        except Exception as error:
            await self._drop(landings.values())
            if isinstance(error, OSError):
                return files_result(result, describe(error))
            log.exception("the outputs of task %d", result.id)  # a fault of ours: nobody waits for ever
            return files_result(result, f"its outputs could not be stored: {type(error).__name__}: {error}")
        self.keep(result)
        return result

    async def _drop(self, landings: Iterable[Landing]) -> None:
        for landing in landings:
            if self._closed:
                landing.drop()
            else:
                await self._thread(landing.drop)

    def pilot_gone(self, pilot: str) -> None:
        """What it was sending is not complete."""
        self.holders.pilot_gone(pilot)
        for key in [key for key in self._landings if key[1] == pilot]:
            self._spawn(self._drop, self._landings.pop(key).values())

    def close(self) -> None:
        """Leave no temporaries behind."""
        self._closed = True
        for landings in self._landings.values():
            for landing in landings.values():
                landing.drop()
        self._landings.clear()
        self.workers.shutdown(wait=False, cancel_futures=True)


def _commit(landings: list[Landing]) -> None:
    for landing in landings:
        landing.commit()


def files_result(result: m.TaskResult, message: str) -> m.TaskResult:
    """The same attempt, ended as ``files``."""
    return msgspec.structs.replace(
        result, outcome=Outcome.FILES.value, message=message, payload=b"", kept=None, parcel=None
    )


def _about(path: str, error: OSError) -> str:
    text = describe(error)
    return text if shown(path) in text else f"{shown(path)}: {text}"


def _pair(source: sources.TaskFile) -> tuple[Task, str]:
    return source.task, source.name


def _producer(source: sources.Source) -> Task | None:
    wanted = _wanted(source)
    return wanted[0] if wanted else None


def _wanted(source: sources.Source) -> tuple[Task, str] | None:
    """The task that writes it, and as which of its outputs."""
    if isinstance(source, sources.TaskFile):
        return _pair(source)
    return source.producer if isinstance(source, sources.Temp) else None
