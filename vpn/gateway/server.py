"""ocserv in its namespace: bring-up, credentials, and the events that end it. Read this file for the
sequence.

1. a keeper outside, a namespace whose root is the caller (``vpn.holder``);
2. ocserv's port, TCP and UDP, is the host's own (``host_sockets``), and the way out is the data plane (``plane``), by
   sockets for clients' TCP and DNS, and a tun device, ``out0``, for the rest;
   with ``uplink=slirp4netns`` slirp4netns forwards the port, and is the way out by ``tap0``;
3. the packet filter (``rules``), which says what goes where;
4. a private directory: key, certificate, configuration, password file and ocserv's sockets exist only in it;
5. ocserv, with the shims ``preload/one_id.c``, ``last_words.c`` and ``host_sockets.c``; ready when it says so.

Where a program, a shim or namespaces are missing, ``refusal`` says so and openconnect is not offered; the relay is.
Credentials count in one place only: a login at the relay (``relayed``) withdraws the password here, one here is told
to ``spent``. They are kept on disk (``store``): a gateway that is started again under its name takes them over.

The data plane and slirp4netns are started again when they end by themselves: no tunnel ends with them. With any other
of these processes the server has ended (``ended`` resolves with the reason), and the daemon starts its ``successor``,
which has its port and its credentials. A pipe is the event channel of ocserv's connect script.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from vpn.errors import GatewayError, TunnelError, VpnError
from vpn.gateway import ocserv, state
from vpn.gateway.addresses import DNS_PORT, OUT, PLANE, UPLINK_DNS
from vpn.gateway.background import Background
from vpn.gateway.certificate import load_or_make, pin_of
from vpn.gateway.credentials import RELAY, UNUSED, UNUSED_LIFETIME, Book
from vpn.gateway.host_sockets import HostSockets, has_ipv6, inherit, open_sockets
from vpn.gateway.lesser import access_log, lesser_user
from vpn.gateway.outside import own_addresses
from vpn.gateway.passwords import file_text
from vpn.gateway.plane_client import DataPlane
from vpn.gateway.plane_messages import DEVICE_FD, DNS_TCP_FD, DNS_UDP_FD, LEDGER_FD, LISTENER_FD, Figure, Settings
from vpn.gateway.policy import Policy
from vpn.gateway.rules import ruleset
from vpn.gateway.slirp import PROTOTYPE_MTU, TAP_MTU, Slirp, start_slirp
from vpn.gateway.state import GatewayConfig
from vpn.gateway.store import Store
from vpn.kept import Kept, Tally
from vpn.namespace import open_namespace
from vpn.pipes import read_lines
from vpn.process import Client, Process, run, start_keeper
from vpn.programs import environment, find_program, find_shim

log = logging.getLogger("vpn.gateway")

DISMISSAL = 5.0  # seconds for ocserv's workers to tell their clients that the gateway ends
OCSERV_GRACE = 15.0  # seconds to tell every client that it ends: those that are not told dial again and again
OCSERV_DEADLINE = 20.0
DISK_PATIENCE = 2.0  # seconds: a credential is given although it may not outlive the gateway
TOOL_DEADLINE = 20.0
OUT_MTU = 65535  # bytes: every packet
OUT_QUEUE = 1000  # packets that wait for a data plane that is busy, or being started again
_LACKING = {"program", "shim", "user namespaces", "tun"}  # layers without which there is no openconnect


class Server:
    """A running ocserv; made by ``Server.start`` and ended by ``close``."""

    def __init__(self, config: GatewayConfig, directory: Path, sockets: Path) -> None:
        self.config = config
        self.directory = directory
        self.sockets = sockets
        self.book = Book()
        self.tally = Tally()
        self.user = lesser_user() if config.privileged else ""  # whom what needs no privilege becomes
        self.port = 0
        self.pin = ""
        self.room = ""
        self.refusal = ""
        self.ledger = -1  # of the bandwidth that the data plane shares with the relay: the daemon's, -1 for none
        self.spent: Callable[[str], None] = lambda _username: None
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._host: HostSockets | None = None
        self._plane: DataPlane | None = None
        self._slirp: Slirp | None = None
        self._ocserv: Process | None = None
        self._fresh = True
        self._store = Store(directory / "credentials.json", self.book.saved)
        self._name_servers = [server for server in config.dns if ":" not in server] or [UPLINK_DNS]
        self._epoch = time.time() - time.monotonic()
        self._stack = AsyncExitStack()
        self._passwords = asyncio.Lock()
        self._background = Background(self._end)
        self._dismissed: asyncio.Future[None] | None = None
        self._closed = False

    def successor(self) -> Server:
        """One to be started in place of this one, which has ended: with its port, and whom it knows."""
        config = replace(self.config, port=self.port)
        other = Server(config, self.directory, self.sockets)
        other.book, other.tally, other.ledger, other.spent = self.book, self.tally, self.ledger, self.spent
        other._store, other._fresh = self._store, False
        self.book.lost(relayed=False, now=self._now())
        return other

    async def start(self) -> None:
        """Bring everything up, or say in ``refusal`` what this host lacks; on an error what was started is ended."""
        self.pin = pin_of(load_or_make(self.directory, self.config.name)[1].encode())
        if self._fresh:
            self.book.restore(self._store.load(), self._now())
        self._expire_in_time()
        try:
            await self._start()
        except TunnelError as error:
            if error.layer not in _LACKING:
                raise
            self.port, self.refusal = 0, str(error)
            self._host = self._plane = None
            log.warning("openconnect is not offered: %s", error)

    async def _start(self) -> None:
        privileged, slirp = self.config.privileged, self.config.uplink != "sockets"
        needed = ("ocserv", "occtl", "nft", *(("slirp4netns",) if slirp else ()))
        programs = {name: find_program(name) for name in needed}
        sockets = () if slirp else ("host_sockets",)
        names = (*(() if privileged else ("one_id",)), "last_words", *sockets)
        shims = [find_shim(name) for name in names]
        try:
            if not slirp:
                self._host = open_sockets(self.config.listen, self.config.port, state.last_port(self.directory))
                self._stack.callback(self._host.close)
                self.port = self._host.port
            keeper = await start_keeper()
            self._stack.push_async_callback(keeper.close)
            self._watch(keeper.client.lost, "the process keeper")
            self.namespace = await open_namespace(keeper.client, "privileged" if privileged else "root")
            self._stack.push_async_callback(self.namespace.close)
            self._watch(self.namespace.client.lost, "the namespace's holder")
            plane_port = 0
            if slirp:
                await self._connect_outside(keeper.client)
            else:
                plane_port = await self._start_plane(keeper.client)
            await self._filter(programs["nft"], plane_port)
            await self._furnish()
            await self._start_ocserv(programs["ocserv"], shims)
            state.keep_port(self.directory, self.port)
        except OSError as error:
            await self.close()
            raise GatewayError(f"a program of the gateway could not be started: {error}") from None
        except BaseException:
            await self.close()
            raise

    @property
    def families(self) -> set[int]:
        """The address families it listens on."""
        if self.refusal:
            return {socket.AF_INET, *([socket.AF_INET6] if has_ipv6() else [])}
        return self._host.families if self._host is not None else {socket.AF_INET}

    async def close(self) -> None:
        """End everything, last started first."""
        self._closed = True
        await self._stack.aclose()
        self._background.close()

    async def issue(self, label: str) -> tuple[str, str]:
        """A user and a password that is good for one login, within an hour."""
        username, password = self.book.issue(label, self._now())
        try:
            await self._publish()
        except (VpnError, OSError) as error:
            self.book.forget(username)
            raise GatewayError(f"the credential cannot be given to ocserv: {error}") from None
        asyncio.get_running_loop().call_later(UNUSED_LIFETIME, self._expire)
        return username, password

    async def revoke(self, username: str) -> None:
        """End a credential and its connection; unknown ones are ended already."""
        before = self.book.forget(username)
        if not before:
            return
        self._cut(username)
        await self._publish()
        if before not in UNUSED:
            await self._disconnect(username)

    async def figures(self) -> dict[str, Figure]:
        """What each client has moved to the outside and back."""
        return await self._plane.figures() if self._plane is not None and not self._is_over else {}

    async def relayed(self, what: str, username: str, address: str) -> None:
        """A session of the relay: connect, disconnect, end."""
        log.info("%s %s %s (relay)", username, what, address)
        if what == "end":
            self.book.forget(username)
            self._background.start(self._store.save())
        elif self.book.on_event(ocserv.Event(what, username, RELAY, address)):
            await self.publish()

    async def relay_lost(self) -> None:
        """The relay has ended, with all it knew of its clients."""
        self.book.lost(relayed=True, now=self._now())
        self._expire_in_time()
        await self.publish()

    async def publish(self) -> None:
        """Who may log in now is told to ocserv, and kept; what goes wrong is logged."""
        await self._quietly(self._publish())

    @property
    def _is_over(self) -> bool:
        return self._closed or self.ended.done()

    async def _publish(self) -> None:
        """Tell ocserv who may log in, and keep the book on disk; a disk that hangs is not waited for."""
        if not self.refusal and not self._is_over:
            async with self._passwords:
                await self.namespace.write(f"{self.room}/passwd", file_text(self.book.passwords()), 0o600)
        await asyncio.wait([self._background.start(self._store.save())], timeout=DISK_PATIENCE)

    def _cut(self, username: str) -> None:
        if self._plane is not None:
            self._plane.left(username)

    async def _disconnect(self, username: str) -> None:
        if self.refusal or self._is_over:
            return
        argv = [find_program("occtl"), "-s", f"{self.room}/occtl", "disconnect", "user", username]
        status, text = await self._run(argv)
        log.info("disconnecting %s: %s", username, text.strip() or f"status {status}")

    async def _connect_outside(self, keeper: Client) -> None:
        # Refused, this says why; slirp4netns and ocserv would not.
        os.close(await self.namespace.open_tun("probe"))
        slirp = Kept("slirp4netns", partial(self._start_slirp, keeper), self._end_slirp, self.tally)
        self._stack.push_async_callback(slirp.close)
        await slirp.start()
        slirp.failed.add_done_callback(lambda failed: self._end(failed.result()))

    async def _start_slirp(self, keeper: Client) -> asyncio.Future[str]:
        output = self._background.log_lines("slirp4netns")
        try:
            self._slirp = slirp = await start_slirp(
                keeper,
                self.namespace,
                self.sockets,
                output,
                dns=UPLINK_DNS in self._name_servers,
                forwards=self._host is None,
                mtu=PROTOTYPE_MTU if self.config.uplink == "prototype" else TAP_MTU,
            )
        finally:
            os.close(output)
        if self._host is None:
            protocols = ("tcp",) if self.config.uplink == "prototype" else ("tcp", "udp")
            port = self.port or self.config.port
            self.port = await slirp.forward(self.config.listen or "0.0.0.0", port, protocols)  # noqa: S104
        return self._end_of(slirp.process)

    async def _end_slirp(self) -> None:
        if self._slirp is not None:
            slirp, self._slirp = self._slirp, None
            await slirp.close()

    async def _start_plane(self, keeper: Client) -> int:
        """The data plane; the sockets inside that TCP and the name service are redirected to, and the device that has
        the rest; the port of TCP.
        """
        with ExitStack() as closing:
            sockets = {DEVICE_FD: await self.namespace.open_tun(OUT)}
            closing.callback(lambda: list(map(os.close, sockets.values())))
            await self.namespace.configure(OUT, "", mtu=OUT_MTU, routes=["default"], queue=OUT_QUEUE)
            await self.namespace.configure("lo", f"{PLANE}/32")
            sockets[LISTENER_FD], port = await self.namespace.listen(PLANE)
            for number, udp in ((DNS_UDP_FD, True), (DNS_TCP_FD, False)):
                sockets[number], _ = await self.namespace.listen(PLANE, DNS_PORT, udp=udp)
            config = self.config
            if config.rate:
                sockets[LEDGER_FD] = os.dup(self.ledger)
            log_file = str(access_log(self.directory, self.user))
            settings = Settings(config.allow, log_file, config.rate, config.rate_per_pilot, config.dns, self.user)
            self._plane = DataPlane(
                keeper, sockets, settings, lambda: self._background.log_lines("plane"), self._end, tally=self.tally
            )
            closing.pop_all()  # they are its own now
        self._stack.push_async_callback(self._plane.close)
        await self._plane.start()
        return port

    async def _filter(self, nft: str, plane_port: int) -> None:
        await self.namespace.write("/proc/sys/net/ipv4/ip_forward", "1")
        if plane_port:  # a packet whose source is not the tunnel's is nobody's
            await self.namespace.write("/proc/sys/net/ipv4/conf/all/rp_filter", "1")
        await self.namespace.resume_soon()
        text = ruleset(Policy(self.config.allow, own_addresses()), self._name_servers, plane_port)
        status, text = await self._run([nft, "-f", "-"], text.encode())
        if status != 0:
            first = text.strip().splitlines()[0] if text.strip() else f"status {status}"
            raise GatewayError(
                f"nft cannot set up masquerading ({first}); the kernel needs nf_tables and nf_nat: "
                "ask the site to load nft_chain_nat"
            )

    async def _furnish(self) -> None:
        key, certificate = load_or_make(self.directory, self.config.name)
        self.room = room = await self.namespace.private_directory()
        if self.user:
            await self._run(["chmod", "0711", room])  # its workers pass through to a socket
        listen = self.config.listen if self._host else "0.0.0.0"  # noqa: S104  (only slirp4netns reaches it)
        write = self.namespace.write
        await write(f"{room}/key.pem", key, 0o600)
        await write(f"{room}/cert.pem", certificate, 0o600)
        await self._publish()
        await write(f"{room}/event", ocserv.SCRIPT, 0o700)
        mtu = ocserv.PROTOTYPE_MTU if self.config.uplink == "prototype" else ocserv.MTU
        text = ocserv.configuration(room, self.port, self._name_servers, listen, mtu, user=self.user)
        await write(f"{room}/ocserv.conf", text, 0o600)

    async def _start_ocserv(self, program: str, shims: list[str]) -> None:
        ready = asyncio.get_running_loop().create_future()
        output = self._background.log_lines("ocserv", ocserv.READY, ready)
        events, events_end = os.pipe()
        self._background.start(self._read_events(events))
        argv = [program, "--foreground", "--config", f"{self.room}/ocserv.conf"]
        env = environment(LD_PRELOAD=":".join(shims))
        fds = {ocserv.EVENT_FD: events_end}
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        with ExitStack() as closing:
            for fd in (output, events_end, null):
                closing.callback(os.close, fd)
            if self._host is not None:
                fds[ocserv.SOCKETS_FD] = closing.enter_context(self._host.serve()).fileno()
                env["VPN_HOST_SOCKETS"] = inherit(ocserv.SOCKETS_FD, self.port)
            process = await self.namespace.client.spawn(
                argv,
                env=env,
                cwd="/",
                stdin=null,
                stdout=output,
                stderr=output,
                fds=fds,
            )
        self._stack.push_async_callback(process.end, OCSERV_GRACE)
        self._stack.push_async_callback(self._dismiss)
        await asyncio.wait([ready, process.ended], timeout=OCSERV_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise GatewayError(f"ocserv did not start: {self._background.last_line or 'it said nothing'}")
        self._ocserv = process
        self._end_of(process).add_done_callback(lambda ended: self._end(ended.result()))

    async def _dismiss(self) -> None:
        """Tell ocserv's workers to end, and wait until they have.

        ocserv does so too, but closes their pipes at once: a worker that sees that before its signal ends without a
        word to its client, which then dials until its reconnect timeout.
        """
        workers = self.book.workers()
        if not workers or self._ocserv is None or self._ocserv.ended.done():  # nobody would tell us that they have
            return
        self._dismissed = asyncio.get_running_loop().create_future()
        try:
            await self._run(["sh", "-c", 'kill -TERM "$@"', "sh", *workers])
        except VpnError as error:
            log.error("%s", error)
        else:
            await asyncio.wait([self._dismissed], timeout=DISMISSAL)

    async def _run(self, argv: list[str], stdin: bytes = b"") -> tuple[int, str]:
        try:
            return await run(self.namespace.client, argv, stdin=stdin, env=environment(), deadline=TOOL_DEADLINE)
        except (OSError, TimeoutError) as error:
            raise GatewayError(f"{argv[0]} could not be run in the gateway's namespace: {error or 'timeout'}") from None

    async def _read_events(self, fd: int) -> None:
        async for line in read_lines(fd):
            event = ocserv.parse_event(line)
            if event is None:
                continue
            log.info("%s %s %s", event.username, event.reason, event.address)
            self._on_event(event)
            if self._dismissed is not None and not self._dismissed.done() and not self.book.workers():
                self._dismissed.set_result(None)

    def _on_event(self, event: ocserv.Event) -> None:
        """A client came or went. What takes time goes on beside: those who come next must not wait for it."""
        username = event.username
        if event.reason == "connect" and not self.book.is_known(username):
            self._background.start(self._quietly(self._disconnect(username)))  # revoked while it was logging in
        elif event.reason == "connect" and self._plane is not None:
            self._plane.arrived(event.address, username)
        if self.book.on_event(event):
            self.spent(username)
            self._background.start(self._quietly(self._publish()))
        if event.reason == "disconnect" and (absence := self.book.absence(username)):
            asyncio.get_running_loop().call_later(2 * ocserv.COOKIE_LIFETIME, self._forget, username, absence)

    async def _quietly(self, action: Awaitable[None]) -> None:
        """What nobody waits for must not end the gateway."""
        try:
            await action
        except (VpnError, OSError) as error:
            log.error("%s", error)

    def _expire_in_time(self) -> None:
        for until in self.book.deadlines():
            asyncio.get_running_loop().call_later(max(0.0, until - self._now()), self._expire)

    def _expire(self) -> None:
        if self._closed:  # its successor does
            return
        expired = self.book.expired(self._now())
        for username in expired:
            log.info("%s was never used; withdrawn", username)
            self.book.forget(username)
            self.spent(username)
        if expired:
            self._background.start(self._quietly(self._publish()))

    def _forget(self, username: str, absence: int) -> None:
        """Its cookie has expired as well, unless it has come back since."""
        if self.book.absence(username) == absence and not self._closed:
            self.book.forget(username)
            self._cut(username)
            self._background.start(self._store.save())

    def _now(self) -> float:
        """Seconds of the epoch by a clock that nobody sets."""
        return self._epoch + time.monotonic()

    def _watch(self, lost: asyncio.Future[TunnelError], name: str) -> None:
        lost.add_done_callback(lambda _: self._end(f"{name} ended"))

    def _end_of(self, process: Process) -> asyncio.Future[str]:
        """Resolves with the words for it, unless the server is over already."""
        name, ended = Path(process.name).name, asyncio.get_running_loop().create_future()

        def on_end(status: asyncio.Future[int]) -> None:
            if not self._is_over:
                ended.set_result(f"{name} ended with status {status.result()}")

        process.ended.add_done_callback(on_end)
        return ended

    def _end(self, reason: str) -> None:
        if not self._closed and not self.ended.done():  # what we end ourselves ends no gateway: the relay may go on
            self.ended.set_result(reason)
