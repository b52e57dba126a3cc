"""TLS 1.3 over a non-blocking socket, with the ciphertext in our hands.

``TlsStream`` keeps OpenSSL away from the socket (``SSLObject`` and memory BIOs): whole buffers are read and written
at once instead of a record at a time, nothing blocks, and one direction can end (close_notify, RFC 8446, section
6.1) while the other goes on. The rule that makes this sound: whatever is put into the incoming BIO is decrypted at
once, so that an SSL_shutdown never finds data it would have to refuse.

The server is known by the pin of its key, not by names or authorities; a client sends nothing before it has
checked the pin.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import hmac
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from vpn.errors import TunnelError

CHUNK = 1 << 18  # bytes read from a socket at once
_HEADER = 5  # bytes before a record, its length in the last two (RFC 8446, section 5.1)
_SLACK = 1 << 15  # a record that was begun in the chunk before
T = TypeVar("T")


class Buffers(threading.local):
    """Scratch space, one for each thread: what is in it is used up before anything else runs."""

    def __init__(self) -> None:
        self.raw = memoryview(bytearray(CHUNK))
        self.plain = memoryview(bytearray(CHUNK + _SLACK))


buffers = Buffers()


class TlsError(OSError):
    """The encryption broke: not TLS, a record that was altered, or an end that was cut off."""


class TlsStream:
    """One connection. ``send_ended`` and ``receive_ended`` say which directions are over."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.sock = sock
        self.loop = asyncio.get_running_loop()
        self.receive_ended = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        bare = getattr(self.tls, "_sslobj", self.tls)  # where it is there, a call less for each read and write
        self._read, self._write = bare.read, bare.write
        self._plain = buffers.plain
        self.stepwise = False
        """Whether no byte is read beyond a record: the next may not be TLS any more."""
        self._rest = b""  # received before the pump began

    async def handshake(self) -> None:
        """Agree on keys; raises OSError."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.loop.sock_recv(self.sock, 65536)
                if not data:
                    raise TlsError("the connection ended during the TLS handshake") from None
                self._incoming.write(data)
            except ssl.SSLError as error:
                with suppress(OSError):  # an alert tells the peer why, if it still listens
                    await self._flush()
                raise TlsError(f"TLS: {error.reason or error}") from None
        await self._flush()
        self._rest = bytes(self.unseal(memoryview(b"")))  # what came right behind the last handshake message

    async def send(self, data: bytes) -> None:
        """Encrypt and send all of it; not while a pump runs."""
        await self.loop.sock_sendall(self.sock, self.seal(memoryview(data)))

    async def receive(self, take: Callable[[bytes], tuple[T, int] | None], limit: int = 1024) -> T:
        """The next message as ``take`` finds it; raises TlsError at an end, ValueError beyond ``limit`` bytes."""
        while (found := take(self._rest)) is None:
            if len(self._rest) > limit:
                raise ValueError(f"a message of more than {limit} bytes")
            rest = self.take_rest()
            data = await self.receive_some()
            if not data:
                raise TlsError("the connection ended in the middle of a message")
            self._rest = rest + data
        self._rest = self._rest[found[1] :]
        return found[0]

    async def receive_some(self) -> bytes:
        """Some plaintext; empty at an orderly end. Raises TlsError when it was cut off."""
        if self._rest:
            return self.take_rest()
        while not self.receive_ended:
            data = await self._receive_raw()
            if not data:
                raise TlsError("the connection was cut off")
            plain = bytes(self.unseal(memoryview(data)))
            if plain:
                return plain
        return b""

    async def leave(self) -> socket.socket:
        """The bare socket, once the peer's direction of TLS has ended; raises ValueError when it says more before."""
        if await self.receive_some():
            raise ValueError("data where the end of TLS was to come")
        return self.sock

    async def _receive_raw(self) -> bytes:
        if not self.stepwise:
            return await self.loop.sock_recv(self.sock, 65536)
        header = await self._receive_exactly(_HEADER)
        return header + await self._receive_exactly(int.from_bytes(header[-2:], "big"))

    async def _receive_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.loop.sock_recv(self.sock, count - len(data))
            if not more:
                raise TlsError("the connection was cut off")
            data += more
        return data

    def take_rest(self) -> bytes:
        """What was received beyond the last message."""
        rest, self._rest = self._rest, b""
        return rest

    async def end(self) -> None:
        """Say that nothing more will be sent; errors do not matter any more."""
        with suppress(OSError):
            await self.loop.sock_sendall(self.sock, self.seal_end())

    def seal(self, data: memoryview) -> bytes:
        """Ciphertext to send for this plaintext."""
        offset, size = 0, len(data)
        while offset < size:
            offset += self._write(data[offset:])
        return self._outgoing.read()

    def seal_end(self) -> bytes:
        """Ciphertext that ends our direction."""
        with suppress(ssl.SSLError):  # the peer's own end has not come: that is no error here
            self.tls.unwrap()
        return self._outgoing.read()

    def unseal(self, data: memoryview) -> memoryview:
        """Plaintext of this ciphertext, valid until the next call in this thread; raises TlsError.

        At most ``CHUNK`` bytes at once. Ciphertext that is due in answer (a change of keys) goes out with the next
        that is sent.
        """
        plain, offset, read, incoming = self._plain, 0, self._read, self._incoming
        incoming.write(data)
        try:
            while (
                incoming.pending
            ):  # asked in vain, it would make an exception, at some cost; a read takes all of a record
                got = read(len(plain) - offset, plain[offset:])
                if not got:
                    self.receive_ended = True
                    break
                offset += int(got)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.receive_ended = True
        except ssl.SSLError as error:
            raise TlsError(f"TLS: {error.reason or error}") from None
        return plain[:offset]

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self.loop.sock_sendall(self.sock, data)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A server's settings: TLS 1.3 only, no session tickets (each would be a message nobody uses)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(certificate, key)
    return context


