"""Messages between a session (or gateway) and its keepers, as typed structs.

A keeper is a small single-threaded process that starts and reaps others: one outside every namespace, and one
inside (the holder), which also configures it. Requests carry an ``id`` and are answered by ``Done`` or
``Failed`` with the same id; ``Ready`` and ``Exited`` come unasked. File descriptors travel beside a message
(SCM_RIGHTS), in the order a message's fields say. Nothing here does I/O.
"""

from __future__ import annotations

import msgspec

from vpn.errors import Layer


class Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Spawn(Message, frozen=True):
    """Start a program; the descriptors sent along become ``targets``, in order, in the new process."""

    id: int
    argv: list[bytes]
    env: dict[bytes, bytes]
    cwd: bytes
    targets: list[int]
    new_session: bool = True
    may_mount: bool = False
    """It keeps CAP_SYS_ADMIN of the namespace: a FUSE server (holder only)."""


class Kill(Message, frozen=True):
    """Send a signal to the process started by request ``id``, or to its whole group; not answered."""

    id: int
    signal: int
    group: bool = False


class OpenTun(Message, frozen=True):
    """Make a tun device in the namespace and send its descriptor back (holder only). ``headers``: before each packet
    there is a struct virtio_net_hdr.
    """

    id: int
    name: str
    headers: bool = False


class Listen(Message, frozen=True):
    """Bind a socket in the namespace, TCP and listening or UDP, and send its descriptor back; the answer's value is
    its port (0: the kernel chooses).
    """

    id: int
    address: str
    port: int = 0
    udp: bool = False


class Redirect(Message, frozen=True):
    """Send TCP that leaves through ``device`` to this port of the namespace's own loopback instead, IPv4 or IPv6."""

    id: int
    device: str
    port: int
    six: bool = False


class Configure(Message, frozen=True):
    """Give ``device`` an address (CIDR), an MTU in bytes and a queue in packets (0: leave it), set it up, add routes
    (CIDR or "default").
    """

    id: int
    device: str
    address: str
    mtu: int = 0
    routes: list[str] = []
    queue: int = 0


class Resolve(Message, frozen=True):
    """Bind a resolv.conf with this text, and switch off name services that would bypass it."""

    id: int
    text: str


class WriteFile(Message, frozen=True):
    """Write a file as the namespace sees it: settings under /proc/sys, files of a private directory (with
    ``mode``).
    """

    id: int
    path: str
    text: str
    mode: int = 0


class PrivateDirectory(Message, frozen=True):
    """Mount a tmpfs only this namespace sees; answered with its path, short enough for sockets."""

    id: int


class Stage(Message, frozen=True):
    """Mount an empty file system at ``top`` (a directory of the root, made when the host has none) with directories
    ``places`` in it to mount on, and the host's own ``shown`` as they are (holder only).
    """

    id: int
    top: str
    places: list[str] = []
    shown: list[str] = []


class Diagnose(Message, frozen=True):
    """Open two sockets of sock_diag(7) in the namespace and send their descriptors back: one to ask for its TCP
    sockets, and one that is told of each that ends, left out where that is refused (holder only).
    """

    id: int


class Ready(Message, frozen=True):
    """The keeper serves; ``notes`` are things that were refused but are not needed."""

    notes: list[str] = []


class Done(Message, frozen=True):
    """The answer to a request; ``pid`` of a started process (0: see the message's credentials)."""

    id: int
    value: str = ""
    pid: int = 0


class Failed(Message, frozen=True):
    """A request, or the keeper's own start (id 0), that failed."""

    id: int
    layer: Layer
    message: str
    code: int = 0


class Exited(Message, frozen=True):
    """The process started by request ``id`` ended; ``status`` is negative for a signal.

    ``cpu_seconds`` and ``max_rss`` (bytes) are of it and the descendants it waited for (getrusage(2)).
    """

    id: int
    status: int
    cpu_seconds: float = 0.0
    max_rss: int = 0


Request = (
    Spawn | Kill | OpenTun | Listen | Redirect | Configure | Resolve | WriteFile | PrivateDirectory | Stage | Diagnose
)
Report = Ready | Done | Failed | Exited
