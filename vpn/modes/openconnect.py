"""Mode ``openconnect``: an IP VPN to an AnyConnect server, without root.

Sequence:

1. program and shim are there; one of the server's addresses accepts a connection, whose round trip says whether it is
   near: then TLS with packets as large as its records is faster than DTLS, and nothing is lost on the way that TCP in
   TCP would suffer from;
2. a namespace, and a tun device in it whose descriptor comes out;
3. openconnect *outside*, in the host's network, with that descriptor put in place of /dev/net/tun
   (``preload/tun_from_fd.c``), the password on its standard input, the server's key pinned;
   networks of ``direct`` get a device of their own (``vpn.modes.direct``);
4. it logs in and calls its script, which only tells us its environment: address, MTU, routes, DNS;
5. the holder configures the device and the name servers: commands can run;
6. DTLS comes up, or is known not to, or ``dtls_timeout`` passes: then it is TLS, and may become DTLS later.

Failures: openconnect ending at any time is explained from its own last lines; after bring-up it loses the
tunnel. A server that goes away is dialled again by openconnect itself, with its cookie, for
``reconnect_timeout`` seconds; it asks for a sign of life every ``probe_interval`` seconds, and is not waited for when
it dials a server that swallows packets. A gateway that was started again has forgotten the cookie, but takes the
password once more: another openconnect logs in by it, and goes on with the device.
"""

from __future__ import annotations

import asyncio
import collections
import os
import signal
import socket
import struct
from contextlib import suppress
from dataclasses import replace

from vpn.config import Credential, TunnelConfig
from vpn.errors import TunnelError
from vpn.modes.base import BringUp, TunnelInfo
from vpn.modes.dialogue import (
    REFUSED,
    DtlsDown,
    DtlsUp,
    MtuFound,
    NetworkSettings,
    Said,
    ScriptReader,
    TlsUp,
    explain_exit,
    login_patience,
    parse_line,
    parse_settings,
    script_command,
)
from vpn.modes.direct import DirectNetworks, tunnelled
from vpn.namespace import Namespace, open_namespace
from vpn.pipes import filled, read_chunks, read_lines
from vpn.process import Client, Process, first_of
from vpn.programs import environment, find_program, find_shim

DEVICE = "tun0"
LEAST_MTU6 = 1280  # bytes: IPv6 needs them (RFC 8200, section 5)
CONNECT_DEADLINE = 10.0  # seconds for a server's address to accept a connection
NEAR = 0.003  # seconds of round trip to a server of the same site
RECORD_MTU = 16000  # bytes: what a TLS record holds, less what openconnect adds
QUEUE = 5000
"""Packets: the device drops what is more, and packets to a server that routes them have the size of the far server's
link, so that the usual 500 are a few milliseconds' worth. Not for TLS to a far server, which is slower: there a long
queue is a long delay.
"""
KEPT_LINES = 40
DTLS_ASKED = 5.0  # seconds it has at least where it is asked for: one packet that is lost costs it more than one
LOGIN_PAUSE = 0.5  # seconds between two attempts to log in again
LOGIN_DEADLINE = 30.0  # seconds for one of them: a server may take the connection and then say nothing
NUDGES = (1.0, 2.0, 3.0)
"""Seconds between times that openconnect is told to dial a server that accepts connections again: left alone it waits
ten and more.
"""
_TUN_FD, _SCRIPT_FD = 3, 4
_TCPI_RTT = 68  # where struct tcp_info (linux/tcp.h) has the round trip, in microseconds


