"""Any order of events: every task finishes exactly once, nothing is promised twice, the same run replays the same.

The model is a set of pilots that act only on the commands they were sent, in any order and at any time, and die, drain
and answer as they like; several events may reach the scheduler in one step.
"""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcq.outcome import Outcome
from hpcq.scheduler import (
    MODES,
    AskBack,
    Assign,
    Cancelled,
    CategorySet,
    Ended,
    EndedTask,
    Finish,
    HostBlocked,
    HostUnblocked,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    PilotTunnel,
    Returned,
    Scheduler,
    Started,
    StartFailed,
    Stop,
    Submitted,
    Tick,
    explain,
)
from hpcq.scheduler.categories import ENOUGH
from hpcq.scheduler.invariants import check

OUTCOMES = st.sampled_from(
    ["success", "success", "success", "exception", "crash", "walltime", "lost", "resources", "network"]
)
FEATURES = st.sampled_from([frozenset(), frozenset({"x"}), frozenset({"x", "y"})])
HOSTS = st.sampled_from(["h1", "h2", "h3"])
RAISES = 3
"""Attempts that a task of a learning category may have beyond its retries."""


class Pilot:
    """What a pilot knows: the tasks it was sent and which of them it has begun."""

    def __init__(self, ready, now):
        self.ready = ready
        self.ends_at = now + ready.time_left
        self.held = []
        self.begun = set()
        self.draining = False
        self.wan = ready.wan
        self.paused = False
        self.features = ready.features


