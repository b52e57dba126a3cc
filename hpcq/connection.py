"""How a manager and those who connect to it know each other: keys, certificates, the connection file.

A queue has an *identity*: a certificate authority made for it alone (its key is thrown away at once), one certificate
for the manager and one for pilots and clients, each usable only in its own role (pilots also serve files to each
other, under a name that is never the manager's). TLS 1.3 is required and both sides
verify. Two files, both mode 0600, in the queue's state directory:

- ``identity.json``: everything, the manager's key included. Read by the manager only.
- ``connection.json``: addresses, port, and what a pilot needs. Written when the manager listens, removed when it ends
  in good order. Pilots read it again whenever they have lost their manager, so a program started anew is found.
  Pilots that cannot see it get its content on their standard input (see `hpcq.batch.inline`).

The identity outlives the program, so that ``submit-pilots --create`` can send pilots ahead of it; it is renewed when
less than `RENEW_BEFORE` of its life is left. May not live here: sockets; how certificates are made (see
`hpcq.identity`).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import os
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from hpcq import state_dir
from hpcq.errors import ConnectionFileError, QueueNotFoundError

MANAGER_NAME = "manager.hpcq.invalid"
PILOT_NAME = "pilot.hpcq.invalid"
RENEW_BEFORE = datetime.timedelta(days=60)
T = TypeVar("T")
LINE = "hpcq-connection-1:"
"""How connection data begin where they travel as one line of text, without a file."""


class KeyPair(msgspec.Struct, frozen=True):
    """A certificate and its key in PEM. Does not print its key."""

    certificate: str
    key: str

    def __repr__(self) -> str:
        return "KeyPair(…)"


class Identity(msgspec.Struct, frozen=True):
    """Who a queue is. ``expires`` in seconds since the epoch; ``pilots_serve``: the pilots' certificate is good for
    listening too, as `PILOT_NAME` (an identity file without it is made anew).
    """

    authority: str
    manager: KeyPair
    pilot: KeyPair
    expires: float
    pilots_serve: bool


class ConnectionInfo(msgspec.Struct, frozen=True):
    """The connection file: how to reach a manager and be let in. ``port`` is 0 while no manager listens yet."""

    queue: str
    protocol: int
    addresses: list[str]
    port: int
    hostname: str
    pid: int
    authority: str
    pilot: KeyPair


def own_identity(queue: str) -> Identity:
    """The queue's identity, made or renewed where needed."""
    state_dir.ensure_queue_dir(queue)
    path = state_dir.identity_file(queue)
    now = datetime.datetime.now(datetime.UTC)
    is_first = not path.exists()
    with contextlib.suppress(FileNotFoundError, ConnectionFileError):
        known = _read(path, Identity)
        if known.expires - now.timestamp() > RENEW_BEFORE.total_seconds():
            return known
    from hpcq.identity import make_identity  # noqa: PLC0415 - pilots only read what is there, and should start fast

    identity = make_identity(queue, now)
    try:
        state_dir.write_private(path, msgspec.json.encode(identity), replace=not is_first)
    except FileExistsError:  # two began at once, and the other one was first
        return own_identity(queue)
    return identity


def create(queue: str) -> Path:
    """Prepare a queue whose program starts later, so that pilots can be sent ahead; returns its connection file."""
    from hpcq.messages import PROTOCOL_VERSION  # noqa: PLC0415 - messages is not needed to read a file

    path = state_dir.connection_file(queue)
    if not path.exists():
        identity = own_identity(queue)
        info = ConnectionInfo(queue, PROTOCOL_VERSION, [], 0, "", 0, identity.authority, identity.pilot)
        with contextlib.suppress(FileExistsError):  # a program that listens by now has written a better one
            state_dir.write_private(path, msgspec.json.encode(info), replace=False)
    return path


def write(info: ConnectionInfo) -> Path:
    """Write the connection file of ``info.queue``, mode 0600, all or nothing."""
    path = state_dir.connection_file(info.queue)
    state_dir.write_private(path, msgspec.json.encode(info))
    return path


