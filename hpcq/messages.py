"""What manager, pilots and command-line clients say to each other, as typed structs.

Every message is one msgpack array whose first element names its type (`msgspec` tagged unions); each side decodes
only the union it may receive, so a message of the wrong direction, a wrong type or a missing field is refused before
anything acts on it. Function bodies, arguments and results are opaque bytes here: only `serialize` opens them.

Units: seconds, megabytes (MB, 2**20 bytes), wall-clock times as seconds since the epoch.

Change ``PROTOCOL_VERSION`` whenever a message changes; both sides compare it before anything else.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

PROTOCOL_VERSION = 6

Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=16384)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Base: arrays on the wire, the class name as tag."""


# --- parts ---------------------------------------------------------------------------------------------------------


class InputSpec(msgspec.Struct, array_like=True, gc=False):
    """One input as the pilot obtains it: ``name`` in the sandbox; ``kind`` is ``file``, ``dir`` or ``url``.

    ``origin`` is the URL, or how messages call the source. ``size`` is in bytes, of the archive for a directory.
    ``link``: a read-only link to the cache will do.
    """

    name: Text
    kind: str
    digest: bytes
    size: int
    origin: Text
    executable: bool = False
    cache: bool = True
    link: bool = False
    timeout: float = 0.0


class OutputSpec(msgspec.Struct, array_like=True, gc=False):
    """One output: ``name`` in the sandbox; ``keep`` when it stays on the pilot."""

    name: Text
    keep: bool = False


class FileSpec(msgspec.Struct, array_like=True, gc=False):
    """The files of one task."""

    inputs: list[InputSpec]
    outputs: list[OutputSpec]


class KeptFile(msgspec.Struct, array_like=True, gc=False):
    """An output that stayed on the pilot: its name in the sandbox and its content."""

    name: Text
    digest: bytes
    size: int
    kind: str
    executable: bool


class TaskSpec(msgspec.Struct, array_like=True, gc=False):
    """One task as the pilot needs it.

    ``function`` is the key of a function sent earlier (PythonTask), or empty for a shell command, whose text is
    ``payload`` in UTF-8. ``walltime`` is 0 for none; so are ``memory`` and ``disk``, which are limits too. ``parcel``
    has the sizes of the pieces of arguments that are fetched apart (see `hpcq.files.haul`); ``payload`` is empty then.
    ``announce``: that it begins is to be told at once, not with what comes next.
    """

    id: int
    function: bytes
    payload: bytes
    cores: int = 1
    memory: int = 0
    walltime: float = 0.0
    network: str = "any"
    env: dict[str, str] | None = None
    disk: int = 0
    gpus: int = 0
    isolation: str = "warm"
    files: FileSpec | None = None
    parcel: list[NonNegative] | None = None
    announce: bool = False


class TaskResult(msgspec.Struct, array_like=True, tag="result", gc=False):
    """How one attempt ended on a pilot.

    ``payload`` is the pickled value (``success`` of a PythonTask) or exception (``exception``); ``message`` says what
    happened for the other outcomes. ``left_out`` counts the bytes of output that were over the limit and dropped.
    ``lost_input`` is the digest of an input that nobody has any more, ``kept`` the outputs that stayed on the pilot.
    ``memory`` and ``disk`` are the most it used, ``cpu`` its CPU seconds, as measured. ``parcel`` has the sizes of the
    pieces of a value (or exception) that was brought apart, before this was said; ``payload`` is empty then. ``sent``
    and ``received`` are the bytes of its connections through the tunnel, None where they were not counted.
    """

    id: int
    outcome: str
    payload: bytes = b""
    exit_code: int | None = None
    std_output: bytes = b""
    std_error: bytes = b""
    message: str = ""
    started_at: float = 0.0
    seconds: float = 0.0
    left_out: int = 0
    memory: float = 0.0
    disk: float = 0.0
    cpu: float = 0.0
    lost_input: bytes = b""
    kept: list[KeptFile] | None = None
    parcel: list[NonNegative] | None = None
    sent: NonNegative | None = None
    received: NonNegative | None = None


class FunctionBody(msgspec.Struct, array_like=True, gc=False):
    """A pickled function and the digest that names it from then on."""

    key: bytes
    body: bytes


class Versions(msgspec.Struct, array_like=True, gc=False):
    """What must agree for pickled functions to travel."""

    python: Name
    cloudpickle: Name
    msgspec: Name
    hpcq: Name


# --- first words ---------------------------------------------------------------------------------------------------


class PilotHello(Message):
    """A pilot presents itself. ``job_id`` is the batch system's id, ``incarnation`` counts its restarts."""

    protocol: int
    pilot: Name
    batch: Name
    job_id: Name
    incarnation: NonNegative
    hostname: Name
    pid: int
    cores: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
    memory: NonNegative
    walltime_left: float
    vpn: Name
    gateway: Name
    versions: Versions
    disk: NonNegative = 0
    gpus: NonNegative = 0


class ClientHello(Message):
    """A command-line client presents itself; it may ask, and runs nothing."""

    protocol: int
    hostname: Name


class DataHello(Message):
    """A known pilot opens a connection for contents (see `hpcq.files.wire`) or ``parcels`` (`hpcq.files.haul`)."""

    protocol: int
    pilot: Name
    parcels: bool = False


