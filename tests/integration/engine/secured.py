"""Both ends of a connection of `hpcq.secure`, on real sockets with a queue's own certificates."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct

from running import DEADLINE

from hpcq import connection, secure
from hpcq.identity import make_identity


class End(asyncio.Protocol):
    """One end: what it was told, in order. A test may give it other things to do."""

    def __init__(self):
        self.received = bytearray()
        self.calls = []
        self.lost = []
        self.failures = []
        self._changed = asyncio.Event()

    def _note(self, what):
        self.calls.append(what)
        self._changed.set()

    def connection_made(self, transport):
        self.transport = transport
        self._note("made")

    def data_received(self, data):
        assert data
        assert not self.lost
        self.received += data
        self._changed.set()

    def eof_received(self):
        self._note("eof")

    def pause_writing(self):
        self._note("pause")

    def resume_writing(self):
        self._note("resume")

    def connection_lost(self, exc):
        self.lost.append(exc)
        self._note("lost")

    async def until(self, condition):
        """Wait for something it is told."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    async def gone(self):
        """The error it was lost with; looks that it was told so once, and that nothing of the connection is left."""
        await self.until(lambda: self.lost)
        for _ in range(3):
            await asyncio.sleep(0)
        assert self.calls.count("lost") == 1
        assert self.transport.is_closing()
        assert self.transport.get_extra_info("socket").fileno() == -1
        self.transport.write(b"to nobody")
        self.transport.pause_reading()
        self.transport.resume_reading()
        self.transport.close()
        self.transport.abort()
        await asyncio.sleep(0)
        assert len(self.lost) == 1
        return self.lost[0]


class Keys:
    """The contexts of a queue: its manager's side and its pilots'."""

    def __init__(self):
        self.identity = make_identity("q")
        self.manager, self.pilot = connection.manager_tls(self.identity), self.of_pilot(self.identity)

    def of_pilot(self, known):
        """The context of a pilot that believes our manager, and is known by another identity's key."""
        authority = self.identity.authority
        return connection.pilot_tls(connection.ConnectionInfo("q", 1, [], 0, "", 0, authority, known.pilot))


def plain(kind="unix"):
    """Two connected sockets."""
    if kind == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def reset(sock):
    """Close it so that the other side is told of a reset; TCP only."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def as_manager(sock, keys, end=End):
    return (await secure.secure(sock, keys.manager, end, timeout=DEADLINE))[1]


async def as_pilot(sock, keys, end=End, context=None):
    name = connection.MANAGER_NAME
    return (await secure.secure(sock, context or keys.pilot, end, server_hostname=name, timeout=DEADLINE))[1]


async def pair(keys, kind="unix", pilot=End, manager=End):
    """The pilot's end and the manager's, connected."""
    ours, theirs = plain(kind)
    return await asyncio.gather(as_pilot(ours, keys, pilot), as_manager(theirs, keys, manager))


class Bare:
    """An end without a transport: TLS by hand, so that the other end sees what a transport never does."""

    def __init__(self, sock, context, name=None):
        self.sock = sock
        sock.setblocking(False)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, name is None, name)

    async def shake_hands(self, *and_say):
        """Handshake, and say this together with its last word, in a record each."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self.send(self.outgoing.read())
                self.incoming.write(await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16))
        for data in and_say:
            self.tls.write(data)
        await self.send(self.outgoing.read())

    def seal(self, data):
        """The ciphertext of it; not sent."""
        self.tls.write(data)
        return self.outgoing.read()

    def seal_end(self):
        """A close_notify; not sent."""
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        return self.outgoing.read()

    async def send(self, data):
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self):
        """What the other side says, to the end of what it says."""
        received = bytearray()
        while True:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                while data := self.tls.read(1 << 16):
                    received += data
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            if not data:
                return received
            self.incoming.write(data)


@contextlib.asynccontextmanager
async def bare(keys, kind="unix", end=End):
    """The pilot's end, and a bare manager's."""
    ours, theirs = plain(kind)
    with theirs:
        other = Bare(theirs, keys.manager)
        one, _ = await asyncio.gather(as_pilot(ours, keys, end), other.shake_hands())
        yield one, other


async def let_all_run():
    """A few turns of the loop: all that is ready to happen happens."""
    for _ in range(5):
        await asyncio.sleep(0)


def play(scenario):
    """Run it, and look that nothing went wrong unseen; returns what the loop was told of."""
    told = []

    async def run():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        async with asyncio.timeout(DEADLINE):
            await scenario

    asyncio.run(run())
    return told
