"""The scheduler: events and the time in, commands out. See the package's docstring for the rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hpcq.scheduler.events import (
    AskBack,
    Assign,
    Cancelled,
    Command,
    Ended,
    EndedTask,
    Event,
    Finish,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    Returned,
    Started,
    Stop,
    Submitted,
    Tick,
)
from hpcq.scheduler.records import Demand, Estimate, IllegalTransitionError, Pilot, Record, TaskState
from hpcq.task import Outcome

LOOKAHEAD = 0.05
"""Seconds of expected work sent ahead to each core of a pilot."""

SHORT = 1.0
"""Tasks expected to last longer (seconds) are not sent ahead: a round trip is nothing to them."""

BACKLOG_LIMIT = 2048
"""Tasks a pilot may hold in advance, however short."""

OVERHEAD = 20e-6
"""Seconds any task costs a pilot besides running: keeps the expectation of an empty task above zero."""

STUCK = 0.1
"""A pilot whose tasks make no progress for so many seconds is asked back what waits there, if others are idle."""


class Scheduler:
    """Tasks, pilots, and who has what."""

    def __init__(self) -> None:
        self.tasks: dict[int, Record] = {}
        self.pilots: dict[str, Pilot] = {}
        self.finished: Counter[str] = Counter()
        self._demands: dict[tuple[int, int, str], Demand] = {}
        self._waiting: dict[Demand, None] = {}
        self._estimates: dict[str, Estimate] = {}
        self._commands: list[Command] = []
        self._assigned: dict[str, list[int]] = {}
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            Submitted: self._submitted,
            Cancelled: self._cancelled,
            PilotReady: self._pilot_ready,
            PilotDraining: self._pilot_draining,
            PilotGone: self._pilot_gone,
            Started: self._started,
            Ended: self._ended,
            Returned: self._returned,
            Tick: self._tick,
        }

    def handle(self, events: Iterable[Event], now: float) -> list[Command]:
        """Take events that happened by ``now`` (seconds of a clock that never goes back); returns what to do."""
        for event in events:
            self._handlers[type(event)](event, now)
        self._place()
        commands, self._commands = self._commands, []
        commands.extend(Assign(pilot, tasks) for pilot, tasks in self._assigned.items())
        self._assigned = {}
        return commands

    @property
    def ready_count(self) -> int:
        """Tasks waiting to be placed."""
        return sum(len(demand.ready) for demand in self._waiting)

    @property
    def wants_tick(self) -> bool:
        """Whether a `Tick` could move something: tasks wait on one pilot while another has free cores."""
        return any(p.backlog for p in self.pilots.values()) and any(
            p.free_cores > 0 and not p.draining for p in self.pilots.values()
        )

    # --- events ---

    def _submitted(self, event: Submitted, now: float) -> None:
        for task in event.tasks:
            demand = self._demand(task)
            demand.alive += 1
            estimate = self._estimates.get(task.kind)
            if estimate is None:
                estimate = self._estimates[task.kind] = Estimate()
            record = self.tasks[task.id] = Record(task, demand, estimate)
            demand.ready.add(record)
            self._waiting[demand] = None

    def _demand(self, task: NewTask) -> Demand:
        key = (task.cores, task.memory, task.network)
        demand = self._demands.get(key)
        if demand is None:
            demand = self._demands[key] = Demand(*key)
            for pilot in self.pilots.values():
                self._sort_in(pilot, demand)
        return demand

    def _cancelled(self, event: Cancelled, now: float) -> None:
        for number in event.tasks:
            record = self.tasks.get(number)
            if record is None or record.state is TaskState.ENDING:
                continue
            if record.state is TaskState.READY:
                record.move("cancel", TaskState.DONE)
                record.demand.ready.discard(record)
                self._finish(record, Outcome.CANCELLED, message="cancelled before it began")
            else:
                record.move("cancel", TaskState.ENDING)
                assert record.pilot is not None
                self._commands.append(Stop(record.pilot.name, [record.id]))

    def _pilot_ready(self, event: PilotReady, now: float) -> None:
        if event.pilot in self.pilots:
            raise IllegalTransitionError(f"pilot {event.pilot} is ready twice")
        pilot = Pilot(event.pilot, event.cores, event.memory, event.wan, now)
        self.pilots[event.pilot] = pilot
        self._sort(pilot)

    def _pilot_draining(self, event: PilotDraining, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is not None:
            pilot.draining = True
            self._sort(pilot)

    def _pilot_gone(self, event: PilotGone, now: float) -> None:
        pilot = self.pilots.pop(event.pilot, None)
        if pilot is None:
            return
        for demand in self._demands.values():
            demand.idle.pop(pilot, None)
            demand.roomy.pop(pilot, None)
        for record in reversed(pilot.held()):
            record.pilot = None
            self._left_behind(record, "pilot gone", f"its pilot {pilot.name} went away: {event.reason}")

    def _left_behind(self, record: Record, trigger: str, message: str) -> None:
        if record.state is TaskState.ENDING:
            record.move(trigger, TaskState.DONE)
            self._finish(record, Outcome.CANCELLED, message="cancelled")
        elif trigger == "pilot gone" and record.state is TaskState.RUNNING and record.attempts > record.retries:
            record.move(trigger, TaskState.DONE)
            self._finish(record, Outcome.LOST, message=f"{message} (attempt {record.attempts})")
        else:
            record.move(trigger, TaskState.READY)
            record.demand.ready.add_first(record)
            self._waiting[record.demand] = None

    def _started(self, event: Started, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        for number in event.tasks:
            record = self.tasks.get(number)
            if record is None or record.pilot is not pilot or record.state is TaskState.RUNNING:
                continue
            record.attempts += 1
            record.move("start", TaskState.RUNNING if record.state is TaskState.ASSIGNED else TaskState.ENDING)

    def _ended(self, event: Ended, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        for task in event.tasks:
            record = self.tasks.get(task.id)
            if record is not None and record.pilot is pilot:
                self._end(pilot, record, task)
        pilot.progress = now
        pilot.promote()
        self._sort(pilot)

    def _end(self, pilot: Pilot, record: Record, task: EndedTask) -> None:
        pilot.release(record)
        record.pilot = None
        if record.state is TaskState.ASSIGNED:
            record.attempts += 1
        if record.state is TaskState.ENDING:
            record.move("end", TaskState.DONE)
            self._finish(record, Outcome.CANCELLED, reported=True, message="cancelled")
        elif task.outcome == Outcome.LOST and record.attempts <= record.retries:
            record.move("end", TaskState.READY)
            record.demand.ready.add_first(record)
            self._waiting[record.demand] = None
        else:
            record.estimate.learn(task.seconds)
            record.move("end", TaskState.DONE)
            self._finish(record, Outcome(task.outcome), reported=True)

    def _returned(self, event: Returned, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        pilot.asked_back = False
        for number in reversed(event.tasks):
            record = self.tasks.get(number)
            if record is None or record.pilot is not pilot:
                continue
            pilot.release(record)
            record.pilot = None
            if record.state is TaskState.RUNNING:
                record.attempts -= 1  # it was announced, but never begun
            self._left_behind(record, "give back", "")
        pilot.promote()
        self._sort(pilot)

    def _tick(self, event: Tick, now: float) -> None:
        """Ask back what is stuck, if somebody is idle and nothing else waits for them."""
        takers = [p for p in self.pilots.values() if not p.draining and not p.backlog and p.free_cores > 0]
        for pilot in self.pilots.values():
            if not takers:
                return
            if not pilot.backlog or pilot.asked_back or now - pilot.progress < STUCK:
                continue
            wanted = self._movable(pilot, takers)
            if wanted:
                pilot.asked_back = True
                self._commands.append(AskBack(pilot.name, wanted))

    def _movable(self, pilot: Pilot, takers: list[Pilot]) -> list[int]:
        room = sum(taker.free_cores for taker in takers)
        wanted = []
        for record in reversed(pilot.backlog.values()):
            if room < record.demand.cores:
                break
            fits = any(t.could_ever(record.demand) and t.can_now(record.demand) for t in takers)
            if fits and record.state is TaskState.ASSIGNED:
                room -= record.demand.cores
                wanted.append(record.id)
        return wanted

    # --- placement ---

    def _place(self) -> None:
        if not self._waiting:
            return
        for emptied in [d for d in self._waiting if not len(d.ready)]:
            self._retire(emptied)
        while (demand := self._next("idle")) is not None:
            self._assign(demand, next(iter(demand.idle)))
        while (demand := self._next("roomy")) is not None:
            self._assign(demand, next(iter(demand.roomy)))

    def _next(self, where: str) -> Demand | None:
        """The demand whose first task is due and for which such a pilot exists."""
        best, best_key = None, (0.0, 0)
        for demand in self._waiting:
            if not len(demand.ready) or not getattr(demand, where):
                continue
            head = demand.ready.head()
            key = (-head.priority, head.id)
            if best is None or key < best_key:
                best, best_key = demand, key
        return best

    def _retire(self, demand: Demand) -> None:
        del self._waiting[demand]
        if not demand.alive:
            del self._demands[demand.cores, demand.memory, demand.network]

    def _assign(self, demand: Demand, pilot: Pilot) -> None:
        record = demand.ready.pop()
        record.move("place", TaskState.ASSIGNED)
        record.pilot = pilot
        record.expected = (record.estimate.seconds or 0.0) + OVERHEAD
        if not pilot.backlog and pilot.can_now(demand):
            pilot.claim(record)
        else:
            pilot.hold(record)
        self._assigned.setdefault(pilot.name, []).append(record.id)
        self._sort(pilot)
        if not len(demand.ready):
            self._retire(demand)

    def _sort(self, pilot: Pilot) -> None:
        for demand in self._demands.values():
            self._sort_in(pilot, demand)

    def _sort_in(self, pilot: Pilot, demand: Demand) -> None:
        """Put the pilot at the end of the right set, so that pilots take turns."""
        demand.idle.pop(pilot, None)
        demand.roomy.pop(pilot, None)
        if pilot.draining or not pilot.could_ever(demand):
            return
        if not pilot.backlog and pilot.can_now(demand):
            demand.idle[pilot] = None
        elif self._admits(pilot, demand):
            demand.roomy[pilot] = None

    def _admits(self, pilot: Pilot, demand: Demand) -> bool:
        """Whether the pilot may hold one more such task in advance."""
        held = len(pilot.backlog)
        if held >= BACKLOG_LIMIT or pilot.asked_back:
            return False
        expected = self._expected(demand)
        if expected is None:
            return held < max(1, pilot.cores // demand.cores)
        if expected > SHORT:
            return demand.cores > 1 and not held  # keeps its place in the line against smaller ones
        return held < pilot.cores or pilot.backlog_seconds + expected <= LOOKAHEAD * pilot.cores

    def _expected(self, demand: Demand) -> float | None:
        if not len(demand.ready):
            return None
        return demand.ready.head().estimate.seconds

    # --- ends ---

    def _finish(self, record: Record, outcome: Outcome, *, reported: bool = False, message: str = "") -> None:
        del self.tasks[record.id]
        record.demand.alive -= 1
        self.finished[outcome.value] += 1
        self._commands.append(Finish(record.id, outcome, record.attempts, reported, message))
        if not record.demand.alive and record.demand not in self._waiting:
            self._demands.pop((record.demand.cores, record.demand.memory, record.demand.network), None)

    def check(self) -> None:
        """Every invariant, for tests: sums agree, nothing is promised twice, nothing is lost between sets."""
        for pilot in self.pilots.values():
            claimed = list(pilot.claimed.values())
            assert pilot.free_cores == pilot.cores - sum(r.demand.cores for r in claimed) >= 0
            assert pilot.free_memory == pilot.memory - sum(r.demand.memory for r in claimed) >= 0
            assert not pilot.claimed.keys() & pilot.backlog.keys()
            assert all(record.pilot is pilot for record in pilot.held())
        for number, record in self.tasks.items():
            assert record.id == number
            assert record.state is not TaskState.DONE
            placed = record.pilot is not None
            assert placed == (record.state is not TaskState.READY)
            assert record.pilot is None or number in record.pilot.claimed or number in record.pilot.backlog
        ready = [r for d in self._waiting for r in d.ready]
        assert sorted(r.id for r in ready) == sorted(r.id for r in self.tasks.values() if r.state is TaskState.READY)
        assert self.ready_count == len(ready)
