"""Start a gateway and talk to a running one. Synchronous, with short deadlines."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec

from vpn import kernel
from vpn.config import Credential
from vpn.errors import GatewayError
from vpn.gateway import control, reference, remote, state
from vpn.gateway.choice import gateway_names
from vpn.gateway.state import GatewayConfig, Record
from vpn.process import python_argv

START_DEADLINE = 60.0
ANSWER_DEADLINE = 30.0
QUICK_DEADLINE = 3.0  # … while there is another gateway to ask
STOP_DEADLINE = 30.0
CONNECT_DEADLINE = 5.0


class GatewayClient:
    """A gateway of this user, by name or HOST:PORT: on this host, or on another that shares its state directory.

    Every method raises GatewayError saying what to do, as does making one for a place where none listens.
    """

    def __init__(self, name: str = "default") -> None:
        self._place = reference.place_of(name)
        self.name = reference.name_of(name)
        self.directory = state.state_directory(self.name)

    def issue(self, label: str, deadline: float = ANSWER_DEADLINE) -> Credential:
        """A credential for one pilot, good for one login within an hour; ``deadline`` in seconds."""
        answer = self._ask(control.Issue(label), deadline)
        if not isinstance(answer, control.Issued):
            raise GatewayError(f"gateway {self.name!r} gave an answer that was not asked for")
        return Credential.from_bytes(answer.credential)

    def revoke(self, username: str) -> None:
        """End a credential and the connection made with it."""
        self._ask(control.Revoke(username))

    def status(self) -> control.Report:
        """What the gateway is and whom it serves."""
        answer = self._ask(control.Status())
        if not isinstance(answer, control.Report):
            raise GatewayError(f"gateway {self.name!r} gave an answer that was not asked for")
        return answer

    def stop(self) -> None:
        """End it; returns when its process has ended."""
        record = state.read_record(self.directory)
        with self._connect() as sock:
            self._exchange(sock, control.Stop(), STOP_DEADLINE)
            try:
                sock.recv(1)
            except ConnectionError:
                pass
            except TimeoutError:
                raise GatewayError(self._not_ended()) from None
        is_here = record is not None and record.host == socket.gethostname()
        if record is not None and is_here and not state.wait_ended(record.pid, STOP_DEADLINE):
            raise GatewayError(self._not_ended())

    def _not_ended(self) -> str:
        return f"gateway {self.name!r} did not end within {STOP_DEADLINE:g} s; see {self.log}"

    @property
    def log(self) -> Path:
        """Its log file."""
        return self.directory / "log"

    def record(self) -> Record | None:
        """The record of a gateway that is alive here."""
        record = state.read_record(self.directory)
        return record if record is not None and state.is_alive(record) else None

    def _ask(self, request: control.Request, deadline: float = ANSWER_DEADLINE) -> control.Answer:
        with self._connect(min(deadline, CONNECT_DEADLINE)) as sock:
            return self._exchange(sock, request, deadline)

    def _connect(self, deadline: float = CONNECT_DEADLINE) -> socket.socket | remote.Connection:
        record = state.read_record(self.directory)
        if record is not None and record.host != socket.gethostname():
            named = [self._place[0]] if self._place is not None else []
            hosts = list(dict.fromkeys([*named, *record.addresses]))
            return remote.connect(self.directory, record, hosts, deadline)
        try:
            sockets = Path(record.control).parent if record is not None else self.directory
            return control.connect(sockets, deadline)
        except OSError:
            raise GatewayError(self._why_absent()) from None

    def _exchange(
        self, sock: socket.socket | remote.Connection, request: control.Request, deadline: float
    ) -> control.Answer:
        sock.settimeout(deadline)
        try:
            sock.sendall(control.encode(request))
            answer, parts = None, list[control.Answer]()
            while answer is None:
                data = sock.recv(control.PACKET_LIMIT)
                if not data:
                    raise GatewayError(f"gateway {self.name!r} ended before it answered; see {self.log}")
                parts.append(control.decode_answer(data))
                answer = control.whole(parts)
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise GatewayError(f"gateway {self.name!r} does not answer ({error}); see {self.log}") from None
        if isinstance(answer, control.Refused):
            raise GatewayError(answer.message)
        return answer

    def _why_absent(self) -> str:
        here, record = socket.gethostname(), state.read_record(self.directory)
        named = "" if self.name == "default" else f" --name {self.name}"
        if record is not None and not state.is_alive(record):
            return f"gateway {self.name!r} was killed; start it again with `hpcq vpn gateway start{named}`"
        return f"no gateway {self.name!r} is running on {here}; start one with `hpcq vpn gateway start{named}`"


def issue_from(names: str, label: str) -> tuple[GatewayClient, Credential]:
    """A credential of one of several gateways (``A,B``), and that gateway: of those that answer, any.

    Raises:
        GatewayError: what each of them said.
    """
    problems = []
    order = list(gateway_names(names))
    random.shuffle(order)
    for name in order:
        client = GatewayClient(name)
        try:
            return client, client.issue(label, ANSWER_DEADLINE if name == order[-1] else QUICK_DEADLINE)
        except GatewayError as error:
            problems.append(str(error))
    raise GatewayError("; ".join(problems))


def known_gateways() -> tuple[str, ...]:
    """The user's gateways that run on this host."""
    return tuple(name for name in state.names() if GatewayClient(name).record() is not None)


