"""Any order of what runners and the manager do: every task leaves the pilot exactly once, no resource is used twice.

Runners are simulated as they are: a socket of unread messages, one task at hand, a stream of results on their way; they
read, finish and die at any moment, also while a recall or a kill is on its way to them.
"""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hpcq.messages import TaskResult, TaskSpec
from hpcq.pilot.choice import AHEAD_LIMIT, IDLE_LANES
from hpcq.pilot.core import Core
from hpcq.pilot.lanes import Broken, kind_of

NOTHING = (b"", b"")
CORES, MEMORY, DISK = 3, 100, 50
CPUS, GPUS = ((0, 1), (2, 3), (4, 5)), ("a", "b")


class Runner:
    """One simulated runner process."""

    def __init__(self, kind, gpus, tunnel):
        self.tunnel = tunnel
        self.kind = kind
        self.gpus = gpus
        self.cpus = ()
        self.done = False
        self.said_ready = False
        self.unread = deque()
        self.at_hand = None
        self.stream = deque()
        self.recalls = 0
        self.killed = False  # by order of the core
        self.dying = False  # of that, or with its tunnel, which the core need not know yet
        self.ends = 0

    @property
    def may_work(self):
        return self.said_ready and not self.dying and not self.done


class CoreModel(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.core = Core(CORES, MEMORY, DISK, CPUS, GPUS)
        self.now = 0.0
        self.runners = {}
        self.next_task = 1
        self.sent = set()
        self.begun = set()
        self.left = {}
        self.cancelled = set()
        self.broken = False
        self.wan = self.inside = True
        self.tunnel = 1
        self.answers = 0

    # --- the shell ---

    def perform(self, commands):
        for command in commands:
            getattr(self, f"do_{type(command).__name__.lower()}")(command)

    def do_start(self, command):
        assert command.lane not in self.runners
        self.runners[command.lane] = Runner(command.kind, command.gpus, self.tunnel)
        assert command.kind.network == "host" or self.inside
        assert len(command.gpus) == command.kind.gpus

    def do_pin(self, command):
        self.runners[command.lane].cpus = command.cpus

    def do_give(self, command):
        runner = self.runners[command.lane]
        assert not runner.dying
        assert not runner.ends, "what is being ended may hit it"
        assert kind_of(command.task) == runner.kind
        assert len(runner.cpus) == 2 * command.task.cores
        assert not runner.done
        assert runner.kind.isolation != "fresh" or (runner.at_hand is None and not runner.unread)
        assert not self.core.draining
        assert command.task.network == "host" or self.inside
        assert command.task.network != "wan" or self.wan
        assert runner.kind.network == "host" or runner.tunnel == self.tunnel
        runner.unread.append(command.task)
        assert len(runner.unread) <= AHEAD_LIMIT

    def do_recall(self, command):
        self.runners[command.lane].recalls += 1
        assert self.runners[command.lane].recalls == 1, "asked again before it answered"

    def do_kill(self, command):
        runner = self.runners[command.lane]
        runner.killed = runner.dying = True

    def do_end(self, command):
        runner = self.runners[command.lane]
        assert runner.kind.isolation in ("fork", "shell")
        assert not runner.unread, "it might be hit instead"
        assert not runner.killed
        runner.ends += 1
        assert runner.ends == 1, "ordered again before it was done"

    def do_report(self, command):
        for number in command.started:
            assert number in self.sent - set(self.left)
            self.begun.add(number)
        for result in command.results:
            self.leave(result.id, result.outcome)
        for number in command.returned:
            self.leave(number, "returned")
        self.answers += command.answers

    def do_broken(self, command):
        assert isinstance(command, Broken)
        self.broken = True

    def leave(self, number, how):
        assert number in self.sent
        assert number not in self.left, f"task {number} left twice: {self.left[number]}, {how}"
        self.left[number] = how
        if how == "cancelled":
            assert number in self.cancelled

    def choose(self, data, able):
        lane = data.draw(st.sampled_from(sorted(lane for lane, runner in self.runners.items() if able(runner))))
        return lane, self.runners[lane]

    def some(self, able):
        return any(map(able, self.runners.values()))

    # --- the manager ---

    @rule(
        count=st.integers(1, 6),
        cores=st.integers(1, CORES),
        memory=st.sampled_from([0, 40, MEMORY]),
        walltime=st.sampled_from([0.0, 0.0, 1.0]),
        network=st.sampled_from(["any", "any", "wan", "host"]),
        function=st.sampled_from([b"short", b"long", b""]),
        disk=st.sampled_from([0, 0, 30]),
        gpus=st.sampled_from([0, 0, 1, 2]),
        isolation=st.sampled_from(["warm", "fork", "fresh"]),
    )
    def run_tasks(self, count, cores, memory, walltime, network, function, disk, gpus, isolation):
        numbers = range(self.next_task, self.next_task + count)
        self.next_task += count
        self.sent.update(numbers)
        tasks = [
            TaskSpec(number, function, b"", cores, memory, walltime, network, None, disk, gpus, isolation)
            for number in numbers
        ]
        self.perform(self.core.run(tasks, self.now))

    @precondition(lambda self: self.wan)
    @rule(inside=st.booleans())
    def tunnel_breaks(self, inside):
        self.wan, self.inside = False, inside
        self.perform(self.core.tunnel_down("a test", self.now, inside=inside))
        if not inside:
            for runner in self.runners.values():
                runner.dying = runner.dying or runner.kind.network != "host"

    @precondition(lambda self: not self.wan)
    @rule()
    def tunnel_is_back(self):
        self.wan = self.inside = True
        self.tunnel += 1
        self.perform(self.core.tunnel_up(self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.sent)), max_size=3))
        self.cancelled.update(chosen)
        self.perform(self.core.cancel(chosen, self.now))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def retract(self, data):
        before = self.answers
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.sent)), max_size=3))
        self.perform(self.core.retract(chosen, self.now))
        assert self.answers == before + 1

    # --- runners ---

    @precondition(lambda self: self.some(lambda r: not r.said_ready))
    @rule(data=st.data())
    def runner_gets_ready(self, data):
        lane, runner = self.choose(data, lambda r: not r.said_ready)
        runner.said_ready = True
        self.perform(self.core.warm(lane, self.now))

    @precondition(lambda self: self.some(lambda r: r.may_work and r.at_hand is None and r.unread))
    @rule(data=st.data())
    def runner_reads(self, data):
        _, runner = self.choose(data, lambda r: r.may_work and r.at_hand is None and r.unread)
        runner.at_hand = runner.unread.popleft()

    @precondition(lambda self: self.some(lambda r: r.may_work and r.at_hand))
    @rule(data=st.data())
    def runner_finishes(self, data):
        _, runner = self.choose(data, lambda r: r.may_work and r.at_hand)
        seconds = 1e-5 if runner.at_hand.function == b"short" else 5.0
        runner.stream.append(TaskResult(runner.at_hand.id, "success", seconds=seconds))
        runner.at_hand = None
        runner.done = runner.kind.isolation == "fresh"

    @precondition(lambda self: self.some(lambda r: r.at_hand))
    @rule(data=st.data())
    def task_uses_too_much(self, data):
        lane, runner = self.choose(data, lambda r: r.at_hand)
        self.perform(self.core.exceeded(lane, runner.at_hand.id, "too much", self.now))

    @precondition(lambda self: self.some(lambda r: r.said_ready and r.at_hand is None and not r.dying))
    @rule(data=st.data())
    def runner_leaves_between_tasks(self, data):
        self.end_runner(*self.choose(data, lambda r: r.said_ready and r.at_hand is None and not r.dying), 0)

    @precondition(lambda self: self.some(lambda r: r.stream))
    @rule(data=st.data())
    def results_arrive(self, data):
        lane, runner = self.choose(data, lambda r: r.stream)
        count = data.draw(st.integers(1, len(runner.stream)))
        self.perform(self.core.ended(lane, [runner.stream.popleft() for _ in range(count)], self.now))

    @precondition(lambda self: self.some(lambda r: r.recalls))
    @rule(data=st.data(), before=st.integers(0, 3))
    def recall_happens(self, data, before):
        lane, runner = self.choose(data, lambda r: r.recalls)
        self.recall(lane, runner, before)

    def recall(self, lane, runner, before=0):
        """Take what is unread, one by one; the runner may get one in between, ``before`` of them having been taken."""
        runner.recalls = 0
        back = {runner.unread.popleft().id for _ in range(min(before, len(runner.unread)))}
        if back and runner.unread and runner.may_work and runner.at_hand is None:
            runner.at_hand = runner.unread.popleft()
        back |= {task.id for task in runner.unread}
        runner.unread.clear()
        self.perform(self.core.recalled(lane, back, self.now))

    @precondition(lambda self: self.some(lambda r: r.ends))
    @rule(data=st.data(), there=st.booleans())
    def children_are_ended(self, data, there):
        """The process of the task is killed, if it is there already."""
        lane, runner = self.choose(data, lambda r: r.ends)
        self.end_children(lane, runner, there)

    def end_children(self, lane, runner, there=True):
        if there and runner.at_hand is not None:
            assert self.core.lanes[lane].doom.task == runner.at_hand.id, "only what is doomed is hit"
            runner.stream.append(TaskResult(runner.at_hand.id, "crash"))
            runner.at_hand = None
        runner.ends = 0
        self.perform(self.core.children_ended(lane, self.now))

    @precondition(lambda self: self.some(lambda r: r.dying))
    @rule(data=st.data())
    def killed_runner_ends(self, data):
        self.end_runner(*self.choose(data, lambda r: r.dying), -9)

    @precondition(lambda self: self.runners and not self.broken)
    @rule(data=st.data(), status=st.sampled_from([0, 1, -11]))
    def runner_dies(self, data, status):
        self.end_runner(*self.choose(data, lambda r: True), status)

    def end_runner(self, lane, runner, status):
        while runner.stream:
            self.perform(self.core.ended(lane, [runner.stream.popleft()], self.now))
        at_hand = runner.at_hand
        del self.runners[lane]
        self.perform(self.core.dead(lane, status, NOTHING, self.now, {task.id for task in runner.unread}))
        if at_hand is not None:
            assert at_hand.id in self.left, "what the dead runner was doing is settled at once"
            assert self.left[at_hand.id] in ("crash", "walltime", "cancelled", "lost", "resources", "network")
            assert self.left[at_hand.id] != "network" or runner.kind.network != "host"

    # --- time and ends ---

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.05, 2.0, 130.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.perform(self.core.time(self.now))
        deadline = self.core.next_deadline()
        assert deadline is None or deadline > self.now, "a deadline that has been handled must not come again"

    @precondition(lambda self: not self.core.draining)
    @rule(chance=st.integers(0, 9))
    def drain(self, chance):
        if not chance or self.broken:
            self.perform(self.core.drain(self.now))

    @rule(chance=st.integers(0, 19))
    def abandon(self, chance):
        if not chance:
            self.perform(self.core.abandon("its pilot ended", self.now))

    # --- what must hold ---

    @invariant()
    def nothing_is_used_twice(self):
        core = self.core
        heads = [lane.tasks[0] for lane in core.lanes.values() if lane.tasks]
        free = core.free
        assert free.cores == CORES - sum(head.cores for head in heads) >= 0
        assert free.memory == MEMORY - sum(head.memory for head in heads) >= 0
        assert free.disk == DISK - sum(head.disk for head in heads) >= 0
        assert len(free.gpus) == len(GPUS) - sum(head.gpus for head in heads)
        assert len(free.cpus) == free.cores
        busy = [runner for runner in self.runners.values() if runner.at_hand is not None]
        at_hand = [runner.at_hand for runner in busy]
        assert sum(task.cores for task in at_hand) <= CORES
        assert sum(task.memory for task in at_hand) <= MEMORY
        assert sum(task.disk for task in at_hand) <= DISK
        for things in ([gpu for r in busy for gpu in r.gpus], [cpu for r in busy for cpu in r.cpus]):
            assert len(things) == len(set(things)), "two tasks have the same"

    @invariant()
    def idle_runners_are_few(self):
        assert sum(lane.idle for lane in self.core.lanes.values()) <= 2 * CORES + IDLE_LANES

    @invariant()
    def every_task_is_somewhere(self):
        inside = set(self.core.waiting) | {task.id for lane in self.core.lanes.values() for task in lane.tasks}
        assert inside == self.sent - set(self.left)
        assert self.core.busy == bool(inside)
        assert set(self.core.lanes) == set(self.runners)

    @invariant()
    def doomed_lanes_end_or_go_on(self):
        """A task to be ended is killed, is being struck, or will be; or what its end waits for is on its way."""
        for number, lane in self.core.lanes.items():
            doom, runner = lane.doom, self.runners[number]
            if doom is not None and not (doom.killed or runner.ends or runner.recalls or runner.stream):
                assert doom.again_at < float("inf")

    @invariant()
    def heads_were_announced(self):
        for runner in self.runners.values():
            if runner.at_hand is not None and not any(runner.stream):
                assert runner.at_hand.id in self.begun

    def teardown(self):
        self.perform(self.core.drain(self.now))
        for _ in range(10_000):
            if not self.core.busy:
                break
            for lane, runner in list(self.runners.items()):
                if runner.recalls:
                    self.recall(lane, runner)
                if runner.ends:
                    self.end_children(lane, runner)
                if runner.dying or runner.done:
                    self.end_runner(lane, runner, -9 if runner.dying else 0)
                    continue
                if not runner.said_ready:
                    runner.said_ready = True
                    self.perform(self.core.warm(lane, self.now))
                if runner.at_hand is not None:
                    runner.stream.append(TaskResult(runner.at_hand.id, "success"))
                    runner.at_hand = None
                    runner.done = runner.kind.isolation == "fresh"
                elif runner.unread:
                    runner.at_hand = runner.unread.popleft()
                while runner.stream:
                    self.perform(self.core.ended(lane, [runner.stream.popleft()], self.now))
        assert not self.core.busy, "draining comes to an end"
        assert set(self.left) == self.sent
        free = self.core.free
        assert (free.cores, free.memory, free.disk) == (CORES, MEMORY, DISK)
        assert (free.gpus, free.cpus) == (set(GPUS), set(CPUS))


CoreModel.TestCase.settings = settings(max_examples=75, stateful_step_count=50, deadline=None)
TestCoreModel = CoreModel.TestCase
