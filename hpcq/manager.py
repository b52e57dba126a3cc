"""The manager: the shell round the scheduler. Runs in a thread of its own beside the user's program.

::

    user's thread                       manager's thread (asyncio)
    Queue.submit --inbox-->  _step: events --> Scheduler.handle --> commands
                                       ^                              |
             pilots' messages ---------+                              +--> Run / Retract / Cancel to pilots
    Queue.wait  <--deliver---------------- Finish <-------------------+

Everything that happened since the last turn of the loop (submits, results of all pilots) is handled in one step, so
under load each message carries many tasks. What the scheduler does not want to know, the specs to be sent and the last
report of each task, is in `dispatch`. The manager decides nothing about placement.

Failure cases: a stranger or a broken pilot costs its own link only; a pilot that is dropped has its tasks go elsewhere;
a bug in a step is logged, ends the queue and wakes every waiter with the error.
May not live here: connections (see `links`), batch commands (see `jobs`), pickling (see `serialize`), waiting users
(see `queue`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import psutil

from hpcq import connection as conn
from hpcq import messages as m
from hpcq import transport
from hpcq.credentials import CredentialDesk, Credentials
from hpcq.dispatch import Dispatch, Finished, Submission
from hpcq.errors import HpcqError, QueueClosedError
from hpcq.files.depot import Depot
from hpcq.files.service import FileService
from hpcq.links import Links
from hpcq.outcome import Attempt, Outcome
from hpcq.parcels import Shelf
from hpcq.questions import Questions, status, views
from hpcq.readiness import Readiness, ready_event, tunnel_event
from hpcq.roster import Entry, PilotState, PilotView, Roster
from hpcq.scheduler import (
    AskBack,
    Assign,
    Cancelled,
    Command,
    Ended,
    EndedTask,
    Event,
    Finish,
    PilotDraining,
    PilotGone,
    Returned,
    Scheduler,
    Started,
    StartFailed,
    Stop,
    Submitted,
    TaskRow,
    TaskState,
    Tick,
    explain,
    rows,
)

log = logging.getLogger("hpcq.manager")
T = TypeVar("T")

OUTCOMES = frozenset(Outcome)

HOUSEKEEPING = 0.1
"""Seconds between looks at what only time changes: silence, tasks stuck on one pilot while another is idle."""

NO_HURRY = 0.01
"""Seconds until it is seen that tasks have begun: the result of a short one is mostly there before."""

MEMORY_SHARE = 8
"""Large arguments and results may take this part of the machine's memory; more goes to disk, where temporaries are."""

LOOK_AGAIN = 1.0
"""Seconds after which it is seen whether the manager that was asked something still lives."""

LEAVE_TIMEOUT = 10.0
"""Seconds pilots have to hang up once they were told to leave."""


