"""An ocserv as a site's root would run it, to compare our gateway with: it routes packets and knows nothing of ours.

Its settings are those that Debian's package ships, but for places, addresses and limits: DTLS where UDP passes, packets
of the path's size. To clients that ask for them it grants packets as large as a TLS record.
The host forwards and masquerades for its clients while it runs, by a table of its own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from vpn.config import Credential, Secret
from vpn.errors import GatewayError
from vpn.gateway.certificate import make_certificate, pin_of
from vpn.gateway.ocserv import READY
from vpn.gateway.outside import own_addresses
from vpn.gateway.passwords import file_text, hash_password
from vpn.pipes import read_lines
from vpn.process import Client, Process, run
from vpn.programs import environment, find_program

CLIENTS = "198.51.100.0/24"  # RFC 5737: nobody else's
START_DEADLINE = 20.0
TOOL_DEADLINE = 20.0
TABLE = "hpcq_bench"
USER = "bench"
NOBODY = 65534
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_NAT = f"""\
table ip {TABLE} {{
    chain out {{ type nat hook postrouting priority 100; ip saddr {CLIENTS} oifname != "vpns*" masquerade; }}
}}
"""


def configuration(room: str, port: int, user: str) -> str:
    """ocserv.conf (ocserv(8)); pure. ``user`` is who its workers are."""
    network, _, _ = CLIENTS.partition("/")
    return f"""\
auth = "plain[passwd={room}/passwd]"
tcp-port = {port}
udp-port = {port}
run-as-user = {user}
run-as-group = {"nogroup" if user == "nobody" else user}
socket-file = {room}/ocserv
pid-file = {room}/pid
server-cert = {room}/cert.pem
server-key = {room}/key.pem
isolate-workers = true
max-clients = 0
max-same-clients = 0
keepalive = 32400
dpd = 90
mobile-dpd = 1800
switch-to-tcp-timeout = 25
try-mtu-discovery = false
mtu = 16000
tls-priorities = "NORMAL:%SERVER_PRECEDENCE:%COMPAT:-VERS-SSL3.0:-VERS-TLS1.0:-VERS-TLS1.1:-VERS-TLS1.3"
auth-timeout = 240
cookie-timeout = 300
deny-roaming = false
rekey-time = 172800
rekey-method = ssl
use-occtl = false
log-level = 2
device = vpns
predictable-ips = true
ipv4-network = {network}
ipv4-netmask = 255.255.255.0
ping-leases = false
route = default
cisco-client-compat = true
dtls-legacy = true
"""


async def start_plain(keeper: Client, stack: AsyncExitStack) -> tuple[Credential, Process]:
    """Start one, whose end is pushed on ``stack``; who to be there, and its process. Raises VpnError."""
    if os.geteuid():
        raise GatewayError("a plain ocserv needs root where the gateway is (--site as root, or --root 'sudo -n')")
    program, nft = find_program("ocserv"), find_program("nft")
    room = tempfile.mkdtemp(prefix="ocserv-", dir="/run")  # short: its sockets' paths have 108 bytes
    stack.callback(shutil.rmtree, room, ignore_errors=True)
    credential = _furnish(room)
    await _forward(keeper, nft, stack)
    process = await _serve(keeper, [program, "--foreground", "--config", f"{room}/ocserv.conf"], stack)
    return credential, process


def _furnish(room: str) -> Credential:
    """Its files; who to be there."""
    password, port, worker = secrets.token_urlsafe(24), _free_port(), _worker()
    key, certificate = make_certificate("bench")
    contents = {
        "key.pem": key.decode(),
        "cert.pem": certificate.decode(),
        "passwd": file_text([(USER, hash_password(password))]),
        "ocserv.conf": configuration(room, port, worker),
    }
    for name, text in contents.items():
        path = Path(room, name)
        path.touch(0o600)
        path.write_text(text)
    if worker != "root":
        Path(room).chmod(0o711)  # workers connect to a socket in it
    addresses = tuple(dict.fromkeys(text for text in own_addresses() if not _is_own(text)))
    return Credential(addresses, port, pin_of(certificate), USER, Secret(password))


def _switch(text: str) -> str:
    """Write whether this host forwards; what it was before."""
    before = _FORWARD.read_text()
    _FORWARD.write_text(text)
    return before


async def _forward(keeper: Client, nft: str, stack: AsyncExitStack) -> None:
    stack.callback(_switch, _switch("1"))

    async def drop() -> None:
        with suppress(OSError, TimeoutError):
            await run(keeper, [nft, "delete", "table", "ip", TABLE], env=environment(), deadline=TOOL_DEADLINE)

    stack.push_async_callback(drop)
    status, said = await run(keeper, [nft, "-f", "-"], stdin=_NAT.encode(), env=environment(), deadline=TOOL_DEADLINE)
    if status:
        raise GatewayError(f"nft cannot set up masquerading: {said.strip() or f'status {status}'}")


async def _serve(keeper: Client, argv: list[str], stack: AsyncExitStack) -> Process:
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    ready, last = asyncio.get_running_loop().create_future(), ""

    async def read() -> None:
        nonlocal last
        async for line in read_lines(reader):
            last = line.strip() or last
            if READY in line and not ready.done():
                ready.set_result(None)

    reading = asyncio.create_task(read())
    stack.callback(reading.cancel)
    try:
        process = await keeper.spawn(argv, env=environment(), cwd="/", stdin=null, stdout=writer, stderr=writer)
    finally:
        os.close(writer)
        os.close(null)
    stack.push_async_callback(process.end)
    await asyncio.wait([ready, reading], timeout=START_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        raise GatewayError(f"a plain ocserv did not start: {last or 'it said nothing'}")
    return process


def _worker() -> str:
    """An ordinary user, where there is one: not in a user namespace of few ids."""
    maps = Path("/proc/self/uid_map").read_text().splitlines()
    return "nobody" if any(int(line.split()[2]) > NOBODY for line in maps) else "root"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])


def _is_own(address: str) -> bool:
    return address.startswith(("127.", "fe80:")) or address == "::1"
