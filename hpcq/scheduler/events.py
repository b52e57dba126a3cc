"""What the scheduler is told and what it orders. Plain values, compared by ``==``."""

from __future__ import annotations

import msgspec

from hpcq.task import Outcome


class _Value(msgspec.Struct, gc=False):
    pass


class NewTask(_Value):
    """A task's needs. ``kind`` groups tasks of similar length (its category or function); memory in MB."""

    id: int
    cores: int = 1
    memory: int = 0
    network: str = "any"
    priority: float = 0
    retries: int = 3
    kind: str = ""


class Submitted(_Value):
    """The user submitted these."""

    tasks: list[NewTask]


class Cancelled(_Value):
    """The user wants these ended."""

    tasks: list[int]


class PilotReady(_Value):
    """A pilot may be given tasks; ``wan`` when its tunnel is up (or it needs none)."""

    pilot: str
    cores: int
    memory: int = 0
    wan: bool = True


class PilotDraining(_Value):
    """A pilot takes nothing new."""

    pilot: str


class PilotGone(_Value):
    """A pilot's connection is closed: nothing it held will come."""

    pilot: str
    reason: str = ""


class Started(_Value):
    """These have begun on the pilot."""

    pilot: str
    tasks: list[int]


class EndedTask(_Value):
    """How one attempt ended and how long it ran (seconds)."""

    id: int
    outcome: str
    seconds: float = 0.0


class Ended(_Value):
    """These have ended on the pilot."""

    pilot: str
    tasks: list[EndedTask]


class Returned(_Value):
    """The pilot gave these back without having begun them."""

    pilot: str
    tasks: list[int]


class Tick(_Value):
    """Time has passed."""


Event = Submitted | Cancelled | PilotReady | PilotDraining | PilotGone | Started | Ended | Returned | Tick


class Assign(_Value):
    """Send these to the pilot, in this order."""

    pilot: str
    tasks: list[int]


class AskBack(_Value):
    """Ask the pilot for these, if they have not begun."""

    pilot: str
    tasks: list[int]


class Stop(_Value):
    """Have the pilot end these."""

    pilot: str
    tasks: list[int]


class Finish(_Value):
    """The task is done. ``reported`` tells whether the pilot's own report of the attempt holds."""

    task: int
    outcome: Outcome
    attempts: int
    reported: bool
    message: str = ""


Command = Assign | AskBack | Stop | Finish
