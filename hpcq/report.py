"""From a journal's run to what ``hpcq report`` tells: what was done, how long it took, what went wrong. Pure.

Times are in seconds. A task's *wait* is from its submission to the start of its last attempt, its *wall* that attempt's
time; clocks of hosts differ, so a negative wait counts as none. *Used* is the part of the pilots' cores, from their
arrival to their end, that the last attempts of tasks had.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from hpcq.journal import PilotRow, Run, TaskRow
from hpcq.outcome import Outcome
from hpcq.units import sum_known

FAILURES = 20
"""Kinds of failures that are told."""


class Group(msgspec.Struct, frozen=True):
    """Tasks of one kind, or of one host. ``memory`` is the most of any, in MB; ``cpu`` is CPU time in parts of the time
    that their cores were theirs; ``sent`` and ``received`` are bytes through the tunnel, of those for which they were
    counted.
    """

    name: str
    tasks: int
    failed: int
    wait: float | None
    wall: float | None
    longest: float | None
    cpu: float | None
    memory: float
    sent: int | None
    received: int | None


class Failure(msgspec.Struct, frozen=True):
    """Tasks that ended in the same way with the same words; ``first`` is one of them, ``hosts`` where, at most five."""

    outcome: str
    message: str
    tasks: int
    first: int
    tag: str | None
    hosts: list[str]


class Report(msgspec.Struct, frozen=True):
    """What is told of a run. ``used`` is None without pilots. ``sent`` and ``received`` are bytes through the pilots'
    tunnels, None where none were counted.
    """

    run: int
    began: float
    ended: float | None
    seconds: float
    hostname: str
    pid: int
    submitted: int
    outcomes: dict[str, int]
    repeated: int
    rate: float
    core_hours: float
    used: float | None
    sent: int | None
    received: int | None
    pilots: dict[str, int]
    kinds: list[Group]
    hosts: list[Group]
    failures: list[Failure]
    failed_pilots: list[dict[str, Any]]


def summarize(run: Run) -> Report:
    """The report of a run."""
    seconds = max((run.ended or run.seen) - run.began, 0.0)
    core_seconds = sum(max(_last_seen(pilot, run) - pilot.came, 0.0) * pilot.cores for pilot in run.pilots)
    busy = sum(_wall(task) * task.cores for task in run.tasks)
    outcomes = Counter(task.outcome for task in run.tasks)
    failed = [pilot for pilot in run.pilots if pilot.state == "failed"]
    return Report(
        run=run.id,
        began=run.began,
        ended=run.ended,
        seconds=seconds,
        hostname=run.hostname,
        pid=run.pid,
        submitted=max(run.submitted, len(run.tasks)),
        outcomes=dict(outcomes.most_common()),
        repeated=sum(task.attempts > 1 for task in run.tasks),
        rate=len(run.tasks) / seconds if seconds else 0.0,
        core_hours=core_seconds / 3600,
        used=min(1.0, busy / core_seconds) if core_seconds else None,
        sent=sum_known(pilot.sent for pilot in run.pilots),
        received=sum_known(pilot.received for pilot in run.pilots),
        pilots=dict(Counter(pilot.state for pilot in run.pilots).most_common()),
        kinds=_groups(run.tasks, lambda task: task.kind),
        hosts=_groups(run.tasks, lambda task: task.hostname or ""),
        failures=_failures(run.tasks),
        failed_pilots=[_told(pilot) for pilot in failed],
    )


def _last_seen(pilot: PilotRow, run: Run) -> float:
    """Pilots are looked at now and then: one that had not ended was there as long as the program was."""
    return pilot.seen if pilot.state in ("gone", "failed") else max(pilot.seen, run.seen)


def _wall(task: TaskRow) -> float:
    return 0.0 if task.started is None or task.finished is None else max(task.finished - task.started, 0.0)


def _is_well(task: TaskRow) -> bool:
    return task.outcome in (Outcome.SUCCESS.value, Outcome.CANCELLED.value)


def _groups(tasks: Iterable[TaskRow], key: Callable[[TaskRow], str]) -> list[Group]:
    """The tasks by ``key``, those that took most time first."""
    groups: dict[str, list[TaskRow]] = defaultdict(list)
    for task in tasks:
        if key(task):
            groups[key(task)].append(task)
    order = sorted(groups, key=lambda name: (-sum(map(_wall, groups[name])), name))
    return [_group(name, groups[name]) for name in order]


def _group(name: str, tasks: Sequence[TaskRow]) -> Group:
    ran = [task for task in tasks if task.started is not None]
    walls = [_wall(task) for task in ran]
    waits = [max(task.started - task.submitted, 0.0) for task in ran if task.started and task.submitted]
    held = sum(_wall(task) * task.cores for task in ran)
    return Group(
        name=name,
        tasks=len(tasks),
        failed=sum(not _is_well(task) for task in tasks),
        wait=statistics.median(waits) if waits else None,
        wall=statistics.median(walls) if walls else None,
        longest=max(walls, default=None),
        cpu=sum(task.cpu for task in ran) / held if held else None,
        memory=max((task.memory for task in ran), default=0.0),
        sent=sum_known(task.sent for task in ran),
        received=sum_known(task.received for task in ran),
    )


def _failures(tasks: Iterable[TaskRow]) -> list[Failure]:
    groups: dict[tuple[str, str], list[TaskRow]] = defaultdict(list)
    for task in tasks:
        if not _is_well(task):
            words = task.message or ("" if task.exit_code is None else f"exit status {task.exit_code}")
            groups[task.outcome, words.partition("\n")[0]].append(task)
    order = sorted(groups, key=lambda how: (-len(groups[how]), how))[:FAILURES]
    return [_failure(*how, groups[how]) for how in order]


def _failure(outcome: str, message: str, tasks: Sequence[TaskRow]) -> Failure:
    hosts = Counter(task.hostname for task in tasks if task.hostname)
    first = tasks[0]
    return Failure(outcome, message, len(tasks), first.id, first.tag, [host for host, _ in hosts.most_common(5)])


def _told(pilot: PilotRow) -> dict[str, Any]:
    return {"name": pilot.name, "job": pilot.job, "hostname": pilot.hostname, "message": pilot.message}
