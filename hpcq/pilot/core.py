"""Which runner gets which task: the pilot's pure state machine. Events and ``now`` in, commands out.

A *lane* is one runner process and the tasks given to it; it works them off in order, so the first that has not ended
is the one that runs. A lane with tasks holds the resources of one of them; all its tasks have the same needs::

    (new) --start--> STARTING --ready--> WARM --dead--> (gone)
                        +------dead before ready------> (gone; too often: `Broken`)

Short tasks are given ahead of time, up to `AHEAD` seconds of expected work, so that no turn of our loop lies between
two of them. Whatever a lane has not begun can be recalled: when its current task takes longer than expected, before it
is killed, or to be handed back to the manager.

Tasks are told to the manager as begun before the runner gets them (`Report` precedes `Give`), except those given ahead.
A killed lane is blamed on the task it was killed for; a task that had slipped in behind it is reported ``lost`` and so
runs again. May not live here: processes, sockets, clocks.
"""

from __future__ import annotations

import enum
import math
import signal
from collections import deque
from collections.abc import Iterable, Set

import msgspec

from hpcq.messages import TaskResult, TaskSpec
from hpcq.task import Outcome

AHEAD = 0.005
"""Seconds of expected work given to a lane in advance."""

AHEAD_LIMIT = 64
"""Tasks given in advance at most: what certainly fits into a socket's buffer."""

STUCK = 0.02
"""Seconds a task may keep those given behind it waiting before they are recalled."""

START_FAILURES = 3
"""Runners in a row that end before they are ready: then something is wrong with this host."""


START_TIMEOUT = 120.0
"""Seconds a runner has to get ready; a cold Python on a shared file system is slow, one that hangs is ended."""


class Start(msgspec.Struct, frozen=True):
    """Start a runner for this lane; ``network`` is ``host`` for one outside the tunnel."""

    lane: int
    network: str


class Give(msgspec.Struct, frozen=True):
    """Send the task to the lane's runner."""

    lane: int
    task: TaskSpec


class Recall(msgspec.Struct, frozen=True):
    """Take back what the runner has not read; answered by `Core.recalled`."""

    lane: int


class Kill(msgspec.Struct, frozen=True):
    """Kill the runner and everything it started; answered by `Core.dead`."""

    lane: int


class Report(msgspec.Struct, frozen=True):
    """Tell the manager; ``answers`` when it has asked and waits for ``returned``, be it empty."""

    started: list[int]
    results: list[TaskResult]
    returned: list[int]
    answers: bool = False


class Broken(msgspec.Struct, frozen=True):
    """Runners cannot start on this host."""

    message: str


Command = Start | Give | Recall | Kill | Report | Broken


class LaneState(enum.Enum):
    """Whether the runner has spoken yet."""

    STARTING = enum.auto()
    WARM = enum.auto()


class Lane:
    """One runner and what it was given."""

    __slots__ = ("announced", "doomed", "doomed_as", "doomed_why", "expected", "head_since", "late", "network",
                 "number", "ready_by", "recalling", "state", "tasks")  # fmt: skip

    def __init__(self, number: int, network: str, ready_by: float) -> None:
        self.number = number
        self.network = network
        self.ready_by = ready_by
        self.state = LaneState.STARTING
        self.tasks: deque[TaskSpec] = deque()
        self.expected = 0.0
        self.head_since = 0.0
        self.announced = 0
        self.recalling = False
        self.late = False
        self.doomed: int | None = None
        self.doomed_as = Outcome.CRASH
        self.doomed_why = ""


def network_of(task: TaskSpec) -> str:
    """Where a task's runner must live: ``host``, or ``any`` for inside the tunnel."""
    return "host" if task.network == "host" else "any"