@functools.cache
def client_context() -> ssl.SSLContext:
    """A client's settings: the key is pinned, so neither name nor authority is asked for (``check_key``)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def check_key(stream: TlsStream, pin: str) -> None:
    """Raise TunnelError unless the server has the pinned key; nothing may be sent before."""
    certificate = stream.tls.getpeercert(binary_form=True)
    found = pin_of_der(certificate) if certificate else ""
    if not hmac.compare_digest(found, pin):
        raise TunnelError(
            "gateway",
            "the server's key is not the pinned one: get a fresh credential from the gateway, "
            "or someone answers in its place",
        )


@functools.lru_cache(16)
def pin_of_der(certificate: bytes) -> str:
    """``pin-sha256:`` of a certificate's public key (RFC 7469, section 2.4), without a library that takes long to load.

    subjectPublicKeyInfo is the seventh part of a version 3 tbsCertificate (RFC 5280, section 4.1), the sixth
    without the version's tag.
    """
    try:
        body, _ = _der_inside(certificate, 0)
        offset, _ = _der_inside(certificate, body)
        if certificate[offset] == 0xA0:
            offset = _der_inside(certificate, offset)[1]
        for _ in range(5):  # serial number, signature, issuer, validity, subject
            offset = _der_inside(certificate, offset)[1]
        end = _der_inside(certificate, offset)[1]
    except IndexError:
        return ""
    return "pin-sha256:" + base64.b64encode(hashlib.sha256(certificate[offset:end]).digest()).decode()


def _der_inside(data: bytes, offset: int) -> tuple[int, int]:
    """Where the contents of a DER element begin and end (X.690, section 8.1)."""
    first = data[offset + 1]
    if first < 0x80:
        return offset + 2, offset + 2 + first
    count = first & 0x7F
    start = offset + 2 + count
    return start, start + int.from_bytes(data[offset + 2 : start], "big")