class Welcome(Message):
    """The manager accepts. Silence longer than ``silence_limit`` seconds means the other side is gone."""

    protocol: int
    queue: Name
    silence_limit: float


class Refused(Message):
    """The manager does not accept this pilot or client, and why."""

    reason: Text


# --- pilot to manager ----------------------------------------------------------------------------------------------


class CredentialRequest(Message):
    """The pilot wants a one-login credential for its tunnel."""


class CredentialReturn(Message):
    """The tunnel that used this credential is down; it can be revoked."""

    username: Name


class Ready(Message):
    """The tunnel is up and every probe has answered: tasks may come. ``time_left`` until it drains, 0 for no end."""

    tunnel_mode: Name
    tunnel_kind: Name
    tunnel_seconds: float
    tunnel_address: Name
    features: list[Name]
    time_left: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    data_addresses: list[Name] = []
    data_port: int = 0
    tunnel_passed_over: list[Text] = []
    """A line for each mode that ``auto`` looked at or tried before, with the reason."""


class TunnelDown(Message):
    """The tunnel broke; the pilot makes it anew. ``inside`` is false when nothing can run in it meanwhile."""

    layer: Name
    message: Text
    inside: bool


class TunnelUp(Message):
    """The tunnel is up again, perhaps in another mode; ``features`` replaces those of `Ready`."""

    tunnel_mode: Name
    tunnel_kind: Name
    tunnel_seconds: float
    tunnel_address: Name
    features: list[Name]
    tunnel_passed_over: list[Text] = []


class StartFailed(Message):
    """The pilot cannot serve: which layer failed, and what to do. It ends after this."""

    layer: Name
    message: Text


class Update(Message):
    """Attempts that ended, and attempts that began and have not ended yet."""

    started: list[int]
    results: list[TaskResult]


class Traffic(Message):
    """Bytes that went through the pilot's tunnel since it began; ``unattributed`` are those of both directions that
    were no task's, as far as is known.
    """

    sent: NonNegative
    received: NonNegative
    unattributed: NonNegative


class Holding(Message):
    """Contents this pilot can now give to others; those it was getting and will not have (``missed``); and what its
    node's cache has from earlier times, for whatever program (``cached``).
    """

    digests: list[bytes]
    missed: list[bytes] = []
    cached: list[bytes] = []


class Returned(Message):
    """Tasks handed back without having begun."""

    tasks: list[int]


class Draining(Message):
    """The pilot takes nothing new; what runs may still finish."""

    reason: Text


class Goodbye(Message):
    """The last word of a pilot that ends in good order."""

    reason: Text


class Heartbeat(Message):
    """Still here. Sent by both sides when nothing else was."""


# --- manager to pilot ----------------------------------------------------------------------------------------------


class CredentialReply(Message):
    """The credential as the gateway wrote it, or why there is none."""

    credential: bytes
    error: Text = ""


class Run(Message):
    """Run these. ``functions`` holds the bodies this pilot does not have yet, ``forget`` those to be dropped."""

    functions: list[FunctionBody]
    tasks: list[TaskSpec]
    forget: list[bytes]


class Retract(Message):
    """Hand these back if they have not begun; answered by ``Returned`` with those that had not."""

    tasks: list[int]


class Cancel(Message):
    """End these now, running or not; each is answered by a result or by ``Returned``."""

    tasks: list[int]


class Leave(Message):
    """End yourself. ``drain`` lets running tasks finish first."""

    reason: Text
    drain: bool


# --- client and manager --------------------------------------------------------------------------------------------


class Ask(Message):
    """A question of the command line: ``pilots``, ``status`` or ``jobs_submitted``; ``body`` is JSON."""

    topic: Name
    body: bytes = b""


class Answer(Message):
    """The answer as JSON, or an error in one line."""

    body: bytes
    error: Text = ""


FirstWord = PilotHello | ClientHello | DataHello
FromPilot = (
    CredentialRequest
    | CredentialReturn
    | Ready
    | TunnelDown
    | TunnelUp
    | StartFailed
    | Update
    | Traffic
    | Holding
    | Returned
    | Draining
    | Goodbye
    | Heartbeat
)
FromClient = Ask
FirstAnswer = Welcome | Refused
ToPilot = CredentialReply | Run | Retract | Cancel | Leave | Heartbeat
ToClient = Answer

# --- pilot and runner (one socket pair; same host, same code) --------------------------------------------------------


class Define(Message):
    """A function body the runner will need."""

    key: bytes
    body: bytes


class Forget(Message):
    """A function body the runner will not need again."""

    key: bytes


class Execute(Message):
    """Run one task; ``directory`` is its sandbox when it has files, else the runner makes one.

    ``parcel`` is the descriptor of its arguments, -1 for none: each side has its own number for what is passed along.
    ``spill``: a large result goes to disk, since memory for such is used up.
    """

    task: TaskSpec
    directory: str = ""
    parcel: int = -1
    spill: bool = False


class Attached(Message):
    """The real message is in the file passed along with this one (it was too large for a datagram)."""

    size: int


class Leaves(Message):
    """The runner's large result of this task; the file is passed along, and the task's result follows."""

    task: int
    on_disk: bool


ToRunner = Define | Forget | Execute | Attached