class SchedulerModel(RuleBasedStateMachine):
    speculate: float | None = None

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler(self.speculate)
        self.now = 0.0
        self.pending = []
        self.log = []
        self.pilots = {}
        self.pilots_made = 0
        self.tasks = {}
        self.cancelled = set()
        self.begun_count = {}
        self.finished = {}
        self.blocked = set()
        self.outages = {}
        self.copies = 0
        self.learn_how_long_tasks_take()

    def learn_how_long_tasks_take(self):
        self.pilot_ready(1, 0, True, 0, 0, frozenset(), "h1", math.inf)
        self.submit(ENOUGH, 1, 0, "any", 0, 0, "a", 0, 0, frozenset(), 0.0)
        self.handle()
        pilot = self.pilots["p1"]
        while pilot.held:
            self.pending.append(Ended("p1", [EndedTask(pilot.held.pop(0), "success", 0.1, 5, 5)]))
            self.handle()

    # --- the shell ---

    def handle(self):
        events, self.pending = self.pending, []
        commands = self.scheduler.handle(events, self.now)
        self.log.append((events, self.now, commands))
        for command in commands:
            self.obey(command)

    def obey(self, command):
        if isinstance(command, Finish):
            assert command.task not in self.finished, "finished twice"
            task = self.tasks[command.task]
            self.finished[command.task] = command
            assert command.attempts <= task.retries + 1 + RAISES + self.outages.get(command.task, 0)
            if command.outcome is Outcome.LOST:
                assert command.attempts >= task.retries + 1
            assert (command.outcome is Outcome.CANCELLED) <= (command.task in self.cancelled)
            return
        pilot = self.pilots.get(command.pilot)
        if pilot is None:
            assert not isinstance(command, Assign), "tasks sent to a pilot that is gone"
        elif isinstance(command, Assign):
            assert not pilot.draining
            assert not pilot.paused
            assert pilot.ready.host not in self.blocked
            for number in command.tasks:
                task = self.tasks[number]
                assert number not in self.finished
                assert task.disk <= pilot.ready.disk
                assert task.gpus <= pilot.ready.gpus
                assert task.features <= pilot.features
                assert not task.walltime or task.walltime <= pilot.ends_at - self.now
                assert task.cores <= pilot.ready.cores
                assert task.memory <= pilot.ready.memory
                assert pilot.wan or task.network != "wan"
                elsewhere = sum(number in other.held for other in self.pilots.values())
                assert number not in pilot.held
                assert elsewhere <= (self.speculate is not None), "on too many pilots at once"
                self.copies += elsewhere
                pilot.held.append(number)
        else:
            assert isinstance(command, AskBack | Stop)
            assert set(command.tasks) <= set(self.tasks)

    def choose_pilot(self, data, *, busy=False):
        names = [name for name, pilot in self.pilots.items() if pilot.held or not busy]
        return self.pilots[data.draw(st.sampled_from(sorted(names)))]

    # --- what may happen ---

    @rule(
        count=st.integers(1, 8),
        cores=st.sampled_from([1, 1, 1, 2, 4]),
        memory=st.sampled_from([0, 0, 10, 60]),
        network=st.sampled_from(["any", "any", "any", "wan", "host"]),
        priority=st.integers(-1, 1),
        retries=st.integers(0, 2),
        kind=st.sampled_from(["a", "a", "b"]),
        disk=st.sampled_from([0] * 5 + [5]),
        gpus=st.sampled_from([0] * 5 + [1]),
        features=st.sampled_from([frozenset()] * 5 + [frozenset({"x"})]),
        walltime=st.sampled_from([0.0, 0.0, 0.0, 10.0]),
    )
    def submit(self, count, cores, memory, network, priority, retries, kind, disk, gpus, features, walltime):
        first = len(self.tasks) + 1
        options = (cores, memory, network, priority, retries, kind, disk, gpus, features, walltime)
        new = [NewTask(n, *options) for n in range(first, first + count)]
        self.tasks.update((task.id, task) for task in new)
        self.pending.append(Submitted(new))

    @rule(
        kind=st.sampled_from(["a", "b"]),
        mode=st.sampled_from(MODES),
        memory=st.sampled_from([0, 20]),
        max_memory=st.sampled_from([0, 60]),
    )
    def category(self, kind, mode, memory, max_memory):
        self.pending.append(CategorySet(kind, mode, memory, 0, max_memory, 0))

    @rule(host=HOSTS, event=st.sampled_from([HostBlocked, HostUnblocked, HostUnblocked, StartFailed]))
    def host_event(self, host, event):
        self.handle()
        if event is StartFailed and host in self.blocked:
            return
        if event is HostBlocked:
            self.blocked.add(host)
        elif event is HostUnblocked:
            self.blocked.discard(host)
        self.pending.append(event(host))

    @precondition(lambda self: any(pilot.held for pilot in self.pilots.values()))
    @rule(seconds=st.sampled_from([0.3, 5.0]))
    def all_start_and_time_passes(self, seconds):
        for name, pilot in self.pilots.items():
            self.pending.append(Started(name, [number for number in pilot.held if number not in pilot.begun]))
            pilot.begun.update(pilot.held)
        self.time_passes(seconds)

    @rule(
        cores=st.integers(1, 6),
        memory=st.sampled_from([0, 50, 100]),
        wan=st.sampled_from([True, True, False]),
        disk=st.sampled_from([0, 10]),
        gpus=st.sampled_from([0, 2]),
        features=FEATURES,
        host=HOSTS,
        time_left=st.sampled_from([math.inf, math.inf, 12.0]),
    )
    def pilot_ready(self, cores, memory, wan, disk, gpus, features, host, time_left):
        self.pilots_made += 1
        ready = PilotReady(f"p{self.pilots_made}", cores, memory, wan, disk, gpus, features, host, time_left)
        self.pilots[ready.pilot] = Pilot(ready, self.now)
        self.pending.append(ready)

    @precondition(lambda self: len(self.pilots) > 2)
    @rule(data=st.data())
    def pilot_drains(self, data):
        pilot = self.choose_pilot(data)
        self.pending.append(PilotDraining(pilot.ready.pilot))
        self.handle()
        pilot.draining = True

    @precondition(lambda self: self.pilots)
    @rule(data=st.data(), wan=st.booleans(), usable=st.booleans(), features=FEATURES)
    def tunnel_changes(self, data, wan, usable, features):
        pilot = self.choose_pilot(data)
        self.handle()
        self.pending.append(PilotTunnel(pilot.ready.pilot, wan, usable or wan, features))
        pilot.wan, pilot.paused, pilot.features = wan, not (usable or wan), features

    @precondition(lambda self: len(self.pilots) > 1)
    @rule(data=st.data())
    def pilot_goes(self, data):
        pilot = self.choose_pilot(data)
        del self.pilots[pilot.ready.pilot]
        self.pending.append(PilotGone(pilot.ready.pilot, "gone"))

    @precondition(lambda self: any(pilot.held for pilot in self.pilots.values()))
    @rule(data=st.data())
    def tasks_start(self, data):
        pilot = self.choose_pilot(data, busy=True)
        waiting = [number for number in pilot.held if number not in pilot.begun]
        begun = waiting[: data.draw(st.integers(0, len(waiting)))]
        pilot.begun.update(begun)
        self.pending.append(Started(pilot.ready.pilot, begun))

    @precondition(lambda self: any(pilot.held for pilot in self.pilots.values()))
    @rule(
        data=st.data(),
        outcome=OUTCOMES,
        seconds=st.sampled_from([0.0, 0.001, 0.1, 30.0]),
        memory=st.sampled_from([0.0, 5.0, 40.0, 70.0]),
    )
    def tasks_end(self, data, outcome, seconds, memory):
        pilot = self.choose_pilot(data, busy=True)
        ended = pilot.held[: data.draw(st.integers(1, len(pilot.held)))]
        pilot.held = pilot.held[len(ended) :]
        pilot.begun.difference_update(ended)
        if outcome == "network":
            self.outages.update((number, self.outages.get(number, 0) + 1) for number in ended)
        self.pending.append(Ended(pilot.ready.pilot, [EndedTask(number, outcome, seconds, memory) for number in ended]))

    @precondition(lambda self: self.pilots)
    @rule(data=st.data(), announced_too=st.booleans())
    def pilot_gives_back(self, data, announced_too):
        pilot = self.choose_pilot(data)
        able = [number for number in pilot.held if announced_too or number not in pilot.begun]
        back = [number for number in able if data.draw(st.booleans())]
        pilot.held = [number for number in pilot.held if number not in back]
        pilot.begun.difference_update(back)
        self.pending.append(Returned(pilot.ready.pilot, back))

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.tasks)), max_size=4))
        self.cancelled.update(chosen)
        self.pending.append(Cancelled(chosen))

    @precondition(lambda self: self.tasks)
    @rule(data=st.data(), pilot=st.sampled_from(["p1", "p2", "nobody"]))
    def stray_words(self, data, pilot):
        """What a pilot that is gone, or was never sent the task, still says."""
        known = self.pilots.get(pilot)
        foreign = [number for number in self.tasks if known is None or number not in known.held]
        if (known is not None and known.draining) or not foreign:
            return
        number = data.draw(st.sampled_from(foreign))
        self.handle()  # now nobody but its holder, if any, may speak for it
        if known is not None and number in known.held:
            return
        events = [Started(pilot, [number]), Ended(pilot, [EndedTask(number, "success")]), Returned(pilot, [number])]
        self.pending.append(data.draw(st.sampled_from(events)))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.2, 5.0]))
    def time_passes(self, seconds):
        self.handle()
        self.now += seconds
        self.pending.append(Tick())
        self.handle()

    @rule()
    def step(self):
        self.handle()

    # --- what must hold ---

    @invariant()
    def consistent(self):
        if not self.pending:
            check(self.scheduler)
            assert set(self.tasks) - set(self.finished) == set(self.scheduler.tasks)
            assert self.scheduler.finished.total() == len(self.finished)
            for number in set(self.tasks) - set(self.finished):
                assert explain(self.scheduler, number, self.now)

    def teardown(self):
        self.handle()
        for name in list(self.pilots):
            self.pending.append(PilotGone(name))
            del self.pilots[name]
        features = frozenset({"x", "y"})
        self.pilots["last"] = Pilot(PilotReady("last", 8, 1000, True, 1000, 8, features, "last"), self.now)
        self.pending.append(self.pilots["last"].ready)
        self.handle()
        last = self.pilots["last"]
        while last.held:
            ended, last.held = last.held, []
            self.pending.append(Ended("last", [EndedTask(number, "success", 0.01) for number in ended]))
            self.handle()
        check(self.scheduler)
        assert set(self.finished) == set(self.tasks), "every task finishes"
        assert not self.scheduler.placement.line
        again = Scheduler(self.speculate)
        assert [again.handle(events, now) for events, now, _ in self.log] == [commands for *_, commands in self.log]


SchedulerModel.TestCase.settings = settings(max_examples=75, stateful_step_count=40, deadline=None)
TestSchedulerModel = SchedulerModel.TestCase


class CopyingSchedulerModel(SchedulerModel):
    speculate = 2.0


CopyingSchedulerModel.TestCase.settings = SchedulerModel.TestCase.settings
TestCopyingSchedulerModel = CopyingSchedulerModel.TestCase
