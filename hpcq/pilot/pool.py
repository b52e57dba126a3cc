"""The runner processes: performs what `core` orders and tells it what happened.

Each runner has two socket pairs. Tasks go out as datagrams, of which we keep the receiving end too: reading from it
is how what the runner has not read yet is recalled, each datagram going to exactly one reader. Results are a stream.
A runner is dead when its process has ended and all it had sent is read, so no result is ever lost to a race. The end of
the stream is not waited for: a child it forked may hold that open, and is ended with what else is left of its session.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq.pilot import datagrams
from hpcq.pilot.core import Core
from hpcq.pilot.deaths import NEWS_TIMEOUT
from hpcq.pilot.hold import Hold
from hpcq.pilot.host import task_environment
from hpcq.pilot.lanes import Broken, Command, End, Give, Kill, Kind, LaneState, Pin, Recall, Report, Start
from hpcq.pilot.process import Runner, Spawn
from hpcq.pilot.processes import kill_descendants, kill_session, kill_tree, pin_tree
from hpcq.pilot.rest import Readers
from hpcq.pilot.runner import FromRunner, Held, Ready, Watched
from hpcq.pilot.sampler import YOUNG, Sampler, Target
from hpcq.pilot.scratch import remove_tree
from hpcq.pilot.traffic import Counting
from hpcq.pilot.usage import NOTHING_USED
from hpcq.pilot.watch import Place

log = logging.getLogger("hpcq.pilot")

_from_runner: Callable[[bytes | bytearray], Any] = msgspec.msgpack.Decoder(FromRunner).decode


KILLERS = 8
"""Process trees that are ended at a time; each takes `processes.DEATH_TIMEOUT_MS` at most."""


NOT_STARTED = 127
"""The status of a runner that could not be started, as a shell has it."""


class Pool:
    """All runners of a pilot. ``report`` and ``broken`` are called with what concerns the manager, ``on_death``
    before a runner's death is judged: whoever knows that its surroundings broke says so now. ``fault`` is called, once,
    when the core or what does its orders raised: nobody knows any more what runs where, so nothing is done from then
    on but ending it (`close`). Tasks may have ``files`` open (0: as many as we).
    """

    def __init__(  # noqa: PLR0917 - all differ in type
        self,
        core: Core,
        scratch: Path,
        spawn: dict[str, Spawn],
        report: Callable[[Report], None],
        broken: Callable[[str], None],
        fault: Callable[[BaseException], None],
        hold: Hold,
        *,
        files: int = 0,
    ) -> None:
        self._core = core
        self._files = files
        self._scratch = scratch
        self._spawn = spawn
        self._report = report
        self._broken = broken
        self._fault = fault
        self._faulty = False
        self.on_death: Callable[[], None] = lambda: None
        self.counting: Counting | None = None
        self.job_ends = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._runners: dict[int, Runner] = {}
        self._functions: dict[bytes, bytes] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._readers: Readers[Runner] = Readers(self._loop, self._read, lambda runner: core.busy_for(runner.lane))
        self._killers = ThreadPoolExecutor(KILLERS, "hpcq-kill")
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self.sandboxes: dict[int, str] = {}
        self.hold = hold
        self._sampler = Sampler(self._at_work, self._exceeded)
        self._sampling = self._loop.create_task(self._sampler.run())
        self._sampling.add_done_callback(self._over)
        self.idle = asyncio.Event()
        self.idle.set()

    # --- from the manager ---

    def run(self, message: m.Run) -> None:
        """New functions and tasks."""
        for function in message.functions:
            self._functions[function.key] = function.body
        for key in message.forget:
            self._forget(key)
        self.tell(self._core.run, message.tasks)

    def _forget(self, key: bytes) -> None:
        self._functions.pop(key, None)
        for runner in self._runners.values():
            if key in runner.known:
                runner.known.discard(key)
                self._send(runner, m.Forget(key))

    def tell(self, event: Callable[..., list[Command]], *what: object, **more: object) -> None:
        """Tell the core that ``event`` (a method of its) happened, just now, and do what it orders."""
        if self._faulty:
            return
        try:
            self._perform(event(*what, self._loop.time(), **more))
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """A fault of ours: what the core believes may be wrong from now on."""
        if not self._faulty:
            self._faulty = True
            self.idle.set()  # nothing will be heard of the tasks that are here
            self._fault(error)

    def _perform(self, commands: list[Command]) -> None:
        for command in commands:
            kind = type(command)
            if kind is Give:
                self._give(command)  # type: ignore[arg-type]
            elif kind is Report:
                self._report(_dated(command))  # type: ignore[arg-type]
            elif kind is Start:
                self._start(command)  # type: ignore[arg-type]
            elif kind is Pin:
                self._pin(command)  # type: ignore[arg-type]
            elif kind is Recall:
                self._loop.call_soon(self._recall, command.lane)  # type: ignore[union-attr]
            elif kind is Kill:
                self._kill(command.lane)  # type: ignore[union-attr]
            elif kind is End:
                self._end_children(command.lane)  # type: ignore[union-attr]
            elif isinstance(command, Broken):
                self._broken(command.message)
        self._set_timer()
        if self._core.busy and not self._faulty:
            self.idle.clear()
            if self.counting is not None:
                self.counting.stir()
        else:
            self.idle.set()

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline()
        if deadline is None or (self._timer_at is not None and self._timer_at <= deadline):
            return  # an earlier alarm is set: it looks again
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_at(deadline, self._on_time)

    def _on_time(self) -> None:
        self._timer = self._timer_at = None
        self._readers.catch_up()
        self.tell(self._core.time)

    # --- one runner's life ---

    def _start(self, command: Start) -> None:
        try:
            runner = Runner(command.lane, self._scratch / f"runner-{command.lane}")
        except OSError as error:  # the disk is full, say
            self._loop.call_soon(self._not_started, command.lane, error)
            return
        self._runners[command.lane] = runner
        life = self._loop.create_task(self._live(runner, command))
        self._lives.add(life)
        life.add_done_callback(self._over)

    def _not_started(self, lane: int, error: OSError) -> None:
        self.tell(self._core.dead, lane, NOT_STARTED, _said(error))

    def _over(self, life: asyncio.Task[None]) -> None:
        self._lives.discard(life)
        if not life.cancelled() and (error := life.exception()):
            self.fail(error)

    async def _live(self, runner: Runner, command: Start) -> None:
        try:
            try:
                status = await self._process(runner, command)
                written = runner.written()
            except Exception as error:
                log.exception("a runner could not be started")
                status, written = NOT_STARTED, _said(error)
            unread = self._not_begun(runner)
        finally:
            del self._runners[runner.lane]
            self._readers.leave(runner)
            self._loop.remove_writer(runner.tasks)
            runner.close()
        self.on_death()
        if self._core.may_be_the_jobs_end(runner.lane, status):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEWS_TIMEOUT):
                    await self.job_ends.wait()
        head = self._core.head(runner.lane)
        used = self._sampler.most(runner.lane, head.id) if head else NOTHING_USED
        self._sampler.forget(runner.lane)
        if head is not None and head.id not in unread:
            self._count(runner, head.id, self._loop.time() - self._core.lanes[runner.lane].head_since)
        self.tell(self._core.dead, runner.lane, status, written, unread=unread, used=used)
        await asyncio.to_thread(remove_tree, runner.directory)  # a task may have left a million files

    async def _process(self, runner: Runner, command: Start) -> int:
        kind = command.kind
        runner.inside = kind.network != "host"
        share = self._core.memory / self._core.cores
        far = (runner.tasks_far.fileno(), runner.results_far.fileno())
        with open(os.devnull, "rb") as nothing:  # noqa: ASYNC230, PTH123 - /dev/null does not block
            process = await self._spawn[kind.network](
                [
                    sys.executable, "-P", "-m", "hpcq.pilot.run", *map(str, far), kind.isolation, f"{share:g}",
                    str(self._files),
                ],
                cwd=runner.directory / "home",
                env=_environment(kind, task_environment(kind.cores, command.gpus, self._core.has_gpus, os.environ)),
                stdin=nothing.fileno(),
                stdout=runner.output,
                stderr=runner.errors,
                pass_fds=far,
            )  # fmt: skip
        runner.started(process)
        if runner.killed and runner.handle >= 0:
            self._kill_in_thread(runner, kill_tree)
        elif runner.cpus:
            pin_tree(process.pid, runner.cpus)
        self._readers.watch(runner)
        status = await process.wait()
        runner.over = True  # from here on nothing new is done to it: `handle` will be closed, and be another's
        while runner.kills:
            await asyncio.wait(runner.kills)
        await self._loop.run_in_executor(self._killers, kill_session, process.pid)
        while self._read(runner):
            pass
        return status

    def _read(self, runner: Runner) -> bool:
        """Take some of what the runner sent; whether there may be more at once."""
        try:
            data = runner.results.recv(1 << 18)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            data = b""
        if not data:
            self._readers.leave(runner)
            return False
        try:
            self._understand(runner, data)
        except Exception as error:
            self.fail(error)
        return True

    def _understand(self, runner: Runner, data: bytes) -> None:
        results = []
        for body in runner.frames.feed(data):
            message = _from_runner(body)
            if isinstance(message, Ready):
                self.tell(self._core.warm, runner.lane)
            elif isinstance(message, Held):
                runner.held = message.memory
            elif isinstance(message, Watched):
                runner.spent += message.cpu
            else:
                if message.parcel is not None:
                    self.hold.left(message.id, datagrams.left(runner.tasks, message.id), message.parcel)
                results.append(self._measured(runner, message))
        if results:
            self.tell(self._core.ended, runner.lane, results)

    def _measured(self, runner: Runner, result: m.TaskResult) -> m.TaskResult:
        """The result with what was seen of the task from outside, if it took long enough to be seen."""
        runner.spent += result.cpu
        seen = self._sampler.most(runner.lane, result.id)
        if seen is not NOTHING_USED:
            result.memory = max(result.memory, seen.memory)
            result.disk = max(result.disk, seen.disk)
        self._count(runner, result.id, result.seconds)
        return result

    def _count(self, runner: Runner, task: int, seconds: float) -> None:
        """A task has ended: its bytes may have to be counted first."""
        if runner.inside and self.counting is not None and self.counting.active:
            self.counting.ending(runner.lane, task, seconds)

    # --- what tasks use ---

    def _at_work(self) -> list[Target]:
        """The tasks worth a look."""
        old = self._loop.time() - YOUNG
        targets = []
        for lane, task in self._core.at_work(since=old):
            runner = self._runners.get(lane.number)
            if runner is not None and runner.process is not None:
                warm = lane.kind.isolation == "warm"  # in other kinds the processes are the task's own
                held, spent = (runner.held, runner.spent) if warm else (0.0, 0.0)
                targets.append(Target(lane.number, task, runner.process.pid, str(runner.directory), held, spent))
        return targets

    def places(self) -> list[Place]:
        """The runners inside the tunnel, and their tasks."""
        found = []
        for runner in self._runners.values():
            lane = self._core.lanes.get(runner.lane)
            if runner.inside and runner.process is not None and lane is not None:
                task = lane.tasks[0].id if lane.tasks and lane.state is LaneState.WARM else 0
                found.append(Place(lane.number, task, lane.head_since, runner.process.pid))
        return found

    def _exceeded(self, target: Target, why: str) -> None:
        self.tell(self._core.exceeded, target.lane, target.task.id, why)

    def _pin(self, command: Pin) -> None:
        runner = self._runners.get(command.lane)
        if runner is None:
            return  # it could not be started, which the core is told in a moment
        runner.cpus = command.cpus
        if runner.process is not None and not runner.over:
            pin_tree(runner.process.pid, command.cpus)

    def _kill(self, lane: int) -> None:
        runner = self._runners.get(lane)
        if runner is None or runner.over:
            return
        if runner.process is None:
            runner.killed = True
        elif runner.handle >= 0:
            self._kill_in_thread(runner, kill_tree)

    def _end_children(self, lane: int) -> None:
        """Kill what a runner has started; the core gives it nothing until that is done, so nothing new is hit."""
        runner = self._runners.get(lane)
        if runner is None or runner.over or runner.handle < 0:
            return  # it is gone, which the core is told elsewhere
        ending = self._kill_in_thread(runner, kill_descendants)
        ending.add_done_callback(lambda _: self._children_ended(lane))

    def _children_ended(self, lane: int) -> None:
        self.tell(self._core.children_ended, lane)

    def _kill_in_thread(self, runner: Runner, kill: Callable[[int, int], None]) -> asyncio.Future[None]:
        """A process may take seconds to die: nobody else is to wait for that."""
        assert runner.process is not None
        killing = self._loop.run_in_executor(self._killers, kill, runner.process.pid, runner.handle)
        runner.kills.add(killing)
        killing.add_done_callback(partial(_killed, runner))
        return killing

    # --- tasks on their way ---

    def _give(self, command: Give) -> None:
        runner = self._runners.get(command.lane)
        if runner is None:
            return  # as above
        key = command.task.function
        if key and key not in runner.known:
            runner.known.add(key)
            self._send(runner, m.Define(key, self._functions[key]))
        number = command.task.id
        load = self.hold.given.get(number)
        execute = m.Execute(command.task, self.sandboxes.get(number, ""), -1, self.hold.shelf.is_full())
        self._send(runner, execute, -1 if load is None else load.descriptor)

    def _send(self, runner: Runner, message: msgspec.Struct, parcel: int = -1) -> None:
        runner.unsent.append(datagrams.pack(message, parcel))
        if len(runner.unsent) == 1:
            self._send_waiting(runner)

    def _send_waiting(self, runner: Runner) -> None:
        while runner.unsent:
            body, attached = runner.unsent[0]
            try:
                datagrams.send(runner.tasks, body, attached)
            except BlockingIOError:
                self._loop.add_writer(runner.tasks, self._on_writable, runner)
                return
            except OSError:  # it has died: what it was given is found out by that
                pass
            runner.unsent.popleft()
            for descriptor in attached:
                os.close(descriptor)

    def _on_writable(self, runner: Runner) -> None:
        self._loop.remove_writer(runner.tasks)
        self._send_waiting(runner)

    def _recall(self, lane: int) -> None:
        runner = self._runners.get(lane)
        if runner is None:
            return
        self._read(runner)  # what it has done it need not be killed for
        # No result may be read between taking back and telling: meanwhile the runner may get one from the middle, whose
        # result comes before those that the core still has in front of it.
        self.tell(self._core.recalled, lane, self._not_begun(runner))

    def _not_begun(self, runner: Runner) -> set[int]:
        """Take back what the runner has not got; which tasks are among it."""
        back: set[int] = set()
        for message in [*self._unread(runner), *self._unsent(runner)]:
            if isinstance(message, m.Execute):
                back.add(message.task.id)
                if message.parcel >= 0:
                    os.close(message.parcel)
            elif isinstance(message, m.Define):
                runner.known.discard(message.key)
        return back

    def _unread(self, runner: Runner) -> list[Any]:
        """What is still in the socket; the far end is blocking for the runner, so each read says not to wait."""
        messages = []
        with contextlib.suppress(BlockingIOError, OSError):
            while (message := datagrams.receive(runner.tasks_far, socket.MSG_DONTWAIT)) is not None:
                messages.append(message)
        return messages

    def _unsent(self, runner: Runner) -> list[Any]:
        messages = [datagrams.unpack(body, attached) for body, attached in runner.unsent]
        runner.unsent.clear()
        return messages

    # --- the end ---

    async def close(self) -> None:
        """Kill every runner and wait until all are gone."""
        self._sampling.cancel()
        for lane in list(self._runners):
            self._kill(lane)
        if self._timer is not None:
            self._timer.cancel()
        self._readers.close()
        while self._lives:
            await asyncio.wait(self._lives)
        self._killers.shutdown()


def _killed(runner: Runner, killing: asyncio.Future[None]) -> None:
    runner.kills.discard(killing)
    if error := killing.exception():
        log.error("the processes of runner %d could not be ended: %s", runner.lane, error)


def _said(error: Exception) -> tuple[bytes, bytes]:
    """As if it were what a runner has written that did not get far enough to do so."""
    return b"", f"{type(error).__name__}: {error}\n".encode(errors="backslashreplace")


def _environment(kind: Kind, environment: dict[str, str]) -> dict[str, str]:
    """For a runner: one that forks has its libraries bound when it starts (`run` takes the variable away again), so
    that not every child looks up in them what it is the first to call."""
    return {"LD_BIND_NOW": "hpcq", **environment} if kind.isolation == "fork" else environment


def _dated(report: Report) -> Report:
    """The report, where results that the core made up for dead runners say when their task began."""
    for result in report.results:
        if not result.started_at:
            result.started_at = time.time() - result.seconds
    return report
