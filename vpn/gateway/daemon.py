"""The gateway's daemon: a server, its control socket, its record on disk.

Started by ``vpn gateway start`` as a session of its own, or in the foreground. Sequence: lock → replace a
dead one's record → ``Server.start`` → control socket → ``gateway.json`` → announce → serve until stopped,
signalled, or a part of it cannot be kept running → undo in the reverse order.

Two parts are kept running (``kept``), each by itself: ocserv with its namespace (``server``), and the relay's process.
When one ends, its clients lose what they have open, those of the other notice nothing. It is started again on its
port, and takes the passwords of those it served once more. Requests for credentials wait for that.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import msgspec
from msgspec import structs

from vpn.config import Credential, Secret
from vpn.errors import GatewayError, VpnError
from vpn.gateway import control, ocserv, relay_process, state
from vpn.gateway.addresses import UPLINK_DNS
from vpn.gateway.ledger import open_ledger
from vpn.gateway.plane_messages import Figure
from vpn.gateway.relay_process import Relay, start_relay
from vpn.gateway.server import Server
from vpn.gateway.state import GatewayConfig, Record
from vpn.kept import Kept
from vpn.process import first_of

log = logging.getLogger("vpn.gateway")

REQUEST_DEADLINE = 10.0
WHOLE_DEADLINE = 8.0  # seconds a request waits for what is being started again
ACCEPT_PAUSE = 0.2  # seconds without accepting when there is no descriptor left: some are about to end


class Daemon:
    """Serves control requests for one server."""

    def __init__(self, config: GatewayConfig, directory: Path) -> None:
        self.config = config
        self.directory = directory
        self.sockets = state.socket_directory(directory)
        self.server = Server(config, directory, self.sockets)
        self.server.spent = self._spent
        self.relay: Relay | None = None
        self.stopped = asyncio.Event()
        self.started_at = time.monotonic()
        self._connections: set[asyncio.Task[None]] = set()
        self._relay_stack = AsyncExitStack()
        tally = self.server.tally
        self._parts = (
            Kept("openconnect's server", self._start_server, self._end_server, tally),
            Kept("the relay", self._start_relay, self._end_relay, tally),
        )

    async def run(self, announce: Callable[[Record], None]) -> None:
        """Bring up, announce, serve; raises GatewayError when a part of the gateway ended by itself."""
        async with AsyncExitStack() as stack:
            stack.callback(state.remove_socket_directory, self.sockets)
            if self.config.rate:
                self.server.ledger = open_ledger()
                stack.callback(os.close, self.server.ledger)
            for part in self._parts:
                stack.push_async_callback(part.close)
                await part.start()
            listener = stack.enter_context(control.listen(self.sockets))
            stack.callback((self.sockets / control.SOCKET_NAME).unlink, missing_ok=True)
            accepting = asyncio.create_task(self._accept(listener))
            stack.callback(accepting.cancel)
            record = self._record()
            state.write_record(self.directory, record)
            stack.callback((self.directory / "gateway.json").unlink, missing_ok=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stopped.set)
            announce(record)
            await self._serve()

    async def _serve(self) -> None:
        stopped = asyncio.create_task(self.stopped.wait())
        failures = [part.failed for part in self._parts]
        await first_of(stopped, *failures)
        stopped.cancel()
        if not self.stopped.is_set():
            reason = f"the gateway ended: {next(failed.result() for failed in failures if failed.done())}"
            log.error(reason)
            raise GatewayError(reason)
        log.info("stopping")

    def _record(self) -> Record:
        return Record(
            name=self.config.name,
            host=socket.gethostname(),
            boot=state.boot_id(),
            pid=os.getpid(),
            start_time=state.start_time(os.getpid()),
            addresses=self._addresses(),
            port=self.server.port,
            pin=self.server.pin,
            control=str(self.sockets / control.SOCKET_NAME),
            relay_port=self.relay.port if self.relay else 0,
            refusal=self.server.refusal,
        )

    async def _start_server(self) -> asyncio.Future[str]:
        first = not self.server.pin
        server = self.server if first else self.server.successor()
        await server.start()
        if server.refusal and not first:
            raise GatewayError(server.refusal)
        self.server = server
        await server.publish()  # what the relay told in between
        return server.ended

    async def _end_server(self) -> None:
        await self.server.close()

    async def _start_relay(self) -> asyncio.Future[str]:
        """The relay's process: on the port of the one before, which those it served will dial."""
        config, before = self.config, self.relay
        if before is not None:
            await self.server.relay_lost()
        known = tuple(self.server.book.digests())
        settings = relay_process.Settings(
            str(self.directory), self.server.ledger, config.allow, config.dns, config.rate, config.rate_per_pilot,
            self.server.user, known,
        )  # fmt: skip
        port = before.port if before is not None else config.relay_port
        where = (config.listen, port, config.port or self.server.port)
        async with AsyncExitStack() as stack:
            self.relay = relay = await start_relay(stack, settings, where, self._on_session)
            self._relay_stack = stack.pop_all()
        still = dict(self.server.book.digests())
        for username, _ in known:
            if username not in still:  # spent or revoked in between
                relay.revoke(username)
        return relay.ended

    async def _end_relay(self) -> None:
        await self._relay_stack.aclose()

    def _spent(self, username: str) -> None:
        """A password was used at ocserv, or has expired: the relay takes it no more."""
        if self.relay is not None:
            self.relay.spend(username)

    async def _whole(self) -> None:
        """Wait until all parts run; raises GatewayError."""
        try:
            async with asyncio.timeout(WHOLE_DEADLINE):
                for part in self._parts:
                    await part.running.wait()
        except TimeoutError:
            reason = self.server.tally.last
            raise GatewayError(f"a part of the gateway is being started again ({reason}); try again") from None

    def _on_session(self, session: relay_process.Session) -> None:
        task = asyncio.create_task(self.server.relayed(session.what, session.username, session.address))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    def _addresses(self) -> list[str]:
        if self.config.listen in ("", "0.0.0.0"):  # noqa: S104
            families = self.server.families if not self.config.listen else {socket.AF_INET}
            return state.host_addresses(families) or ["127.0.0.1"]
        return [self.config.listen]

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("no request can be taken: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = asyncio.create_task(self._connection(connection))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _connection(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(REQUEST_DEADLINE):
                data = await loop.sock_recv(connection, control.PACKET_LIMIT)
            if data and control.peer_uid(connection) == os.geteuid():
                for packet in control.packets(await self._answer(data)):
                    await loop.sock_sendall(connection, packet)
        if not self.stopped.is_set():  # else it stays open until this process ends: the client waits for that
            connection.close()

    async def _answer(self, data: bytes) -> control.Answer:
        try:
            return await self._perform(control.decode_request(data))
        except (VpnError, msgspec.DecodeError) as error:
            return control.Refused(str(error))

    async def _perform(self, request: control.Request) -> control.Answer:
        match request:
            case control.Issue(label):
                await self._whole()
                assert self.relay is not None
                username, password = await self.server.issue(label)
                self.relay.add(username, password)
                mtu, dtls = (ocserv.MTU, False) if self.config.uplink == "sockets" else (0, True)
                where = (tuple(self._addresses()), self.server.port, self.server.pin)
                credential = Credential(*where, username, Secret(password), self.relay.port, mtu, dtls)
                return control.Issued(credential.to_bytes())
            case control.Revoke(username):
                if self.relay is not None:
                    self.relay.revoke(username)
                await self.server.revoke(username)
            case control.Status():
                return self._report(await self.server.figures(), await self.relay.used() if self.relay else {})
            case control.Stop():
                self.stopped.set()
        return control.Agreed()

    def _report(self, figures: dict[str, Figure], used: dict[str, relay_process.Use]) -> control.Report:
        pilots = [
            structs.replace(pilot, connections=use.connections, up=use.up, down=use.down)
            if (use := used.get(pilot.username))
            else pilot
            for pilot in self.server.book.pilots(figures)
        ]
        return control.Report(
            name=self.config.name,
            host=socket.gethostname(),
            addresses=self._addresses(),
            port=self.server.port,
            pin=self.server.pin,
            dns=list(self.config.dns) or [UPLINK_DNS],
            uptime=time.monotonic() - self.started_at,
            pilots=pilots,
            relay_port=self.relay.port if self.relay else 0,
            refusal=self.server.refusal,
            restarts=self.server.tally.count,
            last_end=self.server.tally.last,
        )


def run_daemon(config: GatewayConfig, announce: Callable[[Record], None]) -> None:
    """Run a gateway in this process until it is stopped; raises VpnError when it cannot run or breaks."""
    directory = state.make_directory(config.name)
    try:
        lock = _lock(directory, config.name)
    except OSError as error:
        raise GatewayError(f"{directory} cannot be written to: {error.strerror}") from None
    try:
        _refuse_running(state.read_record(directory))

        async def main() -> None:
            await Daemon(config, directory).run(announce)

        asyncio.run(main())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise GatewayError(f"the gateway cannot go on: {where}{error.strerror or error}") from error
    finally:
        os.close(lock)


def _lock(directory: Path, name: str) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise GatewayError(f"gateway {name!r} is running or starting already; see `hpcq vpn gateway status`") from None
    except OSError as error:  # a file system without locks: the record alone must do
        log.warning("%s cannot be locked: %s", directory, error.strerror)
    return fd


def _refuse_running(record: Record | None) -> None:
    if record is None:
        return
    if state.is_alive(record):
        raise GatewayError(f"gateway {record.name!r} is running already: {describe(record)}")
    if record.host != socket.gethostname() and _answers(record):
        raise GatewayError(
            f"gateway {record.name!r} runs on {record.host}; stop it there, or start one with another --name"
        )
    if record.host == socket.gethostname():
        state.remove_socket_directory(Path(record.control).parent)
    log.warning("replacing the record of a gateway that is gone (pid %d on %s)", record.pid, record.host)


def _answers(record: Record) -> bool:
    for address in record.addresses:
        with suppress(OSError), socket.create_connection((address, record.port or record.relay_port), timeout=2):
            return True
    return False


def describe(record: Record) -> str:
    """One line for people."""
    ports = f"port {record.port}, " if record.port else ""
    missing = f"; openconnect is not offered: {record.refusal}" if record.refusal else ""
    where = f"{record.host} {' '.join(record.addresses)} {ports}relay port {record.relay_port}"
    return f"{where} {record.pin} (pid {record.pid}){missing}"


def main(argv: list[str]) -> None:
    """CONFIG READY_FD: the detached daemon; it writes one JSON line to READY_FD, a record or an error."""
    config = msgspec.json.decode(argv[0].encode(), type=GatewayConfig)
    ready = int(argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)

    def announce(record: Record) -> None:
        os.write(ready, msgspec.json.encode(record) + b"\n")
        os.close(ready)

    os.set_inheritable(ready, False)
    try:
        run_daemon(config, announce)
    except VpnError as error:
        log.error("%s", error)
        with suppress(OSError):
            os.write(ready, msgspec.json.encode({"error": str(error)}) + b"\n")
        sys.exit(error.exit_status)
