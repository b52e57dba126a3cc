"""The scheduler: events and the time in, commands out. See the package's docstring for the rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from hpcq.outcome import Outcome
from hpcq.scheduler.categories import Category
from hpcq.scheduler.events import (
    Allotment,
    AskBack,
    Assign,
    Cancelled,
    CategorySet,
    Command,
    Ended,
    EndedTask,
    Event,
    Finish,
    HostBlocked,
    HostUnblocked,
    PilotDraining,
    PilotGone,
    PilotReady,
    PilotTunnel,
    Returned,
    SpeculationSet,
    Started,
    StartFailed,
    Stop,
    Submitted,
    Tick,
)
from hpcq.scheduler.hosts import PAUSE, Hosts
from hpcq.scheduler.pilots import Pilot
from hpcq.scheduler.placement import Placement
from hpcq.scheduler.records import IllegalTransitionError, Record, TaskState
from hpcq.scheduler.relief import Relief
from hpcq.scheduler.speculation import Speculation, room_for_copy

STUCK = 0.1
"""A pilot whose tasks make no progress for so many seconds is asked back what waits there, if others are idle."""

LOOKED_AT = 64
"""Pilots that are looked at in one tick, idle ones and stuck ones each."""

OVERDUE_EVERY = 1.0
"""Seconds between two looks at what pilots hold in advance and could no longer end before they themselves do."""

REPEATED = frozenset({Outcome.LOST, Outcome.NETWORK, Outcome.RESOURCES})
"""Ends of an attempt after which another may follow."""

KINDS_KEPT = 1000
"""Categories without tasks whose experience is kept; those that were configured always are."""


class Scheduler:
    """Tasks, pilots, and who has what. ``speculate``: how many times the typical time makes an outlier; None: never."""

    def __init__(self, speculate: float | None = None) -> None:
        self.tasks: dict[int, Record] = {}
        self.pilots: dict[str, Pilot] = {}
        self.categories: dict[str, Category] = {}
        self.hosts = Hosts()
        self.placement = Placement(self._send)
        self.finished: Counter[str] = Counter()
        self._speculation = Speculation(speculate) if speculate is not None else None
        self._idle_kinds: dict[str, None] = {}
        self._pilots_end = False
        self._overdue_at = 0.0
        self._commands: list[Command] = []
        self._assigned: dict[str, Assign] = {}
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            Submitted: self._submitted,
            Cancelled: self._cancelled,
            CategorySet: self._category_set,
            PilotReady: self._pilot_ready,
            PilotTunnel: self._pilot_tunnel,
            PilotDraining: self._pilot_draining,
            PilotGone: self._pilot_gone,
            StartFailed: self._start_failed,
            HostBlocked: self._host_blocked,
            HostUnblocked: self._host_unblocked,
            SpeculationSet: self._speculation_set,
            Started: self._started,
            Ended: self._ended,
            Returned: self._returned,
            Tick: self._tick,
        }

    def handle(self, events: Iterable[Event], now: float) -> list[Command]:
        """Take events that happened by ``now`` (seconds of a clock that never goes back); returns what to do."""
        for event in events:
            self._handlers[type(event)](event, now)
        self.placement.place(now)
        commands, self._commands = self._commands, []
        commands.extend(self._assigned.values())
        self._assigned = {}
        return commands

    @property
    def ready_count(self) -> int:
        """Tasks waiting to be placed."""
        return self.placement.waiting

    @property
    def free_cores(self) -> int:
        """Cores of usable pilots on which no task waits: nothing in the line fits there."""
        return self.placement.free_cores

    @property
    def wants_tick(self) -> bool:
        """Whether a `Tick` could move something: tasks held in advance, blocks that end, outliers."""
        speculation = self._speculation
        return (
            bool(self.placement.backlogged and (self._pilots_end or len(self.placement.open)))
            or self.hosts.wants_tick
            or (speculation is not None and speculation.wants_tick)
        )

    def forget(self) -> None:
        """Drop everything, at the end: records are not seen by the garbage collector."""
        self.tasks.clear()
        self.pilots.clear()
        self.placement = Placement(self._send)

    # --- tasks come and go ---

    def _submitted(self, event: Submitted, now: float) -> None:
        placement = self.placement
        for task in event.tasks:
            category = self._category(task.kind)
            if not category.alive:
                self._idle_kinds.pop(task.kind, None)
            category.alive += 1
            demand = placement.demand(task, category)
            record = self.tasks[task.id] = Record(task.id, task.priority, task.retries, demand, category, now)
            placement.adopt(record, demand)
            placement.add(record)

    def _category(self, kind: str) -> Category:
        category = self.categories.get(kind)
        if category is None:
            category = self.categories[kind] = Category(kind)
        return category

    def _category_set(self, event: CategorySet, now: float) -> None:
        category = self._category(event.kind)
        category.set(event)
        self.placement.refit(category)

    def _cancelled(self, event: Cancelled, now: float) -> None:
        for number in event.tasks:
            record = self.tasks.get(number)
            if record is None or record.state is TaskState.ENDING:
                continue
            if record.state is TaskState.READY:
                record.move("cancel", TaskState.DONE, now)
                self.placement.discard(record)
                self._finish(record, Outcome.CANCELLED, message="cancelled before it began")
            else:
                record.move("cancel", TaskState.ENDING, now)
                for pilot in filter(None, (record.pilot, record.second)):
                    self._commands.append(Stop(pilot.name, [record.id]))

    def _send(self, record: Record, pilot: Pilot) -> None:
        command = self._assigned.get(pilot.name)
        if command is None:
            command = self._assigned[pilot.name] = Assign(pilot.name, [])
        command.tasks.append(record.id)
        if record.demand.allots:
            command.allotted[record.id] = Allotment(record.claimed.memory, record.claimed.disk)
        if record.doubted:
            command.announced.append(record.id)

    def _finish(self, record: Record, outcome: Outcome, *, reporter: Pilot | None = None, message: str = "") -> None:
        del self.tasks[record.id]
        self.placement.dismiss(record)
        category = record.category
        category.alive -= 1
        if not category.alive:
            self._retire(category)
        self.finished[outcome.value] += 1
        name = reporter.name if reporter else ""
        self._commands.append(Finish(record.id, outcome, record.begun, reporter is not None, message, name))
        if record.second is not None:
            self._stop_other(record, reporter)
        record.pilot = record.second = None

    def _stop_other(self, record: Record, reporter: Pilot | None) -> None:
        """Have the copy that came too late ended; it keeps its resources until its pilot has answered."""
        for pilot in (record.pilot, record.second):
            if pilot is not None and pilot is not reporter and pilot.find(record.id) is record:
                self._commands.append(Stop(pilot.name, [record.id]))

    def _retire(self, category: Category) -> None:
        if category.allots:
            return
        self._idle_kinds[category.kind] = None
        if len(self._idle_kinds) > KINDS_KEPT:
            kind = next(iter(self._idle_kinds))
            del self._idle_kinds[kind], self.categories[kind]

    # --- pilots come and go ---

    def _pilot_ready(self, event: PilotReady, now: float) -> None:
        if event.pilot in self.pilots:
            raise IllegalTransitionError(f"pilot {event.pilot} is ready twice")
        pilot = self.pilots[event.pilot] = Pilot(event, now)
        self._pilots_end = self._pilots_end or pilot.ends_at != math.inf
        self.hosts.arrived(pilot)
        self.placement.touch(pilot)

    def _pilot_tunnel(self, event: PilotTunnel, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is not None:
            pilot.wan, pilot.paused, pilot.features = event.wan, not event.usable, event.features
            self.placement.touch(pilot)

    def _pilot_draining(self, event: PilotDraining, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is not None:
            pilot.draining = True
            self.placement.touch(pilot)

    def _pilot_gone(self, event: PilotGone, now: float) -> None:
        pilot = self.pilots.pop(event.pilot, None)
        if pilot is None:
            return
        self.placement.remove(pilot)
        self.hosts.left(pilot)
        message = f"its pilot {pilot.name} went away: {event.reason}"
        for record in reversed(pilot.held()):
            if not self._copy_is_gone(record, pilot, begun=True):
                record.pilot = None
                record.doubted = record.doubted or (record.state is TaskState.ASSIGNED and record.id in pilot.claimed)
                self._left_behind(record, "pilot gone", message, now)

    def _copy_is_gone(self, record: Record, pilot: Pilot, *, begun: bool) -> bool:
        """Whether losing the task's attempt on this pilot changes nothing, because it is not the only one or the one
        that counts. Then what is left counts from now on."""
        if record.pilot is not pilot:
            if record.second is pilot:
                record.second = None
            return True
        if record.second is None or record.state is TaskState.ENDING:
            return False
        record.pilot, record.second = record.second, None
        if begun:
            record.attempts = min(record.attempts + 1, record.retries + 1)
        return True

    def _left_behind(self, record: Record, trigger: str, message: str, now: float) -> None:
        if record.state is TaskState.ENDING:
            record.move(trigger, TaskState.DONE, now)
            self._finish(record, Outcome.CANCELLED, message="cancelled")
        elif trigger == "pilot gone" and record.state is TaskState.RUNNING and record.begun > record.retries:
            record.move(trigger, TaskState.DONE, now)
            self._finish(record, Outcome.LOST, message=f"{message} (attempt {record.begun})")
        else:
            record.move(trigger, TaskState.READY, now)
            self.placement.add(record, first=True)

    # --- hosts ---

    def _start_failed(self, event: StartFailed, now: float) -> None:
        if self.hosts.failed(event.host):
            self._block_failing(event.host, now)

    def _host_blocked(self, event: HostBlocked, now: float) -> None:
        self._block(event.host, now + event.seconds, "on request")

    def _block_failing(self, host: str, now: float) -> None:
        failures = self.hosts[host].failures
        why = f"{failures} crashes or failed starts in a row, while tasks succeed on other hosts"
        self._block(host, now + PAUSE, why)

    def _block(self, host: str, until: float, why: str) -> None:
        for pilot in self.hosts.block(host, until, why):
            self.placement.touch(pilot)
            self._ask_back(pilot, list(pilot.backlog.values()))

    def _host_unblocked(self, event: HostUnblocked, now: float) -> None:
        for pilot in self.hosts.unblock(event.host):
            self.placement.touch(pilot)

    # --- words of pilots ---

    def _started(self, event: Started, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        for number in event.tasks:
            record = pilot.find(number)
            if record is None or record.pilot is not pilot or record.state is TaskState.RUNNING:
                continue
            record.attempts += 1
            record.move("start", TaskState.RUNNING if record.state is TaskState.ASSIGNED else TaskState.ENDING, now)
            if self._speculation is not None:
                self._speculation.watch(record, now)

    def _ended(self, event: Ended, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        for task in event.tasks:
            record = pilot.find(task.id)
            if record is not None:
                pilot.release(record)
                self._end(pilot, record, task, now)
        pilot.progress = now
        pilot.promote()
        self.placement.backlogged.pop(pilot, None)  # entered again at the end: in order of progress
        self.placement.touch(pilot)

    def _end(self, pilot: Pilot, record: Record, task: EndedTask, now: float) -> None:
        if record.pilot is not pilot and record.second is not pilot:
            return  # a copy that came too late
        if record.state is TaskState.ASSIGNED:
            record.attempts += 1
        if record.state is TaskState.ENDING:
            record.move("end", TaskState.DONE, now)
            self._finish(record, Outcome.CANCELLED, reporter=pilot, message="cancelled")
        elif not self._again(pilot, record, task, now):
            self._learn(pilot, record, task, now)
            record.move("end", TaskState.DONE, now)
            self._finish(record, Outcome(task.outcome), reporter=pilot)

    def _again(self, pilot: Pilot, record: Record, task: EndedTask, now: float) -> bool:
        """Whether this end is not the task's last; then it goes on elsewhere or waits."""
        outcome = task.outcome
        if outcome not in REPEATED:
            return False
        if self._copy_is_gone(record, pilot, begun=outcome == Outcome.LOST):
            return True
        if outcome == Outcome.NETWORK:
            record.retries += 1  # the tunnel's fault costs the task nothing
        elif record.begun > record.retries if outcome == Outcome.LOST else not self._raise(record, task):
            return False
        record.pilot = None
        record.move("end", TaskState.READY, now)
        self.placement.add(record, first=True)
        return True

    def _raise(self, record: Record, task: EndedTask) -> bool:
        """Have the task get more memory or disk the next time, if its category allows and a pilot has it."""
        level = record.demand.level
        needs = record.category.more(record.claimed, level, task.memory, task.disk)
        if needs is None or record.demand.needs.whole:
            return False
        if not any(p.memory >= needs.memory and p.disk >= needs.disk for p in self.pilots.values()):
            return False
        record.retries += 1  # `more` has its own bound
        self.placement.dismiss(record)
        self.placement.adopt(record, self.placement.raised(needs, level + 1))
        return True

    def _learn(self, pilot: Pilot, record: Record, task: EndedTask, now: float) -> None:
        category = record.category
        category.took(task.seconds)
        if task.outcome == Outcome.SUCCESS:
            if self._speculation is not None:
                category.remember(task.seconds)
            if category.used(task.memory, task.disk, task.seconds):
                self.placement.refit(category)
        if self.hosts.ended(pilot.host, task.outcome):
            self._block_failing(pilot.host, now)

    def _returned(self, event: Returned, now: float) -> None:
        pilot = self.pilots.get(event.pilot)
        if pilot is None:
            return
        pilot.asked_back = False
        for number in reversed(event.tasks):
            record = pilot.find(number)
            if record is None:
                continue
            pilot.release(record)
            if self._copy_is_gone(record, pilot, begun=False):
                continue
            record.pilot = None
            if record.state is TaskState.RUNNING:
                record.attempts -= 1  # it was announced, but never begun
            self._left_behind(record, "give back", "", now)
        pilot.promote()
        self.placement.touch(pilot)

    # --- what only time changes ---

    def _tick(self, event: Tick, now: float) -> None:
        for host in self.hosts.expired(now):
            self._host_unblocked(HostUnblocked(host), now)
        self._relieve(now)
        self._speculate(now)

    def _relieve(self, now: float) -> None:
        """Ask back what is stuck, if somebody is idle and nothing else waits for them, or can no longer end there."""
        if now >= self._overdue_at:
            self._overdue_at = now + OVERDUE_EVERY
            for pilot in self.placement.backlogged:
                self._ask_back(pilot, pilot.overdue(now))
        takers = [pilot for pilot in islice(self.placement.open, LOOKED_AT) if pilot.usable]
        if not takers:
            return
        relief = Relief(takers, now)
        for pilot in list(islice(self.placement.backlogged, LOOKED_AT)):
            if now - pilot.progress < STUCK:
                break
            if not pilot.asked_back:
                self._ask_back(pilot, relief.movable(pilot))
            self.placement.look_later(pilot)

    def _ask_back(self, pilot: Pilot, records: list[Record]) -> None:
        wanted = [record.id for record in records if record.state is TaskState.ASSIGNED]
        if wanted and not pilot.asked_back:
            pilot.asked_back = True
            self.placement.touch(pilot)
            self._commands.append(AskBack(pilot.name, wanted))

    def _speculation_set(self, event: SpeculationSet, now: float) -> None:
        self._speculation = None if event.multiplier is None else Speculation(event.multiplier)
        for record in self.tasks.values():
            if self._speculation is not None and record.state is TaskState.RUNNING:
                self._speculation.watch(record, now)

    def _speculate(self, now: float) -> None:
        """Give outliers a copy where there is room that nothing else waits for."""
        speculation = self._speculation
        if speculation is None:
            return
        for record in list(speculation.outliers(self.tasks, now)):
            pilot = None if record.claimed.whole else room_for_copy(record, self.placement.open, now)
            if pilot is None:
                speculation.again(record, now)
                continue
            record.second = pilot
            pilot.take(record, record.claimed, None)
            self.placement.touch(pilot)
            self._send(record, pilot)
