"""What the scheduler is told and what it orders. Plain values, compared by ``==``.

Units: seconds, megabytes (MB). A need or a size of 0 means none asked for, none known.
"""

from __future__ import annotations

import math

import msgspec

from hpcq.outcome import Outcome

NO_FEATURES: frozenset[str] = frozenset()


class _Value(msgspec.Struct, gc=False):
    pass


class NewTask(_Value):
    """A task's needs. ``kind`` groups tasks alike in length and use (its category or function)."""

    id: int
    cores: int = 1
    memory: int = 0
    network: str = "any"
    priority: float = 0
    retries: int = 3
    kind: str = ""
    disk: int = 0
    gpus: int = 0
    features: frozenset[str] = NO_FEATURES
    walltime: float = 0.0


class Submitted(_Value):
    """The user submitted these."""

    tasks: list[NewTask]


class Cancelled(_Value):
    """The user wants these ended."""

    tasks: list[int]


class CategorySet(_Value):
    """How tasks of this kind are given memory and disk where they do not say themselves; see `categories`."""

    kind: str
    mode: str = "fixed"
    memory: int = 0
    disk: int = 0
    max_memory: int = 0
    max_disk: int = 0


class PilotReady(_Value):
    """A pilot may be given tasks; ``wan`` when its tunnel is up (or it needs none), ``time_left`` until it drains."""

    pilot: str
    cores: int
    memory: int = 0
    wan: bool = True
    disk: int = 0
    gpus: int = 0
    features: frozenset[str] = NO_FEATURES
    host: str = ""
    time_left: float = math.inf


class PilotTunnel(_Value):
    """A pilot's tunnel broke or is back; unless ``usable``, nothing can run there meanwhile."""

    pilot: str
    wan: bool
    usable: bool = True
    features: frozenset[str] = NO_FEATURES


class PilotDraining(_Value):
    """A pilot takes nothing new."""

    pilot: str


class PilotGone(_Value):
    """A pilot's connection is closed: nothing it held will come."""

    pilot: str
    reason: str = ""


class StartFailed(_Value):
    """A pilot on this host could not serve."""

    host: str


class SpeculationSet(_Value):
    """Copies of outliers from now on: ``multiplier`` times the typical time makes one; None: no more."""

    multiplier: float | None


class HostBlocked(_Value):
    """The user wants nothing more placed on this host, for ``seconds`` (for good by default)."""

    host: str
    seconds: float = math.inf


class HostUnblocked(_Value):
    """The user wants this host used again."""

    host: str


class Started(_Value):
    """These have begun on the pilot."""

    pilot: str
    tasks: list[int]


class EndedTask(_Value):
    """How one attempt ended, how long it ran, and the most memory and disk it was seen to use."""

    id: int
    outcome: str
    seconds: float = 0.0
    memory: float = 0.0
    disk: float = 0.0


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


Event = (
    Submitted
    | Cancelled
    | CategorySet
    | PilotReady
    | PilotTunnel
    | PilotDraining
    | PilotGone
    | StartFailed
    | SpeculationSet
    | HostBlocked
    | HostUnblocked
    | Started
    | Ended
    | Returned
    | Tick
)


class Allotment(_Value):
    """What a task gets by its category instead of what it said."""

    memory: int
    disk: int


class Assign(_Value):
    """Send these to the pilot, in this order; ``allotted`` names those that get other limits than they said.

    ``announced`` are those whose beginning is to be told at once.
    """

    pilot: str
    tasks: list[int]
    allotted: dict[int, Allotment] = {}
    announced: list[int] = []


class AskBack(_Value):
    """Ask the pilot for these, if they have not begun."""

    pilot: str
    tasks: list[int]


class Stop(_Value):
    """Have the pilot end these."""

    pilot: str
    tasks: list[int]


class Finish(_Value):
    """The task is done. ``reported`` tells whether the report of the attempt by ``pilot`` holds."""

    task: int
    outcome: Outcome
    attempts: int
    reported: bool
    message: str = ""
    pilot: str = ""


Command = Assign | AskBack | Stop | Finish
