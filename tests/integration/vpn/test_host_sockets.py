"""Sockets of the host's for a server that is elsewhere: what is granted, what is refused, and the shim's part."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import socket
import struct
import sys

import pytest
from conftest import SHIMS

from vpn.errors import GatewayError
from vpn.gateway.host_sockets import HostSockets, inherit, open_sockets

pytestmark = pytest.mark.usefixtures("prerequisites")


@contextlib.asynccontextmanager
async def serving(listen="127.0.0.1"):
    sockets: HostSockets = open_sockets(listen, 0)
    asking = sockets.serve()
    asking.setblocking(False)
    try:
        yield sockets, asking
    finally:
        asking.close()
        sockets.close()


async def ask(asking, data):
    """The errno, and the socket granted or None."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(asking, data)
    ready = asyncio.Event()
    loop.add_reader(asking, ready.set)
    await ready.wait()
    loop.remove_reader(asking)
    answer, ancillary, _, _ = asking.recvmsg(64, socket.CMSG_SPACE(4))
    fds = array.array("i", b"".join(part[2] for part in ancillary))
    return struct.unpack("=i", answer)[0], socket.socket(fileno=fds[0]) if fds else None


def request(kind, address, family=socket.AF_INET):
    packed = socket.inet_pton(family, address) if isinstance(address, str) else address
    return struct.pack("=ii16s", kind, family, packed)


def test_grants_what_it_listens_on_and_a_clients_own_udp_socket():
    async def main():
        async with serving() as (sockets, asking):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_DGRAM):
                code, got = await ask(asking, request(kind, "127.0.0.1"))
                assert code == 0
                with got:
                    assert got.type == kind
                    assert got.getsockname() == ("127.0.0.1", sockets.port)
            with socket.create_connection(("127.0.0.1", sockets.port)):
                pass

    asyncio.run(main())


@pytest.mark.parametrize("listen", ["", "127.0.0.1"])
def test_a_connected_udp_socket_gets_its_peers_packets_and_the_listening_one_the_others(listen):
    async def main():
        async with serving(listen) as (sockets, asking):
            _, listening = await ask(asking, request(socket.SOCK_DGRAM, listen or "0.0.0.0"))
            _, own = await ask(asking, request(socket.SOCK_DGRAM, "127.0.0.1"))
            peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
            for peer in peers:
                peer.bind(("127.0.0.1", 0))
            own.connect(peers[0].getsockname())
            for number, peer in enumerate(peers):
                peer.sendto(b"%d" % number, ("127.0.0.1", sockets.port))
            for sock, data in ((own, b"0"), (listening, b"1")):
                sock.settimeout(60)
                assert sock.recv(10) == data
            own.send(b"answer")
            peers[0].settimeout(90)
            assert peers[0].recvfrom(10) == (b"answer", ("127.0.0.1", sockets.port))
            for sock in (listening, own, *peers):
                sock.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", None),
        (b"x", errno.EINVAL),
        (bytes(1000), errno.EINVAL),
        (request(socket.SOCK_STREAM, "127.0.0.2"), errno.EADDRNOTAVAIL),
        (request(socket.SOCK_DGRAM, "127.0.0.2"), errno.EADDRNOTAVAIL),
        (request(socket.SOCK_RAW, "127.0.0.1"), errno.EADDRNOTAVAIL),
        (request(socket.SOCK_STREAM, bytes(16), socket.AF_UNIX), errno.EINVAL),
        (request(socket.SOCK_STREAM, "::1", socket.AF_INET6), errno.EADDRNOTAVAIL),
        (struct.pack("=ii16s", -1, 2**31 - 1, bytes(16)), errno.EINVAL),
    ],
)
def test_refuses_everything_else_and_goes_on(data, code):
    async def main():
        async with serving() as (_, asking):
            if data:
                assert await ask(asking, data) == (code, None)
                code_of_good, got = await ask(asking, request(socket.SOCK_STREAM, "127.0.0.1"))
                assert code_of_good == 0
                got.close()
            else:
                asking.close()
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_port_is_taken_as_a_whole_or_refused():
    own = "127.45.67.89"  # nobody else's connections have a port of
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((own, 0))
        port = taken.getsockname()[1]
        with pytest.raises(GatewayError, match=f"port {port}: Address already in use; choose another"):
            open_sockets(own, port)
    open_sockets(own, port).close()


SERVER = """
import socket, sys
port = int(sys.argv[1])
def attempt(kind, address):
    sock = socket.socket(socket.AF_INET, kind)
    inheritable = sock.get_inheritable()
    try:
        sock.bind((address, port))
    except OSError as error:
        return error.errno
    assert sock.get_inheritable() == inheritable
    return sock.getsockname() == (address, port)
tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
print(attempt(tcp, "127.0.0.1"), attempt(udp, "127.0.0.1"), attempt(tcp, "127.0.0.9"))
port = 0
other = socket.socket(); other.bind(("127.0.0.1", 0))
unix = socket.socket(socket.AF_UNIX); unix.bind(b"\\0" + sys.argv[2].encode())
print(other.getsockname()[1] > 0, unix.getsockname()[1:].decode())
import os
print(os.environ.get("VPN_HOST_SOCKETS"), os.environ["LD_PRELOAD"] != "")
"""


def test_the_shim_asks_for_its_port_and_nothing_else():
    async def main():
        async with serving() as (sockets, _):
            with sockets.serve() as asking:
                shim = str(SHIMS / "host_sockets.so")
                env = {**os.environ, "LD_PRELOAD": shim, "VPN_HOST_SOCKETS": inherit(asking.fileno(), sockets.port)}
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", SERVER, str(sockets.port), f"test-{os.getpid()}",
                    env=env, pass_fds=[asking.fileno()], stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
            output, _ = await process.communicate()
        assert process.returncode == 0
        assert output.decode().splitlines() == [
            f"True True {errno.EADDRNOTAVAIL}",
            f"True test-{os.getpid()}",
            "None True",
        ]

    asyncio.run(main())


@pytest.mark.parametrize("setting", ["", "x", "3", "3:", "3:0", "3:70000", "999:1", "3:1x"])
def test_the_shim_refuses_a_setting_that_is_none(setting):
    async def main():
        env = {"LD_PRELOAD": str(SHIMS / "host_sockets.so"), "VPN_HOST_SOCKETS": setting}
        process = await asyncio.create_subprocess_exec("/bin/true", env=env, stderr=asyncio.subprocess.PIPE)
        _, error = await process.communicate()
        assert process.returncode == -6
        assert b"is not an open descriptor and a port" in error

    asyncio.run(main())
