"""What the gateway's daemon and its data plane tell each other: one JSON object a line over a stream socket.

The data plane (``plane``) is told whom each tunnel address belongs to, and asked for figures. Nothing here does
I/O.
"""

from __future__ import annotations

import msgspec

CONTROL_FD, LISTENER_FD, DNS_UDP_FD, DNS_TCP_FD = 3, 4, 5, 6  # where the data plane finds its sockets
LEDGER_FD = 7  # … and, when there is a common limit, the ledger
DEVICE_FD = 8  # what is not TCP


class Settings(msgspec.Struct, frozen=True):
    """How the data plane works, fixed at its start: allow-list, access log ("": none), bytes a second
    each way (0: no limit; ``rate`` together with the relay), name servers (none: the host's), the user to become ("":
    none)."""

    rules: tuple[str, ...] = ()
    log: str = ""
    rate: float = 0.0
    rate_per_client: float = 0.0
    dns: tuple[str, ...] = ()
    user: str = ""


class Arrived(msgspec.Struct, tag=True, frozen=True):
    """Connections from this tunnel address are this client's from now on."""

    address: str
    client: str


class Left(msgspec.Struct, tag=True, frozen=True):
    """This client's connections are cut; its address belongs to nobody."""

    client: str


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Answer with ``Figures``."""

    number: int


class Figure(msgspec.Struct, frozen=True):
    """One client: bytes to the outside and back, connections open now and ended."""

    up: int
    down: int
    open: int
    ended: int


class Figures(msgspec.Struct, tag=True, frozen=True):
    """Every client that was ever told of and is not forgotten."""

    number: int
    clients: dict[str, Figure]


Order = Arrived | Left | Ask

decode_order = msgspec.json.Decoder(Order).decode
decode_figures = msgspec.json.Decoder(Figures).decode


def encode(message: msgspec.Struct) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"
