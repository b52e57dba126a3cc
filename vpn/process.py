"""Processes as a session sees them: started by a keeper, waited for, signalled, ended.

``Client`` is the session's end of one keeper's socket: requests are answered by futures, exits resolve
``Process.wait``. The keeper's end of the socket closing is an event too: ``Client.lost`` resolves, requests
fail, and every process it had counts as killed, because the kernel kills them with their keeper.
``start_keeper`` makes the keeper that stands outside every namespace; nothing here forks, so threads in the
caller do no harm. The keeper dies with the *thread* that started it: run a session in a thread that lives as
long as the session.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack

from vpn.channel import Packet, client_channel, pair
from vpn.errors import TunnelError
from vpn.messages import Done, Exited, Failed, Kill, Message, Ready, Report, Spawn
from vpn.pipes import filled, read_lines

START_DEADLINE = 30.0  # seconds for a keeper to start; a cold Python on a shared file system is slow
TERMINATE_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
REAP_DEADLINE = 10.0  # seconds for a killed process to be gone

_BOOTSTRAP = (
    "import sys; root = sys.argv[1]; root in sys.path or sys.path.insert(0, root); "
    "from {module} import main; main(sys.argv[2:])"
)
_ROOT = str(Path(__file__).resolve().parent.parent)


def python_argv(module: str, *arguments: str) -> list[str]:
    """An argv that runs ``module.main(arguments)`` in a fresh Python that finds this very package."""
    return [sys.executable, "-P", "-c", _BOOTSTRAP.format(module=module), _ROOT, *arguments]


Argv = Sequence[str | bytes | os.PathLike[str]]


class SpawnOptions(TypedDict, total=False):
    """How a program is started. ``env`` and ``cwd`` left out or None, and a stream likewise, mean the caller's own;
    ``pass_fds`` keep their numbers; ``new_session`` (True): it leads a session and a group of its own.
    """

    env: Mapping[str, str] | None
    cwd: str | os.PathLike[str] | None
    stdin: int | None
    stdout: int | None
    stderr: int | None
    pass_fds: Sequence[int]
    new_session: bool


class KeeperOptions(SpawnOptions, total=False):
    """What a keeper can do beside: ``fds`` maps numbers in the program to descriptors here; ``may_mount``: it keeps the
    right to mount in its namespace.
    """

    fds: Mapping[int, int]
    may_mount: bool


class Process:
    """A process started by a keeper."""

    def __init__(self, client: Client, request: int, name: str) -> None:
        self._client = client
        self._request = request
        self.name = name
        self.pid = 0
        """The pid as this process sees it, whatever namespace the program is in."""
        self.cpu_seconds = 0.0
        self.max_rss = 0
        """Known when it ended: CPU time, and peak memory in bytes, of it and the children it waited for."""
        self.ended: asyncio.Future[int] = client.loop.create_future()
        """Resolves with the status; negative for a signal, as in ``subprocess``."""

    @property
    def returncode(self) -> int | None:
        """The status, or None while it runs."""
        return self.ended.result() if self.ended.done() else None

    async def wait(self) -> int:
        """Wait for the end; the status, negative for a signal."""
        return await asyncio.shield(self.ended)

    def send_signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to its group if it leads one; not when it has ended."""
        if not self.ended.done():
            with suppress(TunnelError):  # the keeper is gone, and the process with it
                self._client.post(Kill(self._request, number, group))

    async def end(self, grace: float = TERMINATE_GRACE) -> int:
        """SIGTERM, wait ``grace`` seconds, SIGKILL, wait; the status."""
        self.send_signal(signal.SIGTERM)
        done, _ = await asyncio.wait([self.ended], timeout=grace)
        if not done:
            self.send_signal(signal.SIGKILL)
            await asyncio.wait([self.ended], timeout=REAP_DEADLINE)
        return self.ended.result() if self.ended.done() else -signal.SIGKILL