class OpenconnectTunnel:
    """One openconnect and its namespace."""

    def __init__(self, config: TunnelConfig, credential: Credential, up: BringUp) -> None:
        self.config = config
        self.credential = credential
        self.up = up
        self.dtls = credential.dtls if config.dtls is None else config.dtls
        self.mtu = config.mtu
        self.queue = 0
        self.server = ""
        self.direct = DirectNetworks(config.direct, up) if config.direct else None
        self.lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self.settings: asyncio.Future[NetworkSettings] = up.keeper.loop.create_future()
        self.decided = asyncio.Event()  # whether packets go by DTLS or TLS is known
        self.configured: NetworkSettings | None = None
        self.ciphers = {"TLS": "", "DTLS": ""}
        self.kind = "TLS"
        self.seconds = 0.0
        self._readers: list[asyncio.Task[None]] = []
        self._explaining: asyncio.Task[None] | None = None
        self._dialling: asyncio.TimerHandle | None = None
        self._nudging: asyncio.Task[None] | None = None
        self._process: Process | None = None
        self._tun = -1

    @property
    def client(self) -> Client:
        """The holder, which starts programs inside."""
        return self.namespace.client

    def info(self) -> TunnelInfo:
        """As it is now."""
        now = self.configured or NetworkSettings("", 0, (), (), ())
        return TunnelInfo(
            mode=self.config.mode,
            kind=self.kind,
            cipher=self.ciphers[self.kind],
            bring_up_seconds=self.seconds,
            address=now.address.partition("/")[0],
            mtu=now.mtu,
            server=f"{self.server}:{self.credential.port}",
            dns=now.dns,
        )

    async def bring_up(self) -> None:
        """The sequence above."""
        program, shim = find_program("openconnect"), find_shim("tun_from_fd")
        self.up.step = ("gateway", f"connecting to {', '.join(self.credential.addresses)}")
        self.server, round_trip = await first_reachable(self.credential)
        self._choose(near=round_trip < NEAR)
        if self.direct is not None:
            await self.direct.start()
        self.up.step = ("user namespaces", "making a namespace")
        self.namespace: Namespace = await open_namespace(self.up.keeper, new_session=self.up.new_session)
        self.up.stack.push_async_callback(self.namespace.close)
        self.namespace.client.lost.add_done_callback(lambda future: self.up.lose(future.result()))
        self._tun = await self.namespace.open_tun(DEVICE, headers=self.config.mode == "openconnect")
        self.up.stack.push_async_callback(self._end)
        self.up.step = ("openconnect", f"logging in at {self.server}")
        process = await self._start(program, shim)
        if self.direct is not None:
            await self.direct.serve(self.namespace)
        await self._configure(await self._logged_in(process))
        await self._decide()
        self._explaining = asyncio.create_task(self._keep(program, shim))
        self.seconds = self.up.keeper.loop.time() - self.up.started_at

    def _choose(self, *, near: bool) -> None:
        """DTLS or TLS, and the MTU to ask for (0: none), where neither the user nor the credential says; the device's
        queue.
        """
        if near and self.config.dtls is None:
            self.dtls = False
        if not self.mtu and not self.dtls:
            self.mtu = self.credential.mtu or (RECORD_MTU if near else 0)
        if not self.credential.mtu and (near or self.dtls):
            self.queue = QUEUE

    async def _start(self, program: str, shim: str) -> Process:
        self.lines.clear()
        output, output_end = os.pipe()
        script, script_end = os.pipe()
        password = filled(self.credential.password.reveal().encode() + b"\n")
        try:
            self._process = await self.up.keeper.spawn(
                self._argv(program),
                env=environment(LD_PRELOAD=shim, VPN_TUN_FD=str(_TUN_FD)),
                cwd="/",
                stdin=password,
                stdout=output_end,
                stderr=output_end,
                fds={_TUN_FD: self._tun, _SCRIPT_FD: script_end},
            )
        finally:
            for fd in (output_end, script_end, password):
                os.close(fd)
            self._readers = [
                asyncio.create_task(self._read_output(output)),
                asyncio.create_task(self._read_script(script)),
            ]
        return self._process

    def _argv(self, program: str) -> list[str]:
        config, credential = self.config, self.credential
        server = f"[{self.server}]" if ":" in self.server else self.server
        mtu = [f"--base-mtu={self.mtu + 100}", f"--mtu={self.mtu}"] if self.mtu else []
        return [
            program, "--protocol=anyconnect", "--non-inter", "--no-proxy",
            *_login(credential), f"--servercert={credential.pin}",
            f"--script={script_command(_SCRIPT_FD)}", f"--interface={DEVICE}",
            f"--reconnect-timeout={config.reconnect_timeout}", f"--force-dpd={round(config.probe_interval)}", *mtu,
            *([] if self.dtls else ["--no-dtls"]), f"https://{server}:{credential.port}/",
        ]  # fmt: skip

    async def _logged_in(self, process: Process) -> NetworkSettings:
        await first_of(self.settings, process.ended)
        if not self.settings.done():
            await asyncio.wait(self._readers[:1], timeout=1)  # its last words may still be in the pipe
            raise explain_exit(process.ended.result(), list(self.lines), self.server)
        return self.settings.result()

    async def _configure(self, settings: NetworkSettings) -> None:
        self.up.step = ("tunnel", "configuring the namespace")
        if not settings.address6 or 0 < settings.mtu < LEAST_MTU6:
            settings = replace(settings, address6="", routes6=())
            with suppress(TunnelError, OSError):  # a kernel without IPv6
                # Nobody answers what the kernel would say there by IPv6. And a server that ends with packets unread
                # resets the connection: its last word, that it ended the session, is lost then.
                await self.namespace.write(f"/proc/sys/net/ipv6/conf/{DEVICE}/disable_ipv6", "1")
        await self.namespace.resume_soon()
        routes, routes6 = self._routes(settings)
        await self.namespace.configure(DEVICE, settings.address, mtu=settings.mtu, routes=routes, queue=self.queue)
        if settings.address6:
            with suppress(TunnelError):  # a kernel that has IPv6 switched off does without
                await self.namespace.configure(DEVICE, settings.address6, routes=routes6)
        dns = self.config.dns or settings.dns
        if dns:
            await self.namespace.resolve_with(list(dns), list(settings.search))
        self.configured = replace(settings, dns=tuple(dns))

    def _routes(self, settings: NetworkSettings) -> tuple[list[str], list[str]]:
        """What goes through the tunnel, of IPv4 and of IPv6."""
        chosen = [*settings.routes, *settings.routes6]
        if self.direct is not None:
            chosen = tunnelled(self.direct.networks, chosen, settings.dns)
        return [route for route in chosen if ":" not in route], [route for route in chosen if ":" in route]

    async def _decide(self) -> None:
        self.up.step = ("openconnect", "waiting for DTLS")
        if self.dtls:
            patience = max(self.config.dtls_timeout, DTLS_ASKED if self.config.dtls else 0.0)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.decided.wait(), patience)

    async def _read_output(self, fd: int) -> None:
        async for line in read_lines(fd):
            self.lines.append(line)
            await self._on_said(parse_line(line))

    async def _on_said(self, said: Said | None) -> None:
        match said:
            case TlsUp(cipher):
                self.ciphers["TLS"] = cipher
            case DtlsUp(cipher):
                self.ciphers["DTLS"], self.kind = cipher, "DTLS"
                self.decided.set()
            case DtlsDown():
                self.kind = "TLS"
                self.decided.set()
            case MtuFound(mtu) if self.configured is not None and 576 <= mtu < self.configured.mtu:
                await self._shrink(mtu)

    async def _shrink(self, mtu: int) -> None:
        with suppress(TunnelError):
            await self.namespace.configure(DEVICE, "", mtu=mtu)
        if self.configured is not None:
            self.configured = replace(self.configured, mtu=mtu)

    async def _read_script(self, fd: int) -> None:
        reader = ScriptReader()
        async for data in read_chunks(fd):
            for env in reader.feed(data):
                self._on_script(env)

    def _on_script(self, env: dict[str, str]) -> None:
        if env.get("reason") == "attempt-reconnect" and self._dialling is None:
            patience = self.config.reconnect_timeout
            error = TunnelError("gateway", f"{self.server} gave no sign of life and did not come back in {patience} s")
            self._dialling = self.up.keeper.loop.call_later(patience, self.up.lose, error)
            if self._is_gateway:
                self._nudging = asyncio.create_task(self._nudge())
        if env.get("reason") == "reconnect":
            self._stop_dialling()
        if env.get("reason") not in ("connect", "reconnect") or "INTERNAL_IP4_ADDRESS" not in env:
            return
        try:
            settings = parse_settings(env)
        except TunnelError as error:
            if not self.settings.done():
                self.settings.set_exception(error)
            return
        if not self.settings.done():
            self.settings.set_result(settings)
        elif self.configured is not None and settings.address != self.configured.address:
            self.up.lose(TunnelError("openconnect", f"{self.server}: the server changed the address on reconnecting"))

    @property
    def _is_gateway(self) -> bool:
        """Whether the server is a gateway of ours, which takes a password once more after it was started again."""
        return bool(self.credential.relay_port)

    async def _keep(self, program: str, shim: str) -> None:
        """For as long as there is an openconnect, or there can be another one."""
        error = await self._exit()
        while self._is_gateway and (patience := login_patience(self.lines, self.config.reconnect_timeout)):
            again = await self._log_in_again(program, shim, patience)
            if again is not None:
                error = TunnelError(error.layer, f"{error.message}; logging in again: {again.message}")
                break
            error = await self._exit()
        self._close_tun()
        self.up.lose(error)

    async def _exit(self) -> TunnelError:
        """Why the openconnect that runs now ended, when it has."""
        assert self._process is not None
        status = await self._process.wait()
        self._stop_dialling()
        await asyncio.wait(self._readers[:1], timeout=1)
        return explain_exit(status, list(self.lines), self.server)

    async def _log_in_again(self, program: str, shim: str, patience: float) -> TunnelError | None:
        """Another openconnect, with the password: None when it is up, else what the last attempt met."""
        loop = self.up.keeper.loop
        until = loop.time() + patience
        while True:
            self.settings = loop.create_future()
            try:
                settings = await self._answered(await self._start(program, shim))
                if self.configured is None or settings.address == self.configured.address:
                    return None
                return TunnelError("openconnect", f"{self.server}: the server changed the address")
            except TunnelError as error:
                if REFUSED in error.message or loop.time() >= until:
                    return error
            except OSError as error:
                return TunnelError("openconnect", f"it could not be started: {error}")
            await asyncio.sleep(LOGIN_PAUSE)

    async def _answered(self, process: Process) -> NetworkSettings:
        try:
            async with asyncio.timeout(LOGIN_DEADLINE):
                return await self._logged_in(process)
        except TimeoutError:
            await process.end()
            raise TunnelError("gateway", f"{self.server} did not answer a login in {LOGIN_DEADLINE:g} s") from None

    async def _nudge(self) -> None:
        """Have openconnect dial when the server accepts connections again."""
        for pause in (*NUDGES, *[NUDGES[-1]] * int(self.config.reconnect_timeout)):
            await asyncio.sleep(pause)
            _, problem, _ = await _reach(self.server, self.credential.port)
            if not problem and self._process is not None:
                self._process.send_signal(signal.SIGUSR2)

    def _stop_dialling(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
            self._dialling = None
        if self._nudging is not None:
            self._nudging.cancel()
            self._nudging = None

    def _close_tun(self) -> None:
        """The device goes with the last descriptor: programs inside then learn at once that there is no way out."""
        if self._tun >= 0:
            os.close(self._tun)
            self._tun = -1

    async def _end(self) -> None:
        if self._explaining is not None:
            self._explaining.cancel()
            await asyncio.gather(self._explaining, return_exceptions=True)
        if self._process is not None:
            await self._process.end()
        self._stop_dialling()
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._close_tun()


def _login(credential: Credential) -> list[str]:
    """Options of the login; the secret itself is on standard input."""
    login = credential.login
    if login.cookie:
        return ["--cookie-on-stdin"]
    files = [f"--certificate={login.certificate}"] if login.certificate else []
    files += [f"--sslkey={login.key}"] if login.key else []
    return [*files, *(["--passwd-on-stdin", f"--user={credential.username}"] if credential.username else [])]


async def bring_up(config: TunnelConfig, up: BringUp) -> OpenconnectTunnel:
    """Bring a tunnel up; raises TunnelError naming the layer."""
    if config.credential is None:
        raise TunnelError("openconnect", "no credential was given")
    if not config.credential.port:
        raise TunnelError("gateway", "this gateway does not offer openconnect, only the relay: use --mode relay")
    tunnel = OpenconnectTunnel(config, config.credential, up)
    await tunnel.bring_up()
    return tunnel


async def first_reachable(credential: Credential) -> tuple[str, float]:
    """The first of the server's addresses to accept a TCP connection, and its round trip in seconds; all are tried at
    once.
    """
    tries = {asyncio.create_task(_reach(host, credential.port)): host for host in credential.addresses}
    try:
        problems: dict[str, str] = {}
        for done in asyncio.as_completed(tries):
            host, problem, round_trip = await done
            if not problem:
                return host, round_trip
            problems[host] = problem
    finally:
        for task in tries:
            task.cancel()
    tried = "; ".join(f"{host} port {credential.port}: {problem}" for host, problem in problems.items())
    raise TunnelError(
        "gateway",
        f"no address of the gateway answers ({tried}); is it running? see `hpcq vpn gateway status`",
    )


async def _reach(host: str, port: int) -> tuple[str, str, float]:
    try:
        async with asyncio.timeout(CONNECT_DEADLINE):
            _, writer = await asyncio.open_connection(host, port)
        round_trip = round_trip_of(writer.get_extra_info("socket"))
        writer.close()
    except TimeoutError:
        return host, f"no answer in {CONNECT_DEADLINE:g} s", 0.0
    except OSError as error:
        return host, os.strerror(error.errno) if error.errno and error.errno > 0 else str(error), 0.0
    return host, "", round_trip


def round_trip_of(sock: socket.socket) -> float:
    """Seconds from our SYN to its answer, as the kernel has measured: how busy this process is does not matter."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_RTT + 4)
    return float(struct.unpack_from("I", info, _TCPI_RTT)[0]) / 1e6