def start_gateway(config: GatewayConfig) -> tuple[Record, bool]:
    """Start a detached gateway; its record, and whether it was running already. Returns when it accepts
    pilots.
    """
    running = GatewayClient(config.name).record()
    if running is not None:
        return running, False
    return _start(config, state.make_directory(config.name)), True


@contextmanager
def temporary_gateway(name: str) -> Iterator[GatewayClient]:
    """A gateway for the length of a block, with nothing left of it afterwards; it also ends with the calling thread.

    No other may have its name: the directory of that name is removed. Raises GatewayError when it cannot be started.
    """
    directory = state.make_directory(name)
    try:
        _start(GatewayConfig(name), directory, partial(kernel.die_with_parent, signal.SIGTERM))
        client = GatewayClient(name)
        try:
            yield client
        finally:
            with suppress(GatewayError):  # it has ended already
                client.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _start(config: GatewayConfig, directory: Path, before_exec: Callable[[], None] | None = None) -> Record:
    line = _start_detached(config, directory, before_exec)
    try:
        return msgspec.json.decode(line, type=Record)
    except msgspec.DecodeError:
        pass
    try:
        reason = msgspec.json.decode(line, type=dict[str, str])["error"]
    except (msgspec.DecodeError, KeyError):
        reason = f"it ended without a word; see {directory / 'log'}"
    raise GatewayError(f"the gateway did not start: {reason}")


def _start_detached(config: GatewayConfig, directory: Path, before_exec: Callable[[], None] | None) -> bytes:
    """Start the daemon in a session of its own; the line it announces itself with."""
    log = directory / "log"
    if log.exists():
        log.replace(directory / "log.old")
    reader, writer = os.pipe()
    with (
        os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output,
        os.fdopen(reader, "rb") as ready,
    ):
        try:
            process = subprocess.Popen(
                python_argv("vpn.gateway.daemon", msgspec.json.encode(config).decode(), str(writer)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
                start_new_session=True,
                cwd="/",
                preexec_fn=before_exec,  # noqa: PLW1509 - one system call, no allocation that another thread could hold
            )
        finally:
            os.close(writer)
        line = _first_line(ready.fileno())
    if not line:
        process.kill()
        process.wait()
    process.returncode = process.poll() or 0  # it is meant to outlive us: no warning that it still runs
    return line


def _first_line(fd: int) -> bytes:
    import selectors  # noqa: PLC0415
    import time  # noqa: PLC0415

    line, end = b"", time.monotonic() + START_DEADLINE
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not line.endswith(b"\n") and selector.select(max(0.0, end - time.monotonic())):
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            line += chunk
    return line
