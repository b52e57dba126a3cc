"""Between a plain socket and a TLS stream: one direction that encrypts and one that decrypts."""

from __future__ import annotations

import socket

from vpn.relay.bucket import Budget
from vpn.relay.direction import Direction, Owner
from vpn.relay.tls import CHUNK, TlsError, TlsStream, buffers

MEMORY = 32 << 20  # bytes that all connections together read at once
RECORD = 16384


class _Held(Direction):
    """Bytes held in memory while the target takes no more.

    What OpenSSL's buffers have once grown to they keep: with many connections each reads less at once, so that all
    together stay within ``MEMORY``.
    """

    live = 0
    chunk = CHUNK

    def __init__(self, source: socket.socket, target: socket.socket, budget: Budget, owner: Owner) -> None:
        super().__init__(source, target, budget, owner)
        self.held: memoryview | bytes = b""
        self._raw = buffers.raw
        self._receive, self._send = self.source.recv_into, self.target.send
        _Held._count(1)

    @classmethod
    def _count(cls, more: int) -> None:
        _Held.live += more
        _Held.chunk = min(CHUNK, max(RECORD, MEMORY // max(1, _Held.live)))

    def stop(self) -> None:
        """Release everything; called once, always."""
        super().stop()
        _Held._count(-1)

    def put_out(self) -> None:
        """Send what is held; what is left is copied out of the shared buffer."""
        if not self.held:
            return
        try:
            sent = self._send(self.held)
        except BlockingIOError:
            sent = 0
        if sent == len(self.held):
            self.held = b""
            return
        self.held = memoryview(bytes(self.held[sent:]))
        raise BlockingIOError


class Seal(_Held):
    """From a plain socket into a TLS stream; its end becomes a close_notify."""

    def __init__(self, source: socket.socket, stream: TlsStream, budget: Budget, owner: Owner) -> None:
        super().__init__(source, stream.sock, budget, owner)
        self._stream = stream

    def take_in(self, limit: int) -> int:
        """Read and encrypt."""
        raw = self._raw
        count = self._receive(raw, limit)
        self.held = self._stream.seal(raw[:count]) if count else self._stream.seal_end()
        self.carried += count
        return count

    def finish(self) -> None:
        """The close_notify was sent already."""


class Unseal(_Held):
    """From a TLS stream to a plain socket; an end without close_notify is an error, for it may be an attack."""

    def __init__(self, stream: TlsStream, target: socket.socket, budget: Budget, owner: Owner) -> None:
        super().__init__(stream.sock, target, budget, owner)
        self._stream = stream

    def start(self) -> None:
        """Begin with what was received before."""
        if rest := self._stream.take_rest():
            self.held = rest
            self.carried += len(rest)
        self.source_ended = self._stream.receive_ended
        super().start()
        if self.held or self.source_ended:
            self.flush(waiting=False)

    def take_in(self, limit: int) -> int:
        """Read and decrypt."""
        raw = self._raw
        count = self._receive(raw, limit)
        if not count:
            raise TlsError("the connection was cut off")
        self.held = self._stream.unseal(raw[:count])
        self.carried += len(self.held)
        if self._stream.receive_ended:
            self.source_ended = True
        return count
