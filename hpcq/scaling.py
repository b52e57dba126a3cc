"""Autoscaling at work: looks at a queue every `LOOK` seconds, asks `hpcq.autoscale` what to do, and does it.

Looks and decisions are in the manager's thread, batch commands in worker threads, one at a time. It submits jobs of one
kind; others of the queue count as pilots that are there or on their way, but only its own are ever cancelled. The
limits can be changed meanwhile (``hpcq autoscale set``). It ends with the queue's program.

May not live here: what is decided (see `hpcq.autoscale`), how jobs are followed (see `hpcq.jobs`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from hpcq import config, servers
from hpcq.autoscale import Autoscale, Decision, Limits, Picture, Shape, Work, pilots_for
from hpcq.batch.base import BatchJob, JobState, PartlySubmittedError, PilotRequest, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.errors import HpcqError, UsageError
from hpcq.jobs import JobWatch
from hpcq.manager import Manager
from hpcq.roster import PilotState
from hpcq.scheduler.needs import Needs
from hpcq.scheduler.pilots import Pilot
from hpcq.units import parse_memory

log = logging.getLogger("hpcq.autoscale")

LOOK = 2.0
"""Seconds between two looks at the queue."""
LAST_SUBMISSION = 90.0
"""Seconds a submission under way has to end when the queue is closed: more than its own time limit."""
_NOT_STARTED = (JobState.PENDING, JobState.HELD, JobState.UNKNOWN)


class Scaling:
    """Autoscaling of one queue; nothing until `start`."""

    def __init__(self, queue: str, manager: Manager, jobs: JobWatch) -> None:
        self._queue = queue
        self._manager = manager
        self._jobs = jobs
        self._machine: Autoscale | None = None
        self._batch = ""
        self._options: dict[str, Any] = {}
        self._own: dict[str, BatchJob] = {}
        self._idle: dict[str, float] = {}
        self._judged: set[str] = set()
        self._hopeless: set[Needs] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._at_work = False
        self._at_rest = threading.Event()
        self._at_rest.set()
        self._warned = ""
        self._last = Picture()
        jobs.on_failed_start = self._on_failed_start
        manager.answer_to("autoscale", self._answer)

    # --- in the user's thread ---

    def start(self, batch: str | None, site: str | None, limits: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Begin, or go on with other pilots and limits. See `Queue.autoscale`.

        Raises:
            UsageError, TemplateError: what could not be submitted, at once and not with the first submission.
        """
        given = dict(options)
        if site is not None:
            given = dict(config.resolve({**options, "batch": batch}, site=site, origin="autoscale").values)
            given.pop("count")
            batch = given.pop("batch")
        name = batch or "local"
        checked = Limits().changed(limits)
        request = pilot_request(self._queue, name, 1, given)
        get_batch_system(name).render(request)
        servers.keep(self._queue, given)
        shape = _shape(request, given)
        self._manager.call(lambda: self._begin(name, given, checked, shape))

    def stop(self) -> None:
        """Submit no more. When it returns, every job that was submitted is followed."""
        self._manager.call(self._end)
        if not self._at_rest.wait(LAST_SUBMISSION):
            log.warning("a submission is still under way; its jobs may have to be cancelled by hand")

    # --- in the manager's thread ---

    def why_none(self) -> str | None:
        """Why it will bring no pilot: empty while it may, None when it is not used."""
        if self._machine is None:
            return None
        return f"autoscaling is paused: {self._machine.paused}" if self._machine.paused else ""

    def _begin(self, batch: str, options: dict[str, Any], limits: Limits, shape: Shape) -> None:
        self._batch, self._options = batch, options
        self._machine = Autoscale(limits, shape)
        self._judged = set(self._manager._roster.entries)
        self._hopeless.clear()
        self._set_timer(0.0)

    def _end(self) -> None:
        self._machine = None
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._look)

    def _look(self) -> None:
        if self._machine is None:
            return
        try:
            self._act(self._machine)
        except Exception:  # a fault of one look must not end all that would follow
            log.exception("autoscaling of queue %s: a look failed", self._queue)
        self._set_timer(LOOK)

    def _act(self, machine: Autoscale) -> None:
        self._judge(machine)
        now = asyncio.get_running_loop().time()
        self._last = self._picture(now)
        if not self._at_work:
            self._perform(machine.decide(self._last, now))
        if machine.paused != self._warned:
            self._warned = machine.paused
            if machine.paused:
                log.warning("autoscaling of queue %s is paused (see `hpcq autoscale`): %s", self._queue, machine.paused)

    def _judge(self, machine: Autoscale) -> None:
        """Tell of pilots that came to serve, or cannot, since the last look."""
        entries = self._manager._roster.entries
        for name, entry in entries.items():
            if name in self._judged or entry.state is PilotState.STARTING:
                continue
            self._judged.add(name)
            if entry.state is PilotState.FAILED:
                machine.failed(f"pilot {name}: {entry.failed_layer}: {entry.message}")
            else:
                machine.served()
        self._judged &= entries.keys()

    def _picture(self, now: float) -> Picture:
        scheduler = self._manager._scheduler
        working, paused = 0, 0
        idle: dict[str, float] = {}
        for name, pilot in scheduler.pilots.items():
            if pilot.draining:
                continue
            if pilot.claimed or pilot.backlog:
                working += 1
            elif pilot.paused:
                paused += 1
            else:
                idle[name] = self._idle.get(name, now)
        self._idle = idle
        starting = sum(e.state is PilotState.STARTING for e in self._manager._roster.entries.values())
        awaited = self._jobs.awaited(self._batch)
        nodes = self._machine.shape.nodes if self._machine else 1
        coming = sum(nodes if job.id in self._own else 1 for job, _ in awaited) + starting + paused
        return Picture(self._work(idle), working, idle, coming, len(self._pending(awaited)))

    def _work(self, idle: Iterable[str]) -> list[Work]:
        """What waits, one entry for all tasks with the same needs, but for those that our pilots cannot run."""
        scheduler, found = self._manager._scheduler, []
        idlers = [scheduler.pilots[name] for name in idle if name in scheduler.pilots]
        for *_, demand in scheduler.placement.line:
            needs, count = demand.needs, len(demand.ready)
            if count and not self._is_hopeless(needs, idlers):
                expected = demand.ready.head().category.seconds
                found.append(Work(count, needs.cores, needs.memory, needs.disk, needs.gpus, needs.walltime, expected))
        return found

    def _is_hopeless(self, needs: Needs, idlers: Sequence[Pilot]) -> bool:
        """Whether one of our kind had nothing to do and yet could not run such a task, for another reason than the time
        it had left: then another one could not either (it lacks a feature, or what it said it would have).
        """
        assert self._machine is not None
        shape, ever = self._machine.shape, msgspec.structs.replace(needs, walltime=0.0)
        if ever not in self._hopeless and any(
            pilot.cores >= shape.cores and pilot.memory >= shape.memory and not pilot.could_ever(ever, 0.0)
            for pilot in idlers
            if pilot.usable
        ):
            self._hopeless.add(ever)
            log.warning("autoscaling of queue %s: tasks wait that its pilots cannot run; `hpcq explain`", self._queue)
        return ever in self._hopeless

    def _pending(self, awaited: Sequence[tuple[BatchJob, JobState]]) -> list[BatchJob]:
        self._own = {job.id: job for job, _ in awaited if job.id in self._own}
        return [job for job, state in awaited if job.id in self._own and state in _NOT_STARTED]

    def _perform(self, decision: Decision) -> None:
        for name in decision.leave:
            self._idle.pop(name, None)
            self._manager.send_away(name, "autoscaling: it had nothing to do")
        if decision.cancel:
            newest = self._pending(self._jobs.awaited(self._batch))[-decision.cancel :]
            self._work_on(self._cancel, newest)
        elif decision.submit:
            self._work_on(self._submit, decision.submit)

    def _work_on(self, work: Any, what: Any) -> None:
        self._at_work = True
        self._at_rest.clear()
        self._manager.spawn(self._guarded, work, what)

    async def _guarded(self, work: Any, what: Any) -> None:
        try:
            await work(what)
        finally:
            self._at_work = False
            self._at_rest.set()

    async def _submit(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        error: Exception | None = None
        try:
            jobs = await asyncio.to_thread(self._put, count)
        except PartlySubmittedError as refusal:
            jobs, error = refusal.jobs, refusal
        except Exception as refusal:
            jobs, error = [], refusal
            if not isinstance(refusal, HpcqError):  # counted like any other: it must not be tried every two seconds
                log.exception("autoscaling of queue %s: a submission failed", self._queue)
        self._own |= {job.id: job for job in jobs}
        self._jobs.follow(jobs)
        if self._machine is None:
            return
        if jobs:
            self._machine.submitted(len(jobs), loop.time())
            log.info("autoscaling of queue %s submitted %d jobs", self._queue, len(jobs))
        if error is not None:
            self._machine.refused(str(error) or type(error).__name__, loop.time())
            log.warning("autoscaling of queue %s: %s", self._queue, error)

    def _put(self, count: int) -> list[BatchJob]:
        request = pilot_request(self._queue, self._batch, count, self._options)
        return get_batch_system(self._batch).submit(request)

    async def _cancel(self, jobs: list[BatchJob]) -> None:
        try:
            await asyncio.to_thread(get_batch_system(self._batch).cancel, jobs)
        except (HpcqError, OSError) as error:
            log.warning("autoscaling of queue %s: jobs without use could not be cancelled: %s", self._queue, error)

    def _on_failed_start(self, story: str) -> None:
        if self._machine is not None:
            self._machine.failed(story.partition("\n")[0])
            self._set_timer(0.0)

    # --- what clients ask ---

    def _answer(self, body: Any) -> dict[str, Any]:
        """Start, set, stop or show, as ``hpcq autoscale`` and ``submit-pilots --autoscale`` ask."""
        try:
            return self._do(body if isinstance(body, dict) else {})
        except UsageError as error:
            return {"refused": str(error)}

    def _do(self, question: Mapping[str, Any]) -> dict[str, Any]:
        what = question.get("do", "show")
        limits = question.get("limits") or {}
        if what == "start":
            checked = Limits().changed(limits)
            batch, options = question["batch"], question["options"]
            self._begin(batch, options, checked, _shape(pilot_request(self._queue, batch, 1, options), options))
        elif self._machine is None and what != "show":
            raise UsageError("autoscaling is not in use: begin with `hpcq submit-pilots --autoscale`")
        elif what == "set" and self._machine is not None:
            self._machine.set_limits(self._machine.limits.changed(limits))
            self._hopeless.clear()
            self._set_timer(0.0)
        elif what == "stop":
            self._end()
        return self._told()

    def _told(self) -> dict[str, Any]:
        if self._machine is None:
            return {"active": False}
        return {
            "active": True,
            "paused": self._machine.paused,
            "batch": self._batch,
            "limits": asdict(self._machine.limits),
            "needed": pilots_for(self._last.work, self._machine.shape),
            "working": self._last.working,
            "idle": len(self._last.idle),
            "coming": self._last.coming,
        }


def _shape(request: PilotRequest, options: Mapping[str, Any]) -> Shape:
    """What one pilot of these will have."""
    disk = options.get("disk")
    return Shape(
        cores=request.cores,
        memory=request.memory_mb or 0,
        disk=0 if disk is None else parse_memory(disk, name="disk"),
        gpus=request.gpus or 0,
        walltime=request.walltime_s,
        nodes=request.nodes,
    )
