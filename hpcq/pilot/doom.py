"""Tasks that are to be ended: for a limit, by the user, with their pilot. Pure, like `core`."""

from __future__ import annotations

import math

from hpcq.messages import TaskResult
from hpcq.outcome import Outcome

STRIKE_AGAIN = 0.1
"""Seconds after which a task that was to be ended without its runner, and is still there, is struck again: its process
may not have been there yet."""

STRIKES = 20
"""After so many its runner goes too."""


class Doom:
    """The end that a lane's task is to have, and how far that has come.

    Either its runner was ``killed``, and the lane goes with it, or the task alone is ended, in one or more ``strikes``:
    one is being ``struck``, or the next is due ``again_at``.
    """

    __slots__ = ("again_at", "killed", "outcome", "strikes", "struck", "task", "why")

    def __init__(self, task: int, outcome: Outcome, why: str) -> None:
        self.task = task
        self.outcome = outcome
        self.why = why
        self.killed = False
        self.struck = False
        self.strikes = 0
        self.again_at = math.inf

    def attribute(self, result: TaskResult, seconds: float) -> None:
        """Make the result say why the task was ended after ``seconds``, if it was; one that got done before counts."""
        if self.strikes and result.id == self.task and result.outcome != Outcome.SUCCESS and result.parcel is None:
            result.outcome, result.message = self.outcome.value, self.why
            result.payload, result.exit_code = b"", None
            result.seconds = max(result.seconds, seconds)

    def sentence(self, task: int) -> tuple[Outcome, str]:
        """What becomes of ``task``, which its runner was at when it was killed."""
        if task == self.task:
            return self.outcome, self.why
        return Outcome.LOST, f"it was ended together with task {self.task} before it"