class Core:
    """All lanes, what waits, what is free. ``memory`` in MB."""

    def __init__(self, cores: int, memory: int) -> None:
        self.cores = self.free_cores = cores
        self.memory = self.free_memory = memory
        self.lanes: dict[int, Lane] = {}
        self.waiting: dict[int, TaskSpec] = {}
        self.draining = False
        self._next_lane = 1
        self._failures = 0
        self._expected: dict[bytes, float] = {}
        self._where: dict[int, Lane] = {}
        self._to_cancel: set[int] = set()
        self._started: list[int] = []
        self._results: list[TaskResult] = []
        self._returned: list[int] = []
        self._orders: list[Command] = []

    # --- events ---

    def run(self, tasks: Iterable[TaskSpec], now: float) -> list[Command]:
        """The manager sent tasks."""
        if self.draining:
            self._returned.extend(task.id for task in tasks)
        else:
            self.waiting.update((task.id, task) for task in tasks)
        return self._commands(now)

    def retract(self, tasks: Iterable[int], now: float) -> list[Command]:
        """The manager wants these back if they have not begun; answered in any case."""
        given = [number for number in tasks if self.waiting.pop(number, None) is not None]
        commands = self._commands(now)
        return [*commands, Report([], [], given, answers=True)]

    def cancel(self, tasks: Iterable[int], now: float) -> list[Command]:
        """The manager wants these ended."""
        for number in tasks:
            lane = self._where.get(number)
            if self.waiting.pop(number, None) is not None:
                self._returned.append(number)
            elif lane is not None:
                self._to_cancel.add(number)
                self._recall(lane)
        return self._commands(now)

    def warm(self, lane_number: int, now: float) -> list[Command]:
        """A runner is ready."""
        self._failures = 0
        lane = self.lanes[lane_number]
        lane.state = LaneState.WARM
        lane.head_since = now
        return self._commands(now)

    def ended(self, lane_number: int, results: list[TaskResult], now: float) -> list[Command]:
        """A runner reports tasks as ended, in the order it had them."""
        lane = self.lanes[lane_number]
        for result in results:
            task = lane.tasks.popleft()
            assert task.id == result.id, f"lane {lane_number} ended {result.id} instead of {task.id}"
            self._leave(task)
            self._learn(task, result.seconds)
            self._results.append(result)
        lane.head_since = now
        return self._commands(now)

    def recalled(self, lane_number: int, tasks: set[int], now: float) -> list[Command]:
        """What a runner had not read yet; these wait again, first in line."""
        lane = self.lanes[lane_number]
        lane.recalling = False
        back = [task for task in lane.tasks if task.id in tasks]
        lane.tasks = deque(task for task in lane.tasks if task.id not in tasks)
        lane.expected = sum(self._expected.get(task.function, AHEAD) for task in lane.tasks)
        if back and not lane.tasks:
            self._release(back[0])
        self._requeue(back)
        self._finish_cancelling(lane)
        return self._commands(now)

    def dead(
        self, lane_number: int, status: int, output: tuple[bytes, bytes], now: float, unread: Set[int] = frozenset()
    ) -> list[Command]:
        """A runner ended with ``status`` (negative: a signal); ``output`` is what its last task wrote.

        What it had not read (``unread``) it had not begun, and is not to blame.
        """
        lane = self.lanes.pop(lane_number)
        if lane.tasks:
            self._release(lane.tasks[0])
        if lane.state is LaneState.STARTING and lane.doomed is None:
            self._failures += 1
            self._requeue(list(lane.tasks))
            if self._failures >= START_FAILURES:
                self._orders.append(Broken(_start_failure(status, output[1])))
                return self._commands(now, dispatch=False)
        elif lane.tasks and lane.tasks[0].id not in unread:
            self._bury(lane, status, output, now)
        else:
            self._requeue(list(lane.tasks))
        return self._commands(now)

    def time(self, now: float) -> list[Command]:
        """Deadlines may have passed."""
        for lane in self.lanes.values():
            if lane.state is LaneState.STARTING and now >= lane.ready_by:
                lane.ready_by = math.inf
                lane.late = True
                self._orders.append(Kill(lane.number))
            if not lane.tasks or lane.state is LaneState.STARTING:
                continue
            task = lane.tasks[0]
            if task.walltime and now >= lane.head_since + task.walltime:
                self._doom(lane, task.id, Outcome.WALLTIME, f"it ran longer than its walltime of {task.walltime:g} s")
            elif len(lane.tasks) > 1 and now >= lane.head_since + STUCK:
                self._recall(lane)
        return self._commands(now)

    def drain(self, now: float) -> list[Command]:
        """Take nothing new, hand back what has not begun."""
        self.draining = True
        self._returned.extend(self.waiting)
        self.waiting.clear()
        for lane in self.lanes.values():
            self._recall(lane)
        return self._commands(now)

    def abandon(self, why: str, now: float) -> list[Command]:
        """End everything now; what runs is reported ``lost``."""
        commands = self.drain(now)
        for lane in self.lanes.values():
            if lane.tasks:
                self._doom(lane, lane.tasks[0].id, Outcome.LOST, why)
        return commands + self._commands(now)

    # --- what the shell needs to know ---

    @property
    def busy(self) -> bool:
        """Whether any task is here."""
        return bool(self.waiting) or bool(self._where)

    def next_deadline(self) -> float | None:
        """When `time` should be called, or None."""
        times = []
        for lane in self.lanes.values():
            if lane.state is LaneState.STARTING and lane.ready_by < math.inf:
                times.append(lane.ready_by)
            if not lane.tasks or lane.state is LaneState.STARTING or lane.doomed is not None:
                continue
            if lane.tasks[0].walltime:
                times.append(lane.head_since + lane.tasks[0].walltime)
            if len(lane.tasks) > 1 and not lane.recalling:
                times.append(lane.head_since + STUCK)
        return min(times, default=None)

    # --- inside ---

    def _commands(self, now: float, dispatch: bool = True) -> list[Command]:
        if dispatch:
            self._dispatch(now)
        for lane in self.lanes.values():
            if lane.tasks and lane.announced != lane.tasks[0].id:
                lane.announced = lane.tasks[0].id
                self._started.append(lane.announced)
        orders, self._orders = self._orders, []
        if self._started or self._results or self._returned:
            orders.insert(0, Report(self._started, self._results, self._returned))
            self._started, self._results, self._returned = [], [], []
        return orders

    def _dispatch(self, now: float) -> None:
        while self.waiting:
            task = next(iter(self.waiting.values()))
            lane = self._lane_for(task, now)
            if lane is None:
                return
            del self.waiting[task.id]
            if not lane.tasks:
                self._claim(task)
                lane.head_since = now
                lane.expected = 0.0
            lane.tasks.append(task)
            lane.expected += self._expected.get(task.function, AHEAD)
            self._where[task.id] = lane
            self._orders.append(Give(lane.number, task))

    def _lane_for(self, task: TaskSpec, now: float) -> Lane | None:
        network = network_of(task)
        fits = task.cores <= self.free_cores and task.memory <= self.free_memory
        ahead: Lane | None = None
        for lane in self.lanes.values():
            if lane.network != network or lane.doomed is not None or lane.recalling or lane.late:
                continue
            if not lane.tasks:
                if fits:
                    return lane
            elif self._takes_ahead(lane, task, now) and (ahead is None or lane.expected < ahead.expected):
                ahead = lane
        return self._new_lane(network, now) if fits else ahead

    def _takes_ahead(self, lane: Lane, task: TaskSpec, now: float) -> bool:
        expected = self._expected.get(task.function)
        if expected is None or len(lane.tasks) >= AHEAD_LIMIT or lane.state is LaneState.STARTING:
            return False
        if now >= lane.head_since + STUCK:  # it would be recalled at once
            return False
        head = lane.tasks[0]
        return head.cores == task.cores and head.memory == task.memory and lane.expected + expected <= AHEAD

    def _new_lane(self, network: str, now: float) -> Lane:
        lane = Lane(self._next_lane, network, now + START_TIMEOUT)
        self._next_lane += 1
        self.lanes[lane.number] = lane
        self._orders.append(Start(lane.number, network))
        return lane

    def _claim(self, task: TaskSpec) -> None:
        self.free_cores -= task.cores
        self.free_memory -= task.memory

    def _release(self, task: TaskSpec) -> None:
        self.free_cores += task.cores
        self.free_memory += task.memory

    def _leave(self, task: TaskSpec) -> None:
        """A task is no longer in its lane; the lane's claim goes when it was the last."""
        lane = self._where.pop(task.id)
        self._to_cancel.discard(task.id)
        lane.expected -= self._expected.get(task.function, AHEAD)
        if not lane.tasks:
            self._release(task)

    def _learn(self, task: TaskSpec, seconds: float) -> None:
        known = self._expected.get(task.function)
        if known is None and len(self._expected) >= 10_000:
            self._expected.clear()  # functions made anew for each task: forget rather than grow
        self._expected[task.function] = seconds if known is None else known + 0.2 * (seconds - known)

    def _recall(self, lane: Lane) -> None:
        if lane.tasks and not lane.recalling:
            lane.recalling = True
            self._orders.append(Recall(lane.number))

    def _requeue(self, tasks: list[TaskSpec]) -> None:
        """Put unbegun tasks first in line, or hand them back when we drain or they are to be cancelled."""
        again = {}
        for task in tasks:
            del self._where[task.id]
            if self.draining or task.id in self._to_cancel:
                self._to_cancel.discard(task.id)
                self._returned.append(task.id)
            else:
                again[task.id] = task
        self.waiting = {**again, **self.waiting}

    def _finish_cancelling(self, lane: Lane) -> None:
        for task in lane.tasks:
            if task.id in self._to_cancel:
                self._doom(lane, task.id, Outcome.CANCELLED, "cancelled")
                return

    def _doom(self, lane: Lane, task: int, outcome: Outcome, why: str) -> None:
        if lane.doomed is None:
            self._recall(lane)
            lane.doomed, lane.doomed_as, lane.doomed_why = task, outcome, why
            self._orders.append(Kill(lane.number))

    def _bury(self, lane: Lane, status: int, output: tuple[bytes, bytes], now: float) -> None:
        victim = lane.tasks.popleft()
        del self._where[victim.id]
        self._to_cancel.discard(victim.id)
        self._requeue(list(lane.tasks))
        if lane.doomed is None:
            outcome, why = Outcome.CRASH, how_it_died(status)
        elif lane.doomed == victim.id:
            outcome, why = lane.doomed_as, lane.doomed_why
        else:
            outcome, why = Outcome.LOST, f"it was ended together with task {lane.doomed} before it"
        self._results.append(
            TaskResult(
                victim.id, outcome.value, b"", None, output[0], output[1], why, 0.0, max(0.0, now - lane.head_since)
            )
        )


def how_it_died(status: int) -> str:
    """A runner's end in words."""
    if status >= 0:
        return f"its process ended itself with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = "unknown"
    hint = "; the kernel does this when memory runs out" if -status == signal.SIGKILL else ""
    return f"its process was killed by signal {-status} ({name}){hint}"


def _start_failure(status: int, errors: bytes) -> str:
    lines = errors.decode(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"{START_FAILURES} runners in a row ended before they were ready ({how_it_died(status)}{last})"
