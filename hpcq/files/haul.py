"""Connections that carry parcels: blocking, in threads, since that moves three times what asyncio's TLS does.

A pilot opens one to the manager's port as it does for files, with a first word that says what it is for. Once welcomed,
both sides leave the event loop and its TLS behind and shake hands anew on the same TCP connection, with the same
certificates; from then on a thread on either side owns it::

    pilot: Take(task) --> Following(size) + bytes | Refusal(reason)
    pilot: Bring(task, size) + bytes --> Kept(error)

The bytes of a parcel are sent as they are. Whoever cannot write what arrives reads it to its end all the same, so that
the connection stays in step and the other side is told why. A side that makes no progress for `STALL` seconds is given
up. May not live here: which parcel is whose.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from hpcq import messages as m
from hpcq.errors import ProtocolError
from hpcq.files.wire import CONNECT_TIMEOUT, MESSAGE_LIMIT, STALL, TURN_TIMEOUT, DataError, describe
from hpcq.parcels import STEP, Parcel
from hpcq.protocol import frame

LOOK_AGAIN = 1.0
"""Seconds after which whoever waits for its turn sees whether that is over."""

_LENGTH = struct.Struct(">I")
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 48)]


class Take(m.Message):
    """Give me the arguments of this task."""

    task: int


class Bring(m.Message):
    """Here is the result of this task, so many bytes."""

    task: int
    size: Size


class Following(m.Message):
    """So many bytes follow."""

    size: Size


class Refusal(m.Message):
    """There is nothing to give, and why."""

    reason: str


class Kept(m.Message):
    """What was brought is here, or could not be kept and why."""

    error: str = ""


Request = Take | Bring


class Haul:
    """One such connection, as either side has it; used by one thread at a time."""

    def __init__(self, sock: ssl.SSLSocket, where: str) -> None:
        self._sock = sock
        self._room = memoryview(bytearray(STEP))
        self.where = where

    def send(self, message: msgspec.Struct) -> None:
        """One message.

        Raises:
            DataError: the connection is gone.
        """
        with self._trouble():
            self._sock.sendall(frame(message))

    def receive(self, kind: Any, seconds: float = STALL) -> Any:
        """The next message, of the union ``kind``.

        Raises:
            DataError: the connection is gone, or nothing came.
            ProtocolError: it is something else.
        """
        with self._trouble(seconds):
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if length > MESSAGE_LIMIT:
                raise ProtocolError(f"{self.where} sent a message of {length} bytes")
            body = bytes(self._exactly(length))
        try:
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"{self.where} sent what is not ours: {error}") from error

    def _exactly(self, size: int) -> memoryview:
        if size > len(self._room):
            return self._fill(memoryview(bytearray(size)))
        return self._fill(self._room[:size])

    def _fill(self, room: memoryview) -> memoryview:
        filled = 0
        while filled < len(room):
            count = self._sock.recv_into(room[filled:])
            if not count:
                raise EOFError("it was closed by the other side")
            filled += count
        return room

    def send_parcel(self, parcel: Parcel) -> None:
        """All its bytes.

        Raises:
            DataError: the connection is gone.
            OSError: the parcel cannot be read; the connection is of no use any more.
        """
        sent = 0
        while sent < parcel.size:
            part = parcel.read(sent, self._room)
            with self._trouble():
                self._sock.sendall(part)
            sent += len(part)

    def receive_parcel(self, parcel: Parcel | None, size: int) -> str:
        """Fill it (None: throw away) with the next ``size`` bytes; why it cannot be written, or an empty string.

        Raises:
            DataError: the connection is gone.
        """
        failure = ""
        done = 0
        while done < size:
            with self._trouble():
                part = self._fill(self._room[: size - done])
            if parcel is not None and not failure:
                try:
                    parcel.write(done, part)
                except OSError as error:
                    failure = describe(error)  # not the error itself, whose traceback would keep the parcel
            done += len(part)
        return failure

    @contextlib.contextmanager
    def _trouble(self, seconds: float = STALL) -> Any:
        try:
            if self._sock.gettimeout() != seconds:
                self._sock.settimeout(seconds)
            yield
        except TimeoutError as error:
            raise DataError(f"no progress with {self.where} for {seconds:g} s") from error
        except (OSError, EOFError, ValueError) as error:  # ValueError: it was closed in another thread
            raise DataError(f"the data connection with {self.where} broke: {error}") from error

    def hang_up(self) -> None:
        """End it at once, also for a thread that waits on it; may be called by any thread."""
        with contextlib.suppress(OSError):  # not SSLSocket's own: from then on that would let bytes pass unencrypted
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it; by the thread that uses it."""
        with contextlib.suppress(OSError):
            self._sock.close()


def answer(sock: socket.socket, tls: ssl.SSLContext, where: str) -> Haul:
    """The manager's side of a connection that has left the event loop.

    Raises:
        DataError: the other side does not know the queue's key, or is gone.
    """
    try:
        sock.settimeout(STALL)
        return Haul(tls.wrap_socket(sock, server_side=True), where)
    except OSError as error:
        sock.close()
        raise DataError(f"{where} did not shake hands: {error}") from error


def connect(  # noqa: PLR0917 - all differ in type
    addresses: list[str],
    port: int,
    tls: ssl.SSLContext,
    server_name: str,
    pilot: str,
    is_over: Callable[[], bool] = lambda: False,
) -> Haul:
    """Open one to the manager, present ourselves, and wait until it is our turn, or ``is_over``.

    Raises:
        DataError: nobody answers at any of the addresses, or we are refused; says what happened.
    """
    failures = []
    for address in addresses:
        where = f"{address}:{port}"
        try:
            plain = socket.create_connection((address, port), CONNECT_TIMEOUT)
        except OSError as error:
            failures.append(f"{where}: {describe(error)}")
            continue
        return _present(plain, tls, server_name, pilot, where, is_over)
    raise DataError(f"no data connection: {'; '.join(failures) or 'no address is known'}")


def _present(  # noqa: PLR0917 - as above
    plain: socket.socket, tls: ssl.SSLContext, server_name: str, pilot: str, where: str, is_over: Callable[[], bool]
) -> Haul:
    sock = plain
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock = tls.wrap_socket(plain, server_hostname=server_name)
        first = Haul(sock, where)
        first.send(m.DataHello(m.PROTOCOL_VERSION, pilot, parcels=True))
        welcome = first.receive(m.FirstAnswer)
        if isinstance(welcome, m.Refused):
            raise DataError(f"{where} refused a data connection: {welcome.reason}")
        plain = socket.socket(fileno=sock.detach())
        plain.settimeout(LOOK_AGAIN)
        sock = tls.wrap_socket(plain, server_hostname=server_name, do_handshake_on_connect=False)
        _await_turn(sock, is_over)
        return Haul(sock, where)
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise DataError(f"{where} did not shake hands: {error}") from error
        raise


def _await_turn(sock: ssl.SSLSocket, is_over: Callable[[], bool]) -> None:
    """Shake hands anew: the manager does when it has a thread for us, and there may be hundreds before us."""
    deadline = time.monotonic() + TURN_TIMEOUT
    while True:
        try:
            sock.do_handshake()
        except TimeoutError:
            if is_over() or time.monotonic() >= deadline:
                raise
        else:
            return
