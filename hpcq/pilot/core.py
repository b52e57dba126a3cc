"""Which runner gets which task: the pilot's pure state machine. Events and ``now`` in, commands out.

A *lane* is one runner process and the tasks given to it; it works them off in order, so the first that has not ended
is the one that runs. A lane with tasks holds the resources of one of them; all its tasks have the same needs::

    (new) --start--> STARTING --ready--> WARM --dead--> (gone)
                        +------dead before ready------> (gone; too often: `Broken`)

Short tasks are given ahead of time, up to `AHEAD` seconds of expected work, so that no turn of our loop lies between
two of them. Whatever a lane has not begun can be recalled: when its current task takes longer than expected, before it
is killed, or to be handed back to the manager.

Tasks are told to the manager as begun before the runner gets them (`Report` precedes `Give`), except those given ahead.
A task that is a process of its own is ended without its lane; else the lane is killed, and blamed on the task it was
killed for; a task that had slipped in behind it is reported ``lost`` and so
runs again. A lane of `fresh` tasks takes one and is spent; one is started ahead, to be ready for the next. Idle lanes
are ended when there are too many, or when a new one needs their GPU. A runner may end by itself between two tasks: what
it has not read waits again. While the tunnel is down, tasks that need it are handed back and those that ran end as
``network``; when it is back, lanes that live in the new one take over and the old ones retire.
May not live here: processes, sockets, clocks.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence, Set

from msgspec import structs

from hpcq.messages import TaskResult, TaskSpec
from hpcq.outcome import Outcome
from hpcq.pilot.choice import STUCK, Choice
from hpcq.pilot.deaths import CODES_FROM_OUTSIDE, ENDED_FROM_OUTSIDE, START_FAILURES, how_it_died, start_failure
from hpcq.pilot.doom import STRIKE_AGAIN, Doom
from hpcq.pilot.lanes import (
    Broken,
    Command,
    Give,
    Kill,
    Lane,
    LaneState,
    Pin,
    Recall,
    Report,
)
from hpcq.pilot.usage import NOTHING_USED, Used

FAILED = frozenset({Outcome.EXCEPTION, Outcome.EXIT_CODE, Outcome.CRASH})
"""Ends that a task without the network it needs may come to by itself."""


class Core:
    """All lanes, what waits, what is free.

    ``memory`` and ``disk`` in MB; ``cpus`` are the CPUs of each core, if lanes are to be pinned; ``gpus`` device names.
    """

    def __init__(
        self, cores: int, memory: int, disk: int = 0, cpus: Sequence[tuple[int, ...]] = (), gpus: Sequence[str] = ()
    ) -> None:
        self.cores = cores
        self.memory = memory
        self.has_gpus = bool(gpus)
        self._choice = Choice(cores, memory, disk, cpus, gpus)
        self.free, self.lanes = self._choice.free, self._choice.lanes
        self._durations, self._orders = self._choice.durations, self._choice.orders
        self.waiting: OrderedDict[int, TaskSpec] = OrderedDict()  # its first is found at once, however many were before
        self.draining = False
        self.job_ends = ""
        """Why tasks may die that are not to blame for it: the batch system ends our job and signals them too."""
        self.wan = True
        self.suspects: set[int] = set()
        """Tasks that needed the tunnel and failed by themselves: who reports them asks whether it leads anywhere."""
        self.inside = True
        self._failures = 0
        self._where: dict[int, Lane] = {}
        self._to_cancel: set[int] = set()
        self._started: list[int] = []
        self._results: list[TaskResult] = []
        self._returned: list[int] = []

    # --- events ---

    def run(self, tasks: Iterable[TaskSpec], now: float) -> list[Command]:
        """The manager sent tasks."""
        if self.draining or not self.wan:
            self._returned.extend(task.id for task in tasks if not self._takes(task))
            tasks = filter(self._takes, tasks)
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
            if lane.doom is not None:
                lane.doom.attribute(result, now - lane.head_since)
            self._leave(task)
            self._durations.learn(task, result.seconds)
            lane.spent = lane.spent or lane.kind.isolation == "fresh"
            self._conclude(task, self.excused(result))
        lane.head_since = now
        self._strike(lane)
        self._retire_further(lane)
        return self._commands(now)

    def recalled(self, lane_number: int, tasks: set[int], now: float) -> list[Command]:
        """What a runner had not read yet; these wait again, first in line."""
        lane = self.lanes[lane_number]
        lane.recalling = False
        back = [task for task in lane.tasks if task.id in tasks]
        lane.tasks = deque(task for task in lane.tasks if task.id not in tasks)
        lane.expected = sum(map(self._durations.guess, lane.tasks))
        if back and not lane.tasks:
            self.free.give_back(back[0], lane)
        self._requeue(back)
        self._retire_further(lane)
        self._finish_cancelling(lane)
        self._strike(lane)
        return self._commands(now)

    def children_ended(self, lane_number: int, now: float) -> list[Command]:
        """What a runner had started when `End` was ordered is dead."""
        lane = self.lanes.get(lane_number)
        if lane is not None and lane.doom is not None:
            lane.doom.struck = False
            lane.doom.again_at = now + STRIKE_AGAIN
            lane.pardon()
        return self._commands(now)

    def dead(
        self,
        lane_number: int,
        status: int,
        output: tuple[bytes, bytes],
        now: float,
        unread: Set[int] = frozenset(),
        *,
        used: Used = NOTHING_USED,
    ) -> list[Command]:
        """A runner ended with ``status`` (negative: a signal); ``output`` and ``used`` are its last task's.

        What it had not read (``unread``) it had not begun, and is not to blame.
        """
        lane = self.lanes.pop(lane_number)
        if lane.tasks:
            self.free.give_back(lane.tasks[0], lane)
        if lane.state is LaneState.STARTING and lane.doom is None and not lane.spent:
            self._failures += 1
            self._requeue(list(lane.tasks))
            if self._failures >= START_FAILURES:
                self._orders.append(Broken(start_failure(status, output[1])))
                return self._commands(now, dispatch=False)
        elif lane.tasks and lane.tasks[0].id not in unread:
            self._bury(lane, status, output, now, used)
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
            if lane.doom is not None and now >= lane.doom.again_at:
                self._strike(lane)
            task = lane.tasks[0]
            if task.walltime and now >= lane.head_since + task.walltime:
                self._doom(lane, task.id, Outcome.WALLTIME, f"it ran longer than its walltime of {task.walltime:g} s")
            elif len(lane.tasks) > 1 and now >= lane.head_since + STUCK:
                self._recall(lane)
        return self._commands(now)

    def exceeded(self, lane_number: int, task: int, why: str, now: float) -> list[Command]:
        """A task was seen to use more than it asked for; it may have ended since."""
        lane = self.lanes.get(lane_number)
        if lane is not None and lane.tasks and lane.tasks[0].id == task:
            self._doom(lane, task, Outcome.RESOURCES, why)
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

    def tunnel_down(self, why: str, now: float, *, inside: bool = True) -> list[Command]:
        """The tunnel broke. Unless ``inside``, all that ran in it is dying, and nothing can be started there."""
        self.wan, self.inside = False, inside
        back = [number for number, task in self.waiting.items() if not self._takes(task)]
        self._returned.extend(back)
        for number in back:
            del self.waiting[number]
        for lane in self.lanes.values():
            if lane.kind.network == "host":
                continue
            lane.spent = lane.spent or not inside
            if lane.tasks and not self._takes(lane.tasks[0]):
                self._doom(lane, lane.tasks[0].id, Outcome.NETWORK, f"the tunnel was down: {why}")
            elif not all(map(self._takes, lane.tasks)):
                self._recall(lane)
        return self._commands(now)

    def tunnel_up(self, now: float) -> list[Command]:
        """There is a new tunnel: what begins from now on does so in there."""
        self.wan = self.inside = True
        for lane in self.lanes.values():
            if lane.kind.network != "host":
                lane.spent = lane.retired = True
                self._retire_further(lane)
        return self._commands(now)

    # --- what the shell needs to know ---

    @property
    def busy(self) -> bool:
        """Whether any task is here."""
        return bool(self.waiting) or bool(self._where)

    def may_be_the_jobs_end(self, lane_number: int, status: int) -> bool:
        """Whether a runner that ended with ``status`` was, for all we know, ended from outside."""
        return status in ENDED_FROM_OUTSIDE and self.lanes[lane_number].doom is None and not self.job_ends

    def head(self, lane_number: int) -> TaskSpec | None:
        """The task at a lane's runner, if any."""
        lane = self.lanes[lane_number]
        return lane.tasks[0] if lane.tasks else None

    def busy_for(self, lane_number: int) -> float:
        """Seconds of work it is expected to have after its current task; 0 when it may need us any moment."""
        lane = self.lanes.get(lane_number)
        if lane is None or len(lane.tasks) < 2 or lane.recalling or lane.doom is not None:
            return 0.0
        return lane.expected - self._durations.guess(lane.tasks[0])

    def at_work(self, since: float) -> list[tuple[Lane, TaskSpec]]:
        """Lanes whose task has run at least since then, and the task."""
        return [
            (lane, lane.tasks[0])
            for lane in self.lanes.values()
            if lane.tasks and lane.state is LaneState.WARM and lane.doom is None and lane.head_since <= since
        ]

    def next_deadline(self) -> float | None:
        """When `time` should be called, or None."""
        times = []
        for lane in self.lanes.values():
            if lane.state is LaneState.STARTING:
                times.append(lane.ready_by)
            if lane.doom is not None and not lane.doom.struck:
                times.append(lane.doom.again_at)
            if not lane.tasks or lane.state is LaneState.STARTING or lane.doom is not None:
                continue
            if lane.tasks[0].walltime:
                times.append(lane.head_since + lane.tasks[0].walltime)
            if len(lane.tasks) > 1 and not lane.recalling:
                times.append(lane.head_since + STUCK)
        return min((time for time in times if time < math.inf), default=None)

    # --- inside ---

    def _commands(self, now: float, dispatch: bool = True) -> list[Command]:
        if dispatch:
            self._dispatch(now)
        announce = False
        for lane in self.lanes.values():
            if lane.tasks and lane.announced != lane.tasks[0].id:
                lane.announced = lane.tasks[0].id
                announce = announce or lane.tasks[0].announce
                self._started.append(lane.announced)
        orders = self._orders.copy()
        self._orders.clear()
        if self._started or self._results or self._returned:
            orders.insert(0, Report(self._started, self._results, self._returned, announce=announce))
            self._started, self._results, self._returned = [], [], []
        return orders

    def _dispatch(self, now: float) -> None:
        while self.waiting:
            task = next(iter(self.waiting.values()))
            lane = self._choice.lane_for(task, now)
            if lane is None:
                return
            del self.waiting[task.id]
            if not lane.tasks:
                if self.free.claim(task, lane):
                    self._orders.append(Pin(lane.number, lane.cpus))
                lane.head_since = now
                lane.expected = 0.0
            lane.tasks.append(task)
            lane.expected += self._durations.guess(task)
            self._where[task.id] = lane
            self._orders.append(Give(lane.number, task))
            if lane.kind.isolation == "fresh":
                self._choice.start_ahead(lane.kind, now)

    def _leave(self, task: TaskSpec) -> None:
        """A task is no longer in its lane; the lane's claim goes when it was the last."""
        lane = self._where.pop(task.id)
        self._to_cancel.discard(task.id)
        lane.expected -= self._durations.guess(task)
        if not lane.tasks:
            self.free.give_back(task, lane)

    def _takes(self, task: TaskSpec) -> bool:
        """Whether such a task may begin here at present."""
        if self.draining:
            return False
        return task.network == "host" or (self.wan if task.network == "wan" else self.inside)

    def _retire_further(self, lane: Lane) -> None:
        """A retired lane ends its task, gives back the others, and is killed."""
        if not lane.retired:
            return
        if len(lane.tasks) > 1:
            self._recall(lane)
        elif not lane.tasks or lane.state is LaneState.STARTING:
            lane.retired = False
            self._orders.append(Kill(lane.number))

    def _recall(self, lane: Lane) -> None:
        if lane.tasks and not lane.recalling:
            lane.recalling = True
            self._orders.append(Recall(lane.number))

    def _requeue(self, tasks: list[TaskSpec]) -> None:
        """Put unbegun tasks first in line, or hand them back when we drain or they are to be cancelled."""
        again = []
        for task in tasks:
            del self._where[task.id]
            if task.id in self._to_cancel or not self._takes(task):
                self._to_cancel.discard(task.id)
                self._returned.append(task.id)
            else:
                again.append(task)
        for task in reversed(again):
            self.waiting[task.id] = task
            self.waiting.move_to_end(task.id, last=False)

    def _conclude(self, task: TaskSpec, result: TaskResult) -> None:
        """A task has ended by itself, perhaps for want of the network."""
        if task.network == "wan" and result.outcome in FAILED:
            if self.wan:
                self.suspects.add(task.id)
            else:
                message = "the tunnel was down while it ran"
                result = structs.replace(result, outcome=Outcome.NETWORK.value, message=message)
        self._results.append(result)

    def excused(self, result: TaskResult) -> TaskResult:
        """What the batch system ended with our job, a command or a fork, is lost, so that it runs again."""
        if not self.job_ends:  # as for nearly all results: no more is looked at
            return result
        ended = result.outcome == Outcome.EXIT_CODE.value and result.exit_code in CODES_FROM_OUTSIDE
        if not (ended or result.outcome == Outcome.CRASH.value):
            return result
        return structs.replace(result, outcome=Outcome.LOST.value, message=self.job_ends)

    def _finish_cancelling(self, lane: Lane) -> None:
        for task in lane.tasks:
            if task.id in self._to_cancel:
                self._doom(lane, task.id, Outcome.CANCELLED, "cancelled")
                return

    def _doom(self, lane: Lane, task: int, outcome: Outcome, why: str) -> None:
        if lane.doom is None:
            self._recall(lane)
            lane.doom = Doom(task, outcome, why)
            if not lane.has_children:
                self._orders.append(lane.kill())

    def _strike(self, lane: Lane) -> None:
        order = lane.strike()
        if order is not None:
            self._orders.append(order)

    def _bury(self, lane: Lane, status: int, output: tuple[bytes, bytes], now: float, used: Used) -> None:
        victim = lane.tasks.popleft()
        del self._where[victim.id]
        self._to_cancel.discard(victim.id)
        self._requeue(list(lane.tasks))
        outcome, why = Outcome.CRASH, how_it_died(status)
        if lane.doom is not None:
            outcome, why = lane.doom.sentence(victim.id)
        elif self.job_ends and status in ENDED_FROM_OUTSIDE:
            outcome, why = Outcome.LOST, self.job_ends
        seconds = max(0.0, now - lane.head_since)
        result = TaskResult(victim.id, outcome.value, b"", None, output[0], output[1], why, 0.0, seconds, 0, *used)
        self._conclude(victim, result)
