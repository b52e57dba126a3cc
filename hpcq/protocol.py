"""The connection between manager and pilot, without any I/O (after h11's manner).

Bytes go in, messages come out; messages go in, bytes come out. Every frame is a 4-byte big-endian length and that
many bytes of msgpack. The first frame each way is a *first word* (`PilotHello` or `ClientHello`, answered by
`Welcome` or `Refused`); only then do the messages of the role flow::

    OPENING --first word--> OPEN --frames--> OPEN
       \\----------------------\\-- garbage, over-long frame, wrong message --> FAILED (ProtocolError, for ever)

Before the first word a frame may be 64 KiB at most, so a stranger cannot make us buffer; afterwards 1 GiB.
May not live here: sockets, clocks, decisions about tasks.
"""

from __future__ import annotations

import struct
from enum import Enum, auto
from typing import Any, Generic, TypeVar, cast

import msgspec

from hpcq import messages as m
from hpcq.errors import ProtocolError

OPENING_LIMIT = 64 * 1024
FRAME_LIMIT = 1 << 30
LARGE_FRAME = 256 * 1024
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()

Received = TypeVar("Received")


def frame(message: msgspec.Struct) -> bytearray:
    """One message as bytes for the wire.

    Raises:
        ProtocolError: the message is larger than a frame may be (1 GiB).
    """
    whole = bytearray(_LENGTH.size)
    _encoder.encode_into(message, whole, _LENGTH.size)
    length = len(whole) - _LENGTH.size
    if length > FRAME_LIMIT:
        raise ProtocolError(
            f"a {type(message).__name__} message of {length} bytes is over the limit of {FRAME_LIMIT}; "
            "pass large data through files"
        )
    _LENGTH.pack_into(whole, 0, length)
    return whole


class FrameReader:
    """Cuts a byte stream into frames; holds at most one unfinished frame.

    A large frame is gathered in a buffer of its own, so that each of its bytes is copied once. It grows as they come:
    to announce a gigabyte costs us nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()
        self._large = bytearray()
        self._wanted = 0

    def feed(self, data: bytes, most: int | None = None) -> list[bytes | bytearray]:
        """All frames completed by ``data``; of these at most ``most``, the others at the next call.

        Raises:
            ProtocolError: a frame announces more than the limit.
        """
        frames: list[bytes | bytearray] = []
        if self._wanted:
            data = self._fill(data, frames)
            if self._wanted:
                return frames
        self._buffer += data
        position = self._cut(frames, most)
        if position:
            del self._buffer[:position]
        return frames

    def _fill(self, data: bytes, frames: list[bytes | bytearray]) -> bytes:
        """Add to the large frame at hand; returns what comes after it."""
        part = data if len(data) <= self._wanted else memoryview(data)[: self._wanted]
        self._large += part
        self._wanted -= len(part)
        if not self._wanted:
            frames.append(self._large)
            self._large = bytearray()
        return data[len(part) :]

    def _cut(self, frames: list[bytes | bytearray], most: int | None) -> int:
        """Take whole frames from the buffer, and the beginning of a large one; returns how much was taken."""
        position, end = 0, len(self._buffer)
        with memoryview(self._buffer) as view:
            while end - position >= _LENGTH.size and len(frames) != most:
                (length,) = _LENGTH.unpack_from(view, position)
                if length > self.limit:
                    raise ProtocolError(f"a frame of {length} bytes is over the limit of {self.limit}")
                begin = position + _LENGTH.size
                if begin + length <= end:
                    frames.append(bytes(view[begin : begin + length]))
                    position = begin + length
                elif length >= LARGE_FRAME:
                    self._large = bytearray(view[begin:end])
                    self._wanted = begin + length - end
                    return end
                else:
                    return position
        return position

    @property
    def empty(self) -> bool:
        """Whether no unfinished frame is held."""
        return not self._buffer and not self._wanted


class State(Enum):
    """Of one connection, as one side sees it."""

    OPENING = auto()
    OPEN = auto()
    FAILED = auto()


class Connection(Generic[Received]):
    """One side of a connection: ``first`` is the union its first frame must be of, ``then`` of the rest."""

    def __init__(self, first: Any, then: Any) -> None:
        self.state = State.OPENING
        self._frames = FrameReader(OPENING_LIMIT)
        self._first: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(first)
        self._then: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(then)

    def expect(self, then: Any) -> None:
        """Name the messages that may follow, once the first word has told who speaks."""
        self._then = msgspec.msgpack.Decoder(then)

    def receive(self, data: bytes) -> list[Received]:
        """The messages completed by ``data``, in order.

        The first word comes alone, so that its receiver can call `expect` before anything else is decoded; what
        came with it is returned by the next call, ``receive(b"")``.

        Raises:
            ProtocolError: these are not our messages; the connection is of no use any more.
        """
        if self.state is State.FAILED:
            raise ProtocolError("the connection has already failed")
        try:
            return self._receive(data)
        except (ProtocolError, msgspec.MsgspecError) as error:
            self.state = State.FAILED
            raise ProtocolError(f"not a message of protocol {m.PROTOCOL_VERSION}: {error}") from error

    def _receive(self, data: bytes) -> list[Received]:
        if self.state is State.OPENING:
            return self._receive_first(data)
        decode = self._then.decode
        return [cast(Received, decode(body)) for body in self._frames.feed(data)]

    def _receive_first(self, data: bytes) -> list[Received]:
        frames = self._frames.feed(data, most=1)
        if not frames:
            return []
        self.state = State.OPEN
        self._frames.limit = FRAME_LIMIT
        try:
            return [cast(Received, self._first.decode(frames[0]))]
        except msgspec.MsgspecError:
            _check_version(frames[0])
            raise


def _check_version(body: bytes | bytearray) -> None:
    """First words of every protocol begin with a name and a number, so that versions can name each other."""
    words = msgspec.msgpack.decode(body)
    if isinstance(words, list) and len(words) > 1 and isinstance(words[1], int) and words[1] != m.PROTOCOL_VERSION:
        raise ProtocolError(
            f"the other side speaks protocol {words[1]}, this one {m.PROTOCOL_VERSION}; "
            "use the same version of hpcq on both sides"
        )
