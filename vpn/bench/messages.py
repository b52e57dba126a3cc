"""What the harness asks of its agents, as JSON lines on their standard input, and what they answer. No I/O.

One request at a time, one answer each: the answer's type, or ``Problem``. A credential travels in ``Open``: the way to
an agent must be a pipe of one host, or as safe as ssh.
"""

from __future__ import annotations

import msgspec

from vpn.modes.base import TunnelInfo

Value = bool | int | float | str | list[str]


class Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Open(Message, frozen=True):
    """Bring a tunnel up and start the workers' process in it; mode ``native`` is no tunnel. Answer: ``Opened``."""

    name: str
    mode: str
    options: dict[str, Value] = {}
    credential: bytes = b""


class Transfer(Message, frozen=True):
    """Move bytes (``up``, ``down``) or single ones to and fro (``echo``). Answer: ``Transferred``. Seconds."""

    name: str
    server: tuple[str, int]
    kind: str
    workers: int = 1
    warmup: float = 0.0
    seconds: float = 0.0
    trips: int = 0


class Copy(Message, frozen=True):
    """Fetch a file by xrdcp and drop it. Answer: ``Copied``."""

    name: str
    url: str


class Close(Message, frozen=True):
    """Bring a tunnel down. Answer: ``Fine``."""

    name: str


class StartGateway(Message, frozen=True):
    """Start a gateway that ends with the agent; ``arguments`` as `vpn gateway start` takes. Answer: ``Fine``."""

    name: str
    arguments: list[str] = []


class StartPlain(Message, frozen=True):
    """Start an ocserv as a site's root would, which ends with the agent. Answer: ``Issued``."""

    name: str


class Issue(Message, frozen=True):
    """A credential of a gateway of this user on this host. Answer: ``Issued``."""

    gateway: str
    label: str


class GatewayCpu(Message, frozen=True):
    """CPU seconds so far of a gateway, or what ``StartPlain`` started, and all its processes. Answer: ``Cpu``."""

    gateway: str


class Fine(Message, frozen=True):
    """Done."""


class Opened(Message, frozen=True):
    """``seconds`` from the request to the first program running inside."""

    seconds: float
    info: TunnelInfo


class Worker(msgspec.Struct, frozen=True):
    """What one worker found: ``samples`` of (seconds, bytes), or ``trips`` in seconds, or ``error``."""

    samples: list[tuple[float, float]] = []
    trips: list[float] = []
    error: str = ""


class Transferred(Message, frozen=True):
    """``cpu_seconds`` of all processes of the tunnels on this host, the agent's own too, meanwhile."""

    workers: list[Worker]
    cpu_seconds: float


class Copied(Message, frozen=True):
    """How long it took."""

    seconds: float


class Issued(Message, frozen=True):
    """``Credential.to_bytes``."""

    credential: bytes


class Cpu(Message, frozen=True):
    """CPU seconds, user and system."""

    seconds: float


class Problem(Message, frozen=True):
    """It could not be done, and why."""

    message: str


Request = Open | Transfer | Copy | Close | StartGateway | StartPlain | Issue | GatewayCpu
Answer = Fine | Opened | Transferred | Copied | Issued | Cpu | Problem