class Manager:
    """The thread that serves one queue. ``deliver`` is called in it with the tasks that are done."""

    def __init__(
        self,
        name: str,
        deliver: Callable[[list[Finished]], None],
        on_failure: Callable[[BaseException], None],
        credentials: Credentials,
        speculate: float | None = None,
    ) -> None:
        self.name = name
        self._deliver = deliver
        self._on_failure = on_failure
        self._credentials = CredentialDesk(credentials, self.spawn)
        self._identity = conn.own_identity(name)
        self._scheduler = Scheduler(speculate)
        self._roster = Roster()
        self._readiness = Readiness(self._roster)
        self._events: list[Event] = []
        self._inbox: deque[Submission] = deque()
        self._awake = False
        self._step_due = False
        self._no_hurry: asyncio.TimerHandle | None = None
        self._closing = False
        self._background: set[asyncio.Task[None]] = set()
        self._questions = Questions()
        self._questions.topics["pilots"] = lambda _body: views(self._scheduler, self._roster)
        self._questions.topics["status"] = lambda _body: self.status()
        self.files = FileService(self._files_ready, self._ended_without_pilot, self.spawn, self._ended)
        self.depot = Depot(conn.manager_tls(self._identity), Shelf(psutil.virtual_memory().total // MEMORY_SHARE))
        self._links = Links(name, self, self._roster, self._questions, self.files, self.depot)
        self._dispatch = Dispatch(self._links, self.files, self.depot)
        self.depot.is_open = self._dispatch.is_open
        self.on_pilot: Callable[[str, str], None] = lambda _batch, _job_id: None
        self.on_pilot_gone: Callable[[str, str], None] = lambda _batch, _job_id: None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"hpcq-{name}", daemon=True)

    # --- called from the user's threads ---

    def start(self, address: str | None, published: list[str], ports: Sequence[int]) -> conn.ConnectionInfo:
        """Listen on the first of ``ports`` that is free, write the connection file with the ``published`` addresses,
        serve.

        Raises:
            HpcqError: the address cannot be listened on.
        """
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._listen(address, published, ports), self._loop).result()
        except OSError as error:
            self.stop(0)
            tried = f"port {ports[0]}" if len(ports) == 1 else f"any of the {len(ports)} ports {ports[0]}…{ports[-1]}"
            raise HpcqError(
                f"cannot listen on {address or 'all addresses'} {tried} of {socket.gethostname()}: {error.strerror}"
            ) from error

    @property
    def is_this_thread(self) -> bool:
        """Whether we are called in the manager's thread, which cannot wait for itself."""
        return threading.current_thread() is self._thread

    def submit(self, submission: Submission) -> None:
        """Take one task; its results come through ``deliver``."""
        self._check_open()
        self._inbox.append(submission)
        if not self._awake:  # one wake-up for all that is submitted before the manager looks
            self._awake = True
            self._soon(self._wake)

    def tell(self, event: Event) -> None:
        """Have the scheduler take an event of the user's: after what was submitted before, before what comes later."""
        self.call(partial(self._take_now, event))

    def _take_now(self, event: Event) -> None:
        self._take(event)
        self._step()

    def cancel(self, tasks: list[int]) -> None:
        """End these tasks."""
        self._soon(self._cancel, tasks)

    def call(self, function: Callable[[], T]) -> T:
        """The value of ``function`` called in the manager's thread, where the state may be read."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                answer.set_exception(error)

        self._soon(run)
        while True:
            try:
                return answer.result(LOOK_AGAIN)
            except TimeoutError:
                if answer.done():  # it was the function's own
                    return answer.result()
                self._check_open()  # else it came too late for the loop's last turn

    def _soon(self, function: Callable[..., None], *args: Any) -> None:
        self._check_open()
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError as error:  # it was closed in between
            raise QueueClosedError(f"queue {self.name!r} is closed") from error

    def _check_open(self) -> None:
        if not self._thread.is_alive():
            raise QueueClosedError(f"queue {self.name!r} is closed")

    def answer_to(self, topic: str, function: Callable[[Any], Any]) -> None:
        """Let clients ask for ``topic``; called in the manager's thread with the JSON body, returns JSON."""
        self._questions.topics[topic] = function

    def pilots(self) -> list[PilotView]:
        """Every pilot that has connected, ended ones included."""
        return self.call(lambda: views(self._scheduler, self._roster))

    def when_ready(self, count: int) -> concurrent.futures.Future[None]:
        """Done when ``count`` pilots are ready; a `PilotFailedError` when one cannot serve meanwhile."""
        waiting: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.call(lambda: self._readiness.expect(count, waiting))
        return waiting

    def stop(self, timeout: float = LEAVE_TIMEOUT, reason: str = "the program has closed its queue") -> None:
        """Send the pilots away, wait at most ``timeout`` seconds for them to hang up, end the thread.

        With 0 seconds they are told nothing and may wait for another manager.
        """
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._stop(timeout, reason), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._scheduler.forget()
        self._loop.close()

    # --- the loop ---

    def _cancel(self, tasks: list[int]) -> None:
        self._accept_submissions()  # a cancel concerns what was submitted before it
        self.files.cancel(tasks)
        self._take(Cancelled(tasks))

    async def _listen(self, address: str | None, published: list[str], ports: Sequence[int]) -> conn.ConnectionInfo:
        port = await self._links.listen(address, ports, self._identity)
        info = conn.ConnectionInfo(
            queue=self.name,
            protocol=m.PROTOCOL_VERSION,
            addresses=published,
            port=port,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            authority=self._identity.authority,
            pilot=self._identity.pilot,
        )
        conn.write(info)
        self._keep_house()
        return info

    async def _stop(self, timeout: float, reason: str) -> None:
        self._closing = True
        self._readiness.close(self.name)
        self._links.shut()
        await self._links.dismiss(timeout, reason)
        await self.files.close()
        self.depot.close()
        await self._links.close()
        if self._background:
            await asyncio.wait(self._background, timeout=timeout)

    def _keep_house(self) -> None:
        if self._closing:
            return
        self._loop.call_later(HOUSEKEEPING, self._keep_house)  # whatever comes of this look
        self._links.keep(self._loop.time())
        if self._scheduler.wants_tick:
            self._take(Tick())

    def _wake(self) -> None:
        self._awake = False
        self._step()

    def _take(self, event: Event) -> None:
        self._events.append(event)
        self._schedule_step()

    def _take_with_next(self, event: Event) -> None:
        """Take an event that nothing follows from: with whatever comes next, or by itself after `NO_HURRY` seconds."""
        self._events.append(event)
        if not self._step_due and self._no_hurry is None:
            self._no_hurry = self._loop.call_later(NO_HURRY, self._step)

    def _schedule_step(self) -> None:
        if not self._step_due:
            self._step_due = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._step_due = False
        if self._no_hurry is not None:
            self._no_hurry.cancel()
            self._no_hurry = None
        try:
            self._accept_submissions()
            events, self._events = self._events, []
            self._perform(self._scheduler.handle(events, time.monotonic()))
        except Exception as error:
            log.exception("the manager of queue %s failed", self.name)
            self._on_failure(error)

    def _accept_submissions(self) -> None:
        if not self._inbox:
            return
        inbox, needs = self._inbox, []
        for _ in range(len(inbox)):  # what comes in meanwhile has its own wake-up
            submission = inbox.popleft()
            if submission.files is not None:
                self.files.admit(submission)
                continue
            needs.append(self._dispatch.take(submission))
        self._events.insert(0, Submitted(needs))  # before a cancel of the same tasks

    def _files_ready(self, submission: Submission) -> None:
        self._inbox.append(submission)
        self._schedule_step()

    def _ended_without_pilot(self, number: int, outcome: Outcome, message: str) -> None:
        self._scheduler.finished[outcome.value] += 1
        self._deliver([Finished(number, Attempt(outcome, message))])

    # --- commands ---

    def _perform(self, commands: list[Command]) -> None:
        finished: list[Finished] = []
        for command in commands:
            kind = type(command)
            if kind is Finish:
                done = self._dispatch.finished(command)  # type: ignore[arg-type]
                if done is not None:
                    finished.append(done)
                else:
                    self._scheduler.finished[command.outcome.value] -= 1  # type: ignore[union-attr]
            elif kind is Assign:
                self._dispatch.send(command)  # type: ignore[arg-type]
            else:
                self._relay(command)
        self._dispatch.forget()
        if finished:
            self._deliver(finished)

    def _relay(self, command: Command) -> None:
        assert isinstance(command, AskBack | Stop)
        link = self._links.get(command.pilot)
        if link is not None:  # else it went away in this very step
            link.send(m.Retract(command.tasks) if isinstance(command, AskBack) else m.Cancel(command.tasks))

    # --- what `links` tells ---

    def arrived(self, entry: Entry) -> None:
        """A pilot was let in."""
        self.on_pilot(entry.batch, entry.job_id)

    def gone(self, entry: Entry, reason: str) -> None:
        """A pilot's connection has ended."""
        self._dispatch.pilot_gone(entry.name)
        self.depot.pilot_gone(entry.name)
        for username in list(entry.credentials):
            self._credentials.revoke(entry, username)
        gone = PilotGone(entry.name, entry.message or reason)
        self.files.pilot_gone(entry.name, partial(self._gone, entry, gone))  # after its last results

    def _gone(self, entry: Entry, gone: PilotGone) -> None:
        self._take(gone)
        self.on_pilot_gone(entry.batch, entry.job_id)

    def said(self, link: transport.Link, entry: Entry, message: Any) -> None:
        """A pilot sent this."""
        kind = type(message)
        if kind is m.Update:
            self._updated(link, entry, message)
        elif kind is m.Traffic:
            self._roster.traffic(entry, message)
        elif kind is m.Holding:
            self.files.holding(entry.name, message)
        elif kind is m.Returned:
            self._take(Returned(entry.name, message.tasks))
        elif kind is m.CredentialRequest:
            self.spawn(self._credentials.issue, link, entry)
        elif kind is m.CredentialReturn:
            self._credentials.revoke(entry, message.username)
        elif kind is m.Ready:
            if entry.state is not PilotState.STARTING:
                link.abort("it said twice that it is ready")
                return
            self._roster.ready(entry, message)
            self.files.pilot_ready(entry.name, message)
            self._take(ready_event(entry, message))
            self._readiness.tell()
        elif kind is m.TunnelDown or kind is m.TunnelUp:
            self._roster.tunnel(entry, message)
            self._take(tunnel_event(entry, message))
        elif kind is m.StartFailed:
            log.warning(
                "pilot %s on %s cannot serve (%s): %s", entry.name, entry.hostname, message.layer, message.message
            )
            if entry.state is PilotState.STARTING:
                self._take(StartFailed(entry.hostname))
            self._roster.failed(entry, message)
            self._readiness.tell(entry)
            self._take(PilotDraining(entry.name))
        elif kind is m.Draining or kind is m.Goodbye:
            self._roster.draining(entry, message.reason)
            self._take(PilotDraining(entry.name))

    def _updated(self, link: transport.Link, entry: Entry, message: m.Update) -> None:
        if not all(result.outcome in OUTCOMES for result in message.results):
            link.abort("it reported an outcome that does not exist")
            return
        large = [result.id for result in message.results if result.parcel is not None]
        brought = [self.depot.reported(number, entry.name) or not self._dispatch.is_open(number) for number in large]
        if not all(brought):
            link.abort("it reported a result that it has not brought")
            return
        if message.results:
            entry.tasks_done += len(message.results)
            self._ended(entry, self.files.settle(entry, message.results))
        if message.started:
            self._take_with_next(Started(entry.name, message.started))

    def _ended(self, entry: Entry, results: list[m.TaskResult]) -> None:
        ended = []
        for result in results:
            self._dispatch.reported(entry, result)
            ended.append(EndedTask(result.id, result.outcome, result.seconds, result.memory, result.disk))
        if ended:
            self._take(Ended(entry.name, ended))

    def send_away(self, pilot: str, reason: str) -> None:
        """Place nothing more on a pilot and let it leave. In the manager's thread only."""
        link = self._links.get(pilot)
        if link is not None:
            self._take(PilotDraining(pilot))
            link.send(m.Leave(reason, drain=True))

    def spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run a coroutine beside everything else, in the manager's thread; it is waited for at the end."""
        task = self._loop.create_task(work(*args))
        self._background.add(task)
        task.add_done_callback(self._spawned_is_over)

    def _spawned_is_over(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the manager of queue %s failed at something beside", self.name, exc_info=error)

    # --- what clients and the user ask ---

    def status(self) -> dict[str, Any]:
        """Counts of tasks by state and outcome and of pilots by state. In the manager's thread only."""
        return status(self.name, self._scheduler, self._roster, self.files.held_count)

    def tasks(self, limit: int) -> tuple[list[TaskRow], int]:
        """At most ``limit`` unfinished tasks and how many there are. In the manager's thread only."""
        now = time.monotonic()
        listed = rows(self._scheduler, limit, now)
        held = islice(self.files.held(), max(0, limit - len(listed)))
        listed += [TaskRow(number, "waiting", now - since) for number, since in held]
        return listed, len(self._scheduler.tasks) + self.files.held_count

    def explain(self, number: int) -> str:
        """Why a task is where it is. In the manager's thread only."""
        if (held := self.files.why_held(number)) is not None:
            return f"task {number} waits: {held}"
        text = explain(self._scheduler, number, time.monotonic(), has_inputs=self.files.has_inputs(number))
        starting = sum(entry.state is PilotState.STARTING for entry in self._roster.entries.values())
        return f"{text} ({starting} starting)" if starting and not self._scheduler.pilots else text

    def running(self, ids: Iterable[int]) -> set[int]:
        """Those of these tasks that have begun, as far as their pilots have told. In the manager's thread only."""
        records = self._scheduler.tasks
        return {number for number in ids if number in records and records[number].state is TaskState.RUNNING}

    @property
    def cores(self) -> int:
        """Cores of the pilots that are connected and ready. In the manager's thread only."""
        return sum(pilot.cores for pilot in self._scheduler.pilots.values())

    @property
    def free_places(self) -> int:
        """Free cores that no waiting task fits, less what is on its way in. In the manager's thread only."""
        free = self._scheduler.free_cores
        if len(self._inbox) >= free:
            return 0
        return max(0, free - sum(submission.needs.cores for submission in self._inbox))