class Client:
    """One keeper, seen from its client."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.name = name
        self.pid = 0
        self.ready: asyncio.Future[Ready] = self.loop.create_future()
        self.lost: asyncio.Future[TunnelError] = self.loop.create_future()
        self._channel = client_channel(sock)
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Packet[Report]]] = {}
        self._processes: dict[int, Process] = {}
        self._outgoing: collections.deque[tuple[Message, list[int]]] = collections.deque()
        self.loop.add_reader(sock, self._on_readable)

    async def started(self, deadline: float = START_DEADLINE) -> Ready:
        """Wait until the keeper serves; raises the reason when it does not."""
        done, _ = await asyncio.wait([self.ready], timeout=deadline)
        if not done:
            raise TunnelError("program", f"{self.name} did not start within {deadline:g} s; is the node overloaded?")
        return self.ready.result()

    async def request(self, message: Message, fds: Sequence[int] = ()) -> Packet[Report]:
        """Send a request and wait for its answer; raises TunnelError, or OSError when starting a program
        failed.
        """
        number: int = message.id  # type: ignore[attr-defined]
        answer: asyncio.Future[Packet[Report]] = self.loop.create_future()
        self._answers[number] = answer
        try:
            self.post(message, fds)
            return await answer
        finally:
            self._answers.pop(number, None)

    def number(self) -> int:
        """A fresh request id."""
        return next(self._numbers)

    async def spawn(self, argv: Argv, **options: Unpack[KeeperOptions]) -> Process:
        """Start a program; raises FileNotFoundError, PermissionError… as exec did, TunnelError without the keeper."""
        env = options.get("env")
        environment = os.environb if env is None else {os.fsencode(k): os.fsencode(v) for k, v in env.items()}
        streams = options.get("stdin"), options.get("stdout"), options.get("stderr")
        with _descriptors(streams, options.get("pass_fds", ()), options.get("fds", {})) as mapping:
            request = Spawn(
                self.number(),
                [os.fsencode(part) for part in argv],
                dict(environment),
                os.fsencode(options.get("cwd") or Path.cwd()),
                list(mapping),
                options.get("new_session", True),
                options.get("may_mount", False),
            )
            process = Process(self, request.id, str(argv[0]))
            self._processes[request.id] = process
            try:
                answer = await self.request(request, list(mapping.values()))
            except (Exception, asyncio.CancelledError):
                process.send_signal(signal.SIGKILL)
                self._processes.pop(request.id, None)
                raise
        process.pid = answer.message.pid or answer.pid  # type: ignore[union-attr]
        return process

    def post(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send without waiting; kept in order when the socket is full. Descriptors are duplicated if kept."""
        if self.lost.done():
            raise self.lost.result()
        if self._outgoing:
            self._outgoing.append((message, [os.dup(fd) for fd in fds]))
            return
        try:
            self._channel.send(message, fds)
        except BlockingIOError:
            self._outgoing.append((message, [os.dup(fd) for fd in fds]))
            self.loop.add_writer(self._channel.sock, self._on_writable)
        except ConnectionError:
            self._on_end()
            raise self.lost.result() from None

    def close(self) -> None:
        """Close the socket: the keeper ends everything it started and exits."""
        self._on_end()

    def _on_writable(self) -> None:
        while self._outgoing:
            message, fds = self._outgoing[0]
            try:
                self._channel.send(message, fds)
            except BlockingIOError:
                return
            except ConnectionError:
                self._on_end()
                return
            except OSError as error:  # no descriptor or memory left here: only this message fails
                _fail(self._answers.get(getattr(message, "id", 0)), error)
            self._outgoing.popleft()
            for fd in fds:
                os.close(fd)
        self.loop.remove_writer(self._channel.sock)

    def _on_readable(self) -> None:
        try:
            packet = self._channel.receive()
        except BlockingIOError:
            return
        except Exception:
            packet = None
        if packet is None:
            self._on_end()
        else:
            self._on_packet(packet)

    def _on_packet(self, packet: Packet[Report]) -> None:
        message = packet.message
        if isinstance(message, Ready):
            self.pid = packet.pid
            _resolve(self.ready, message)
        elif isinstance(message, Exited):
            process = self._processes.pop(message.id, None)
            if process is not None:
                process.cpu_seconds, process.max_rss = message.cpu_seconds, message.max_rss
                _resolve(process.ended, message.status)
        elif isinstance(message, Failed) and message.id == 0:
            _fail(self.ready, TunnelError(message.layer, message.message))
        else:
            self._on_answer(packet)

    def _on_answer(self, packet: Packet[Report]) -> None:
        message: Any = packet.message
        answer = self._answers.get(message.id)
        if answer is None or answer.done():
            for fd in packet.fds:
                os.close(fd)
        elif isinstance(message, Done):
            answer.set_result(packet)
        elif message.code:
            answer.set_exception(OSError(message.code, message.message))
        else:
            answer.set_exception(TunnelError(message.layer, message.message))

    def _on_end(self) -> None:
        if self.lost.done():
            return
        error = TunnelError("tunnel", f"{self.name} is gone; it was killed, or the node ran out of memory")
        self.lost.set_result(error)
        self.loop.remove_reader(self._channel.sock)
        self.loop.remove_writer(self._channel.sock)
        self._channel.close()
        _fail(self.ready, error)
        for answer in self._answers.values():
            _fail(answer, error)
        for process in self._processes.values():
            _resolve(process.ended, -signal.SIGKILL)
        for _, fds in self._outgoing:
            for fd in fds:
                os.close(fd)
        self._outgoing.clear()


