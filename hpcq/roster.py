"""What the manager knows of each pilot besides its tasks: a pure table of entries and their states.

::

    STARTING --Ready--> READY --Draining--> DRAINING --closed--> GONE
        |                 +----------closed--------------------> GONE
        +--StartFailed--> FAILED (layer and message kept)
        +--closed-------> GONE

Ended pilots stay listed (the last `ENDED_KEPT` of them), because a failed start is what users come to look for.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from hpcq import messages as m

ENDED_KEPT = 1000


class PilotState(enum.StrEnum):
    """Where a pilot is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"
    GONE = "gone"


class Entry(msgspec.Struct):
    """One pilot. Times are wall-clock seconds since the epoch (``ends_at``: of its walltime, or 0), memory in MB.

    ``gateway`` is what it was started with, one name or several; ``tunnel_gateway`` the one it was last sent to, and
    ``credentials`` are the user names it has, each with the gateway that knows it. Bytes: None while none are counted.
    """

    name: str
    batch: str
    job_id: str
    incarnation: int
    hostname: str
    pid: int
    cores: int
    memory: int
    vpn: str
    gateway: str
    connected_at: float
    disk: int = 0
    gpus: int = 0
    ends_at: float = 0.0
    state: PilotState = PilotState.STARTING
    tunnel_mode: str = ""
    tunnel_kind: str = ""
    tunnel_seconds: float = 0.0
    tunnel_address: str = ""
    tasks_done: int = 0
    failed_layer: str = ""
    message: str = ""
    credentials: dict[str, str] = {}
    tunnel_gateway: str = ""
    tunnel_passed_over: list[str] = []
    bytes_sent: int | None = None
    bytes_received: int | None = None
    bytes_unattributed: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come from it."""
        return self.state in (PilotState.FAILED, PilotState.GONE)


class PilotView(msgspec.Struct, frozen=True):
    """What `Queue.pilots` and ``hpcq pilots`` show of one pilot; also readable as a mapping.

    ``ends_at`` is the end of its walltime in seconds since the epoch, 0 without one; ``blocked`` says why nothing new
    is placed on its host; empty when nothing forbids it. ``tunnel_passed_over`` has a line for each mode that ``auto``
    did not choose. ``bytes_sent`` and ``bytes_received`` went through its tunnel so far, ``bytes_unattributed`` of both
    for no task that is known; None where they are not counted.
    """

    name: str
    batch: str
    job_id: str
    state: str
    hostname: str
    cores: int
    cores_busy: int
    memory: int
    tunnel_mode: str
    tunnel_kind: str
    tunnel_seconds: float
    tasks_done: int
    failed_layer: str
    message: str
    connected_at: float
    disk: int = 0
    gpus: int = 0
    blocked: str = ""
    ends_at: float = 0.0
    tunnel_gateway: str = ""
    tunnel_passed_over: list[str] = []
    bytes_sent: int | None = None
    bytes_received: int | None = None
    bytes_unattributed: int | None = None

    def __getitem__(self, key: str) -> Any:
        if key in self.__struct_fields__:
            return getattr(self, key)
        raise KeyError(key)

    def keys(self) -> tuple[str, ...]:
        """The names of the fields."""
        return self.__struct_fields__


def view(entry: Entry, cores_busy: int, blocked: str = "") -> PilotView:
    """One entry as users see it."""
    own = {name: getattr(entry, name) for name in PilotView.__struct_fields__ if hasattr(entry, name)}
    return PilotView(cores_busy=cores_busy, blocked=blocked, **{**own, "state": entry.state.value})


def _take_over(entry: Entry, message: m.Ready | m.TunnelUp) -> None:
    entry.tunnel_mode, entry.tunnel_kind = message.tunnel_mode, message.tunnel_kind
    entry.tunnel_seconds, entry.tunnel_address = message.tunnel_seconds, message.tunnel_address
    entry.tunnel_passed_over = message.tunnel_passed_over


class Roster:
    """All pilots, by name; the ended ones bounded."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.ready_count = 0
        self._ended: dict[str, Entry] = {}  # in the order of their ends

    def arrived(self, hello: m.PilotHello, wall: float) -> Entry:
        """A pilot presented itself."""
        entry = Entry(
            hello.pilot, hello.batch, hello.job_id, hello.incarnation, hello.hostname, hello.pid,
            hello.cores, hello.memory, hello.vpn, hello.gateway, wall,
            hello.disk, hello.gpus, wall + hello.walltime_left if hello.walltime_left else 0.0,
        )  # fmt: skip
        self.entries.pop(hello.pilot, None)
        self._ended.pop(hello.pilot, None)
        self.entries[hello.pilot] = entry
        return entry

    def _move(self, entry: Entry, state: PilotState) -> None:
        self.ready_count += (state is PilotState.READY) - (entry.state is PilotState.READY)
        entry.state = state
        if entry.ended and self.entries.get(entry.name) is entry:
            self._ended[entry.name] = entry
            if len(self._ended) > ENDED_KEPT:
                oldest = next(iter(self._ended))
                del self._ended[oldest], self.entries[oldest]

    def ready(self, entry: Entry, message: m.Ready) -> None:
        """Its tunnel is up."""
        self._move(entry, PilotState.READY)
        _take_over(entry, message)

    def tunnel(self, entry: Entry, message: m.TunnelDown | m.TunnelUp) -> None:
        """Its tunnel broke, or is back."""
        if isinstance(message, m.TunnelDown):
            entry.message = f"its tunnel is down: {message.message}"
            return
        entry.message = ""
        _take_over(entry, message)

    def traffic(self, entry: Entry, message: m.Traffic) -> None:
        """Its tunnel has carried so much."""
        entry.bytes_sent, entry.bytes_received = message.sent, message.received
        entry.bytes_unattributed = message.unattributed

    def failed(self, entry: Entry, message: m.StartFailed) -> None:
        """It cannot serve, or no longer."""
        self._move(entry, PilotState.FAILED)
        entry.failed_layer, entry.message = message.layer, message.message

    def draining(self, entry: Entry, reason: str) -> None:
        """It takes nothing new; a failure it told before stays its last word."""
        if entry.state is not PilotState.FAILED:
            self._move(entry, PilotState.DRAINING)
            entry.message = reason

    def closed(self, entry: Entry, reason: str) -> None:
        """Its connection is closed; what it said itself before is kept."""
        if entry.state is not PilotState.FAILED:
            entry.message = entry.message if entry.state is PilotState.DRAINING else reason
            self._move(entry, PilotState.GONE)
