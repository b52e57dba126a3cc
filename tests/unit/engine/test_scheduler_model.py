"""Any order of events: every task finishes exactly once, nothing is promised twice, the same run replays the same.

The model is a set of pilots that act only on the commands they were sent, in any order and at any time, and die, drain
and answer as they like; several events may reach the scheduler in one step.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcq.scheduler import (
    AskBack,
    Assign,
    Cancelled,
    Ended,
    EndedTask,
    Finish,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    Returned,
    Scheduler,
    Started,
    Stop,
    Submitted,
    Tick,
)
from hpcq.task import Outcome

OUTCOMES = st.sampled_from(["success", "success", "success", "exception", "crash", "walltime", "lost"])


class Pilot:
    """What a pilot knows: the tasks it was sent and which of them it has begun."""

    def __init__(self, ready):
        self.ready = ready
        self.held = []
        self.begun = set()
        self.draining = False


class SchedulerModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler()
        self.now = 0.0
        self.pending = []
        self.log = []
        self.pilots = {}
        self.pilots_made = 0
        self.tasks = {}
        self.cancelled = set()
        self.begun_count = {}
        self.finished = {}

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
            assert command.attempts <= task.retries + 1
            if command.outcome is Outcome.LOST:
                assert command.attempts == task.retries + 1
            assert (command.outcome is Outcome.CANCELLED) <= (command.task in self.cancelled)
            return
        pilot = self.pilots.get(command.pilot)
        if pilot is None:
            assert not isinstance(command, Assign), "tasks sent to a pilot that is gone"
        elif isinstance(command, Assign):
            assert not pilot.draining
            for number in command.tasks:
                task = self.tasks[number]
                assert task.cores <= pilot.ready.cores
                assert task.memory <= pilot.ready.memory
                assert pilot.ready.wan or task.network != "wan"
                assert not any(number in other.held for other in self.pilots.values()), "on two pilots at once"
                pilot.held.append(number)
        else:
            assert isinstance(command, AskBack | Stop)
            assert set(command.tasks) <= set(self.tasks)

    def choose_pilot(self, data):
        return self.pilots[data.draw(st.sampled_from(sorted(self.pilots)))]

    # --- what may happen ---

    @rule(
        count=st.integers(1, 8),
        cores=st.integers(1, 4),
        memory=st.sampled_from([0, 10, 60]),
        network=st.sampled_from(["any", "wan", "host"]),
        priority=st.integers(-1, 1),
        retries=st.integers(0, 2),
        kind=st.sampled_from(["a", "b"]),
    )
    def submit(self, count, cores, memory, network, priority, retries, kind):
        first = len(self.tasks) + 1
        new = [NewTask(n, cores, memory, network, priority, retries, kind) for n in range(first, first + count)]
        self.tasks.update((task.id, task) for task in new)
        self.pending.append(Submitted(new))

    @rule(cores=st.integers(1, 6), memory=st.sampled_from([0, 50, 100]), wan=st.booleans())
    def pilot_ready(self, cores, memory, wan):
        self.pilots_made += 1
        ready = PilotReady(f"p{self.pilots_made}", cores, memory, wan)
        self.pilots[ready.pilot] = Pilot(ready)
        self.pending.append(ready)

    @precondition(lambda self: self.pilots)
    @rule(data=st.data())
    def pilot_drains(self, data):
        pilot = self.choose_pilot(data)
        self.pending.append(PilotDraining(pilot.ready.pilot))
        self.handle()
        pilot.draining = True

    @precondition(lambda self: self.pilots)
    @rule(data=st.data())
    def pilot_goes(self, data):
        pilot = self.choose_pilot(data)
        del self.pilots[pilot.ready.pilot]
        self.pending.append(PilotGone(pilot.ready.pilot, "gone"))

    @precondition(lambda self: any(pilot.held for pilot in self.pilots.values()))
    @rule(data=st.data())
    def tasks_start(self, data):
        pilot = self.choose_pilot(data)
        waiting = [number for number in pilot.held if number not in pilot.begun]
        begun = waiting[: data.draw(st.integers(0, len(waiting)))]
        pilot.begun.update(begun)
        self.pending.append(Started(pilot.ready.pilot, begun))

    @precondition(lambda self: any(pilot.held for pilot in self.pilots.values()))
    @rule(data=st.data(), outcome=OUTCOMES, seconds=st.sampled_from([0.0, 0.001, 0.1, 30.0]))
    def tasks_end(self, data, outcome, seconds):
        pilot = self.choose_pilot(data)
        ended = pilot.held[: data.draw(st.integers(0, len(pilot.held)))]
        pilot.held = pilot.held[len(ended) :]
        pilot.begun.difference_update(ended)
        self.pending.append(Ended(pilot.ready.pilot, [EndedTask(number, outcome, seconds) for number in ended]))

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
            self.scheduler.check()
            assert set(self.tasks) - set(self.finished) == set(self.scheduler.tasks)
            assert self.scheduler.finished.total() == len(self.finished)

    def teardown(self):
        self.handle()
        for name in list(self.pilots):
            self.pending.append(PilotGone(name))
            del self.pilots[name]
        self.pilots["last"] = Pilot(PilotReady("last", 8, 1000))
        self.pending.append(self.pilots["last"].ready)
        self.handle()
        last = self.pilots["last"]
        while last.held:
            ended, last.held = last.held, []
            self.pending.append(Ended("last", [EndedTask(number, "success", 0.01) for number in ended]))
            self.handle()
        self.scheduler.check()
        assert set(self.finished) == set(self.tasks), "every task finishes"
        assert not self.scheduler._demands
        again = Scheduler()
        assert [again.handle(events, now) for events, now, _ in self.log] == [commands for *_, commands in self.log]


SchedulerModel.TestCase.settings = settings(max_examples=75, stateful_step_count=40, deadline=None)
TestSchedulerModel = SchedulerModel.TestCase
