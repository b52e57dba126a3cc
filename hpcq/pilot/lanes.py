"""What the pilot's core works with: its commands, its lanes, and what is free. Pure, like `core`.

A lane's *kind* is all that must agree for a runner to take a task: the network it lives in, how tasks are isolated in
it, and what is fixed when an interpreter starts (threads of its libraries, devices it sees, the memory it may keep).

`Free` is the pilot's stock. Cores, memory and disk are amounts; CPUs and GPUs are things: whoever claims gets those
that nobody else has. A lane keeps its GPUs for life, since CUDA fixes them at first use; its CPUs may change.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from hpcq.messages import TaskResult, TaskSpec
from hpcq.pilot.doom import STRIKES, Doom

SHELL = "shell"
"""The isolation of lanes for commands: their runner executes no user's code itself, so nothing leaks into the next."""

_CHILDREN = frozenset({SHELL, "fork"})
"""Isolations where each task is a process of its own, which can be ended without its runner."""


class Kind(NamedTuple):
    """What a runner must be for a task; ``memory`` in MB, 0 where it makes no difference."""

    network: str
    isolation: str
    cores: int = 1
    memory: int = 0
    gpus: int = 0


def kind_of(task: TaskSpec) -> Kind:
    """The kind of lane a task needs; the network is ``host``, or ``any`` for inside the tunnel."""
    network = "host" if task.network == "host" else "any"
    if not task.function:
        return Kind(network, SHELL, task.cores, 0, task.gpus)
    memory = task.memory if task.isolation == "warm" else 0  # a task must not pay for what larger ones left behind
    return Kind(network, task.isolation, task.cores, memory, task.gpus)


class Start(msgspec.Struct, frozen=True):
    """Start a runner for this lane, which will see these ``gpus`` only."""

    lane: int
    kind: Kind
    gpus: tuple[str, ...] = ()


class Pin(msgspec.Struct, frozen=True):
    """Let the lane's runner use these CPUs only."""

    lane: int
    cpus: tuple[int, ...]


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


class End(msgspec.Struct, frozen=True):
    """Kill what the lane's runner has started and leave the runner; answered by `Core.children_ended`."""

    lane: int


class Report(msgspec.Struct, frozen=True):
    """Tell the manager; ``answers`` when it has asked and waits for ``returned``, be it empty.

    ``announce``: that tasks have begun can not wait for what comes next.
    """

    started: list[int]
    results: list[TaskResult]
    returned: list[int]
    answers: bool = False
    announce: bool = False


class Broken(msgspec.Struct, frozen=True):
    """Runners cannot start on this host."""

    message: str


Command = Start | Pin | Give | Recall | Kill | End | Report | Broken


class LaneState(enum.Enum):
    """Whether the runner has spoken yet."""

    STARTING = enum.auto()
    WARM = enum.auto()


class Lane:
    """One runner and what it was given; it takes nothing more when it is ``spent``, or was ``late`` to start.

    It is ``retired`` when what it has is the last it does: it is killed after that.
    """

    __slots__ = ("announced", "cpus", "doom", "expected", "gpus", "head_since", "kind", "late",
                 "number", "ready_by", "recalling", "retired", "spent", "state", "tasks")  # fmt: skip

    def __init__(self, number: int, kind: Kind, gpus: tuple[str, ...], now: float, ready_by: float) -> None:
        self.number = number
        self.kind = kind
        self.gpus = gpus
        self.cpus: tuple[int, ...] = ()
        self.state = LaneState.STARTING
        self.tasks: deque[TaskSpec] = deque()
        self.expected = 0.0
        self.head_since = now
        self.ready_by = ready_by
        self.announced = 0
        self.recalling = False
        self.spent = False
        self.late = False
        self.retired = False
        self.doom: Doom | None = None

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do and may get something."""
        return not self.tasks and not self.spent and not self.late and self.doom is None

    @property
    def has_children(self) -> bool:
        """Whether its task can be ended without its runner."""
        return self.kind.isolation in _CHILDREN and self.state is LaneState.WARM

    @property
    def recovering(self) -> bool:
        """Whether its task has just been ended: it is free in a moment, sooner than a new one would be."""
        return self.doom is not None and self.doom.struck and not self.tasks

    def kill(self) -> Kill:
        """End the doomed task with the whole lane."""
        assert self.doom is not None
        self.doom.killed = True
        self.doom.again_at = math.inf
        return Kill(self.number)

    def strike(self) -> Command | None:
        """End the doomed task alone, once nothing else can be hit: nothing is behind it, and nothing is given."""
        doom = self.doom
        if doom is None or doom.killed or doom.struck or self.recalling or self.pardon():
            return None
        if doom.strikes >= STRIKES:
            return self.kill()
        if len(self.tasks) > 1:  # the result of the first is on its way
            return None
        doom.struck = True
        doom.strikes += 1
        doom.again_at = math.inf
        return End(self.number)

    def pardon(self) -> bool:
        """Let the lane go on if the doomed task is no longer in it."""
        doom = self.doom
        if doom is not None and not doom.killed and all(task.id != doom.task for task in self.tasks):
            self.doom = None
        return self.doom is None


class Free:
    """What no lane claims. ``cpus`` has the CPUs of each core, or nothing when lanes are not pinned."""

    def __init__(
        self, cores: int, memory: int, disk: int, cpus: Sequence[tuple[int, ...]] = (), gpus: Sequence[str] = ()
    ) -> None:
        self.cores = cores
        self.memory = memory
        self.disk = disk
        self._cpus = list(cpus)
        self.cpus = set(cpus)
        self._gpus = list(gpus)
        self.gpus = set(gpus)

    def fits(self, task: TaskSpec) -> bool:
        """Whether there is enough for one more claim like this."""
        return (
            task.cores <= self.cores
            and task.memory <= self.memory
            and task.disk <= self.disk
            and task.gpus <= len(self.gpus)
        )

    def claim(self, task: TaskSpec, lane: Lane) -> bool:
        """Take what the task asks for on behalf of its lane; whether the lane has other CPUs now."""
        self.cores -= task.cores
        self.memory -= task.memory
        self.disk -= task.disk
        self.gpus.difference_update(lane.gpus)
        return bool(self._cpus) and self._claim_cpus(task.cores, lane)

    def _claim_cpus(self, cores: int, lane: Lane) -> bool:
        wanted = [core for core in self._cpus if set(core) <= set(lane.cpus)]
        same = bool(wanted) and self.cpus.issuperset(wanted)
        chosen = wanted if same else [core for core in self._cpus if core in self.cpus][:cores]
        self.cpus.difference_update(chosen)
        lane.cpus = tuple(cpu for core in chosen for cpu in core)
        return not same

    def give_back(self, task: TaskSpec, lane: Lane) -> None:
        """Undo `claim`."""
        self.cores += task.cores
        self.memory += task.memory
        self.disk += task.disk
        self.gpus.update(lane.gpus)
        self.cpus.update(core for core in self._cpus if set(core) <= set(lane.cpus))

    def devices(self, count: int, avoid: set[str]) -> tuple[str, ...]:
        """GPUs for a new lane, rather not those that an idle runner may hold."""
        able = [gpu for gpu in self._gpus if gpu in self.gpus]
        return tuple(sorted(able, key=lambda gpu: gpu in avoid)[:count])


def same_claim(one: TaskSpec, other: TaskSpec) -> bool:
    """Whether two tasks of one kind may follow each other under one claim."""
    return one.memory == other.memory and one.disk == other.disk
