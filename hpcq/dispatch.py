"""What goes to pilots with each task, and what came back: specs, functions, large arguments; the last reports.

The scheduler knows tasks by number, needs and outcome alone; all else is here from the submission to the end. In the
manager's thread. May not live here: where a task goes, and when (see `scheduler`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from hpcq import messages as m
from hpcq.files.depot import Depot
from hpcq.files.service import FileService
from hpcq.functions import Functions
from hpcq.links import Links
from hpcq.outcome import Attempt
from hpcq.parcels import Load, Parcel
from hpcq.roster import Entry
from hpcq.scheduler import Assign, Finish, NewTask

RUN_BYTES = 32 * 1024 * 1024
"""Tasks are sent in messages of about this size at most: none blocks the link for long, or is over the frame limit."""


class Submission(NamedTuple):
    """One submitted task as it travels from the user's thread: needs, spec, a function's body, large arguments."""

    needs: NewTask
    spec: m.TaskSpec
    body: bytes
    files: Any = None
    parcel: Parcel | None = None


class Finished(NamedTuple):
    """One task that is done."""

    id: int
    attempt: Attempt


class Dispatch:
    """Everything of unfinished tasks but their state."""

    def __init__(self, links: Links, files: FileService, depot: Depot) -> None:
        self._links = links
        self._files = files
        self._depot = depot
        self._functions = Functions()
        self._specs: dict[int, m.TaskSpec] = {}
        self._reports: dict[tuple[int, str], tuple[m.TaskResult, Entry]] = {}  # a task may have a copy elsewhere

    def take(self, submission: Submission) -> NewTask:
        """Keep what a task needs; returns what the scheduler has to know."""
        task, spec, body, _, parcel = submission
        self._specs[spec.id] = spec
        if parcel is not None:
            self._depot.give_out(spec.id, parcel)
        if spec.function:
            self._functions.acquire(spec.function, body)
        return task

    def is_open(self, number: int) -> bool:
        """Whether a task is not done yet. In any thread."""
        return number in self._specs

    def send(self, command: Assign) -> None:
        """Have a pilot do these tasks, in messages of about `RUN_BYTES` at most."""
        part: list[m.TaskSpec] = []
        size = 0
        for number in command.tasks:
            spec = self._specs[number]
            if number in command.allotted:
                given = command.allotted[number]
                spec = msgspec.structs.replace(spec, memory=given.memory, disk=given.disk)
            if number in command.announced:
                spec = msgspec.structs.replace(spec, announce=True)
            weight = len(spec.payload) + self._functions.size(spec.function)
            if size + weight > RUN_BYTES and part:
                self._send_part(command.pilot, part)
                part, size = [], 0
            part.append(spec)
            size += weight
        self._send_part(command.pilot, part)

    def _send_part(self, pilot: str, specs: list[m.TaskSpec]) -> None:
        keys = {spec.function for spec in specs}
        keys.discard(b"")
        bodies = self._functions.missing(pilot, keys)
        link = self._links.get(pilot)
        assert link is not None, f"the scheduler gave tasks to {pilot}, which has gone"
        link.send(m.Run(bodies, specs, self._functions.to_forget(pilot)), now=True)

    def reported(self, entry: Entry, result: m.TaskResult) -> None:
        """A pilot says that a task has ended; kept until `forget`."""
        self._reports[result.id, entry.name] = result, entry

    def forget(self) -> None:
        """What was reported and has not finished a task came too late, or the task runs again."""
        self._depot.forget(self._reports)
        self._reports.clear()

    def pilot_gone(self, pilot: str) -> None:
        """It has nothing of ours any more."""
        self._functions.pilot_gone(pilot)

    def finished(self, command: Finish) -> Finished | None:
        """What the user gets of a task that is done; None when its files are dealt with first."""
        number = command.task
        spec = self._specs.pop(number)
        self._depot.done(number)
        if spec.function:
            self._functions.release(spec.function)
        report, entry = self._reports[number, command.pilot] if command.reported else (None, None)
        if spec.files is not None and self._files.absorbs(number, command.outcome, report):
            return None
        if report is None or entry is None:
            return Finished(number, Attempt(command.outcome, command.message, attempts=command.attempts))
        load = None if report.parcel is None else Load(self._depot.claim(number, entry.name), report.parcel)
        return Finished(
            number,
            Attempt(
                command.outcome,
                command.message or report.message,
                report.payload,
                report.exit_code,
                report.std_output,
                report.std_error,
                report.left_out,
                entry.name,
                entry.hostname,
                command.attempts,
                report.started_at,
                report.started_at + report.seconds,
                report.memory,
                report.disk,
                report.cpu,
                load,
            ),
        )
