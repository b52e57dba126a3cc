"""The gate: ports of loopback that never answer, and connections made from them. See the head of ``preload/socks.c``.

A listening socket whose queue is full drops what arrives, so a socket that connects to it stays "in progress" until we
connect from the gate's own address to the socket's: a simultaneous open (RFC 9293, section 3.5). ``meet`` does that.
Before, the kernel is asked whether that very socket still waits (sock_diag(7)): its program may have gone, and
another's listener may have its port.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
import struct
from contextlib import suppress

from vpn.errors import TunnelError
from vpn.shim.table import Address

LOOPBACK: dict[int, str] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
MEET_DEADLINE = 90.0  # seconds; more than the kernel remembers a closed connection (TIME_WAIT, 60 s)
MEET_AGAIN = 0.25
TRIAL_DEADLINE = 5.0

_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, _NLMSG_ERROR, _SYN_SENT = 20, 1, 2, 2
_NETLINK_SOCK_DIAG = 4
_MESSAGE = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")
_TUPLE = struct.Struct(">HH16s16s")
_ANSWER = struct.Struct("=BBBB48xIIIII")  # family, state, …, and at the end uid and inode


class Gate:
    """The ports of one session; ``ports`` by family, IPv6 only where the node has it."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self.ports: dict[int, int] = {}
        self._diag: socket.socket | None = None
        with suppress(OSError):
            self._diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
        try:
            self._open(socket.AF_INET)
            with suppress(OSError):
                self._open(socket.AF_INET6)
        except OSError as error:
            self.close()
            raise TunnelError("shim", f"no port of loopback can be kept: {error.strerror}") from None

    def _open(self, family: int) -> None:
        listener = socket.socket(family, socket.SOCK_STREAM)
        self._held.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((LOOPBACK[family], 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        filler = socket.socket(family, socket.SOCK_STREAM)  # never accepted: the queue is full from now on
        self._held.append(filler)
        filler.connect((LOOPBACK[family], port))
        self.ports[family] = port

    async def meet(self, family: int, local: Address, port: int, inode: int) -> socket.socket:
        """Connect to a socket that waits at the gate; raises ConnectionError when it does no longer."""
        async with asyncio.timeout(MEET_DEADLINE):
            while True:
                if not self._is_waiting(family, local, port, inode):
                    raise ConnectionAbortedError(errno.ECONNABORTED, "the program has given up")
                try:
                    return await self._connect(family, local, port)
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:  # the same ports were used moments ago
                        raise
                await asyncio.sleep(MEET_AGAIN)

    async def _connect(self, family: int, local: Address, port: int) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((LOOPBACK[family], self.ports[family]))
            await asyncio.get_running_loop().sock_connect(sock, (str(local), port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _is_waiting(self, family: int, local: Address, port: int, inode: int) -> bool:
        """Whether this very socket is in SYN_SENT to the gate; where the kernel does not tell: yes."""
        if self._diag is None:
            return True
        gate = ipaddress.ip_address(LOOPBACK[family])
        identity = _TUPLE.pack(port, self.ports[family], local.packed, gate.packed) + bytes(4) + b"\xff" * 8
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0xFFFFFFFF) + identity
        message = _MESSAGE.pack(_MESSAGE.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0) + body
        try:
            self._diag.send(message)
            answer = self._diag.recv(4096, socket.MSG_DONTWAIT)
        except OSError:
            return True
        return is_waiting(answer, inode)

    async def prove(self) -> None:
        """Try it once; raises TunnelError where the node's kernel or firewall does not let it."""
        loop = asyncio.get_running_loop()
        for family in list(self.ports):
            try:
                async with asyncio.timeout(TRIAL_DEADLINE):
                    await self._try(loop, family)
            except (OSError, TimeoutError) as error:
                if family == socket.AF_INET:
                    text = "loopback does not carry mode socks' connections here (a firewall, or a sandbox's kernel)"
                    raise TunnelError("shim", f"{text}: {error or 'no answer'}") from None
                del self.ports[family]

    async def _try(self, loop: asyncio.AbstractEventLoop, family: int) -> None:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
            code = client.connect_ex((LOOPBACK[family], self.ports[family]))
            if code != errno.EINPROGRESS:
                raise OSError(code, f"connecting to the gate: {os.strerror(code)}")
            address, port = client.getsockname()[:2]
            inode = os.fstat(client.fileno()).st_ino
            with await self.meet(family, ipaddress.ip_address(address), port, inode) as server:
                await loop.sock_sendall(client, b"?")
                if await loop.sock_recv(server, 1) != b"?":
                    raise OSError(errno.EIO, "bytes were lost")

    def close(self) -> None:
        """Close the ports: who waits at them is refused."""
        for sock in self._held:
            sock.close()
        if self._diag is not None:
            self._diag.close()


def is_waiting(answer: bytes, inode: int) -> bool:
    """Read sock_diag's answer about one socket."""
    if len(answer) < _MESSAGE.size:
        return True
    kind = _MESSAGE.unpack_from(answer)[1]
    if kind == _NLMSG_ERROR:
        code = -int(struct.unpack_from("=i", answer, _MESSAGE.size)[0]) if len(answer) >= _MESSAGE.size + 4 else 0
        return code != errno.ENOENT  # anything else: this kernel has no answer
    if kind != _SOCK_DIAG_BY_FAMILY or len(answer) < _MESSAGE.size + _ANSWER.size:
        return True
    fields = _ANSWER.unpack_from(answer, _MESSAGE.size)
    return bool(fields[1] == _SYN_SENT and fields[-1] == inode & 0xFFFFFFFF)