def read(path: Path) -> ConnectionInfo:
    """A connection file.

    Raises:
        QueueNotFoundError: there is none.
        ConnectionFileError: it is not ours, readable by others, or malformed.
    """
    try:
        return _read(path, ConnectionInfo)
    except FileNotFoundError as error:
        raise QueueNotFoundError(f"no connection file {path}: no program with that queue is running") from error


def _read(path: Path, kind: type[T]) -> T:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConnectionFileError(f"cannot read {path}: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise ConnectionFileError(f"{path} belongs to another user (uid {status.st_uid}); refusing its keys")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConnectionFileError(f"{path} is readable by others; its keys must be made anew: remove it")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ConnectionFileError(f"{path} is damaged ({error}); start the queue's program again") from error


def to_line(info: ConnectionInfo) -> str:
    """``info`` as one line of plain characters. It holds the pilots' key: only for where none but the owner can read.

    Raises:
        QueueNotFoundError: no program serves the queue yet, so there is no address to tell.
    """
    if not info.port:
        raise QueueNotFoundError(
            f"no program has been started for queue {info.queue!r} yet: --connection inline tells pilots where it "
            "listens, so start it first (pilots that are to go ahead of it need the connection file)"
        )
    return LINE + base64.urlsafe_b64encode(msgspec.json.encode(info)).decode()


def from_line(text: str) -> ConnectionInfo:
    """Connection data from `to_line`; white space round it does not matter.

    Raises:
        ConnectionFileError: it is something else, or not whole.
    """
    kind, _, body = text.strip().partition(":")
    if f"{kind}:" != LINE:
        what = "something else" if text.strip() else "nothing"
        raise ConnectionFileError(f"there should be connection data ({LINE}…), but there is {what}")
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(body), type=ConnectionInfo)
    except (ValueError, msgspec.MsgspecError):
        raise ConnectionFileError("the connection data are damaged: they were cut or changed on their way") from None


def find(queue: str) -> ConnectionInfo:
    """The connection file of a queue that a program serves.

    Raises:
        QueueNotFoundError: unknown name (the known ones are listed), or no program has been started for it yet.
    """
    path = state_dir.connection_file(queue)
    if not path.exists():
        raise QueueNotFoundError(_unknown(queue))
    info = read(path)
    if not info.port:
        raise QueueNotFoundError(f"queue {queue!r} is prepared, but no program has been started for it yet")
    return info


def _unknown(queue: str) -> str:
    names = state_dir.known_queues()
    known = [name for name in names if state_dir.connection_file(name).exists()]
    if queue in names:
        return f"queue {queue!r} has no program running now: start it, or name another queue with --name"
    listed = f"the queues here are: {', '.join(known)}" if known else "no queue is running here"
    return f"no queue named {queue!r}; {listed}. Start your program, or name another queue with --name"


@contextlib.contextmanager
def _as_file(text: str) -> Iterator[str]:
    """``ssl`` reads keys from files only: an anonymous one in memory leaves nothing on disk."""
    descriptor = os.memfd_create("hpcq-key")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _context(purpose: int, authority: str, pair: KeyPair) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority)
    context.verify_mode = ssl.CERT_REQUIRED
    with _as_file(pair.certificate + pair.key) as path:
        context.load_cert_chain(path)
    return context


def manager_tls(identity: Identity) -> ssl.SSLContext:
    """For the side that listens; admits only this queue's pilot certificate."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity.authority, identity.manager)
    context.num_tickets = 0
    return context


def pilot_tls(info: ConnectionInfo) -> ssl.SSLContext:
    """For pilots and clients; accepts only this queue's manager. Use `MANAGER_NAME` as server name."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT, info.authority, info.pilot)
    context.check_hostname = True
    return context


def peer_tls(info: ConnectionInfo) -> ssl.SSLContext:
    """For a pilot that listens for others; admits only this queue's pilots. Its name is `PILOT_NAME`."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, info.authority, info.pilot)
    context.num_tickets = 0
    return context