class OuterKeeper:
    """The keeper outside every namespace: a child of ours, so its end is waited for."""

    def __init__(self, client: Client, process: asyncio.subprocess.Process) -> None:
        self.client = client
        self._process = process

    async def close(self) -> None:
        """End everything it started, and it; returns when the kernel says so."""
        self.client.close()
        try:
            await asyncio.wait_for(self._process.wait(), REAP_DEADLINE)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


async def start_keeper(*, new_session: bool = True) -> OuterKeeper:
    """Start the keeper that starts programs outside the namespaces.

    Without a new session its programs can have the caller's terminal.
    """
    ours, theirs = pair()
    with theirs:
        descriptor = theirs.fileno()
        process = await asyncio.create_subprocess_exec(
            *python_argv("vpn.keeper", str(descriptor), str(os.getpid())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            pass_fds=(descriptor,),
            start_new_session=new_session,
        )
    keeper = OuterKeeper(Client(ours, "the process keeper"), process)
    try:
        await keeper.client.started()
    except BaseException:
        await keeper.close()
        raise
    return keeper


@contextmanager
def _descriptors(
    streams: Sequence[int | None], pass_fds: Sequence[int], fds: Mapping[int, int]
) -> Iterator[dict[int, int]]:
    """Target number → descriptor here; a stream of ours that is closed becomes /dev/null."""
    with ExitStack() as stack:
        mapping: dict[int, int] = {}
        for number, fd in enumerate(streams):
            source = number if fd is None else fd
            if fd is None and not _is_open(number):
                source = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, source)
            mapping[number] = source
        mapping.update({fd: fd for fd in pass_fds})
        mapping.update(fds)
        yield mapping


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _resolve(future: asyncio.Future[Any], value: object) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # a future nobody waits for must not warn when it is collected


async def run(
    client: Client,
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    deadline: float,
) -> tuple[int, str]:
    """Run a short program to its end; its status and what it said. Killed at ``deadline`` (TimeoutError)."""
    reader, writer = os.pipe()
    source = filled(stdin)
    try:
        process = await client.spawn(argv, env=env, cwd="/", stdin=source, stdout=writer, stderr=writer)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(source)
        os.close(writer)
    try:
        async with asyncio.timeout(deadline):
            text = "\n".join([line async for line in read_lines(reader)])
            return await process.wait(), text
    finally:
        process.send_signal(signal.SIGKILL)


async def first_of(*futures: asyncio.Future[Any], deadline: float | None = None) -> None:
    """Wait until one of these is done, or the deadline passes; raises nothing of theirs."""
    await asyncio.wait(futures, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
