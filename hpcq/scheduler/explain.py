"""Why a task is where it is, in words, and lists of tasks: questions people ask, answered from the scheduler's state.

Reads only. May take time proportional to the number of pilots, or of tasks with the same needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from hpcq.scheduler.pilots import Pilot
from hpcq.scheduler.records import Record, TaskState

if TYPE_CHECKING:
    from hpcq.scheduler.machine import Scheduler


class TaskRow(msgspec.Struct, frozen=True):
    """One task in a list; ``since`` in seconds before now."""

    id: int
    state: str
    since: float
    pilot: str = ""
    copy: str = ""
    attempts: int = 0


def rows(scheduler: Scheduler, limit: int, now: float) -> list[TaskRow]:
    """At most ``limit`` tasks: what is on pilots first, then what waits, in the order of the line."""
    return [_row(record, now) for record in islice(_in_order(scheduler), limit)]


def _in_order(scheduler: Scheduler) -> Iterator[Record]:
    for pilot in scheduler.pilots.values():
        yield from (record for record in pilot.held() if record.pilot is pilot)
    for _, _, demand in scheduler.placement.line:
        yield from demand.ready


def _row(record: Record, now: float) -> TaskRow:
    pilot: Pilot | None = record.pilot
    second: Pilot | None = record.second
    return TaskRow(
        record.id,
        "waiting" if record.state is TaskState.READY else record.state.name.lower(),
        now - record.since,
        pilot.name if pilot else "",
        second.name if second else "",
        record.attempts,
    )


def explain(scheduler: Scheduler, number: int, now: float, *, has_inputs: bool = False) -> str:
    """Where a task is and, if it does not run, why not."""
    record = scheduler.tasks.get(number)
    if record is None:
        return f"task {number} has ended, or was never submitted"
    if record.state is TaskState.READY:
        return f"task {number} waits{_again(record)}: {_why_waiting(scheduler, record, now)}"
    pilot: Pilot = record.pilot
    place = _place(pilot)
    since = _duration(now - record.since)
    if record.state is TaskState.ASSIGNED:
        if number in pilot.backlog:
            ahead = len(pilot.claimed) + list(pilot.backlog).index(number)
            return f"task {number} was sent to {place} {since} ago and waits there behind {_tasks(ahead)}"
        before = "begins when its inputs are there" if has_inputs else "is about to begin"
        return f"task {number} was sent to {place} {since} ago and {before}"
    if record.state is TaskState.ENDING:
        return f"task {number} is being cancelled on {place} since {since}"
    return f"task {number} runs on {place} since {since}{_attempt(record)}{_copy(record)}"


def _place(pilot: Pilot) -> str:
    return f"pilot {pilot.name} on {pilot.host}" if pilot.host else f"pilot {pilot.name}"


def _again(record: Record) -> str:
    return f" to run again (it has begun {record.attempts} of {record.retries + 1} times)" if record.attempts else ""


def _attempt(record: Record) -> str:
    return f" (attempt {record.attempts} of {record.retries + 1})" if record.attempts > 1 else ""


def _copy(record: Record) -> str:
    if record.second is None:
        return ""
    return f"; it takes longer than others of its category, so a copy runs on {_place(record.second)}"


def _why_waiting(scheduler: Scheduler, record: Record, now: float) -> str:
    pilots = list(scheduler.pilots.values())
    if not pilots:
        return "no pilot is ready"
    able = [pilot for pilot in pilots if pilot.could_ever(record.demand.needs, now)]
    if not able:
        return f"no pilot meets its needs: {'; '.join(_unmet(pilots, record, now))}"
    usable = [pilot for pilot in able if pilot.usable]
    if not usable:
        return f"{_pilots(len(able))} could run it, but {_unusable(scheduler, able)}"
    ahead = _ahead(scheduler, record)
    room = f"{_pilots(len(usable))} could run it, and {'it is' if len(usable) == 1 else 'all are'} full"
    if len(usable) < len(able):
        room += f" ({_unusable(scheduler, [p for p in able if not p.usable])})"
    return f"{room}; {_tasks(ahead)} before it"


def _ahead(scheduler: Scheduler, record: Record) -> int:
    """Waiting tasks before it in the line: of its own needs exactly, of others by priority and id."""
    key = (-record.priority, record.id)
    before = 0
    for mine in record.demand.ready:
        if mine is record:
            break
        before += 1
    for *_, demand in scheduler.placement.line:
        if demand is not record.demand:
            before += sum((-other.priority, other.id) < key for other in demand.ready)
    return before


def _unusable(scheduler: Scheduler, pilots: list[Pilot]) -> str:
    draining = sum(pilot.draining for pilot in pilots)
    blocked = {pilot.host for pilot in pilots if pilot.blocked and not pilot.draining}
    parts = [f"host {host} is blocked: {scheduler.hosts.why(host)}" for host in sorted(blocked)[:3]]
    if len(blocked) > 3:
        parts.append(f"{len(blocked) - 3} more hosts are blocked")
    paused = sum(pilot.paused for pilot in pilots)
    if paused:
        parts.append(f"{_pilots(paused)} {'makes its' if paused == 1 else 'make their'} broken tunnel anew")
    if draining:
        parts.append(f"{_pilots(draining)} draining")
    return ", ".join(parts)


def _unmet(pilots: list[Pilot], record: Record, now: float) -> list[str]:
    """For each need, how many pilots fall short of it, and the best there is."""
    needs = record.demand.needs
    sizes: dict[str, tuple[float, list[float], str]] = {
        "cores": (needs.cores, [p.cores for p in pilots], ""),
        "memory": (needs.memory, [p.memory for p in pilots], " MB"),
        "disk": (needs.disk, [p.disk for p in pilots], " MB"),
        "gpus": (needs.gpus, [p.gpus for p in pilots], ""),
        "walltime": (needs.walltime, [p.ends_at - now for p in pilots], " s"),
    }
    found = []
    for name, (wanted, have, unit) in sizes.items():
        short = sum(value < wanted for value in have)
        if short:
            found.append(f"{name} {wanted:.0f}{unit}: {_share(short, pilots)} less (the most is {max(have):.0f}{unit})")
    if needs.network == "wan" and (without := sum(not p.wan for p in pilots)):
        found.append(f"network 'wan': {_share(without, pilots)} no tunnel")
    for feature in sorted(needs.features):
        without = sum(feature not in p.features for p in pilots)
        if without:
            found.append(f"feature {feature!r}: {_share(without, pilots)} it not")
    return found


def _share(some: int, pilots: list[Pilot]) -> str:
    return f"{some} of {_pilots(len(pilots))} {'has' if some == 1 else 'have'}"


def _pilots(count: int) -> str:
    return f"{count} pilot{'' if count == 1 else 's'}"


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
