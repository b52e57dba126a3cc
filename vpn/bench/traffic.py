"""Bytes from memory to memory over TCP: the server of the far side, and the workers in a tunnel.

Standard library only, and started as a file, so that a worker costs a few milliseconds and the far side needs nothing
but Python::

    traffic.py serve [--listen ADDRESS] [--port PORT] [--idle SECONDS]     prints {"port": …}, then serves
    traffic.py work                                     jobs as JSON lines on stdin, results on stdout

A connection begins with one JSON line, a ``Job``: ``up`` (the worker sends), ``down`` (the server sends) or ``echo``.
The *receiver* measures: it notes the time and the count of bytes every ``STEP`` seconds. All receivers of a job are on
one host, so that ``figures`` can add up what came in within a time common to all. The receiver also ends the transfer;
what is still on its way is dropped by a reset.

Every worker of a job is a process; they connect first and begin together. A worker that cannot connect, or gets no
data, reports why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Any, NamedTuple

BLOCK = 1 << 18
"""Bytes of one read or write: larger ones leave the processor's cache and are slower."""
CONNECT_DEADLINE = 20.0
STALL_DEADLINE = 10.0
"""Seconds without a byte after which a transfer has failed."""
LONGEST = 600.0
"""Seconds a server sends or receives for one connection at most."""
CONNECTIONS = 256
IDLE = 3600.0
HEADER_LIMIT, RESULT_LIMIT = 1024, 1 << 20
STEP = 0.05
"""Seconds between two samples."""


class Job(NamedTuple):
    """What one worker does; times in seconds, ``trips`` there and back for ``echo``."""

    kind: str
    warmup: float = 0.0
    seconds: float = 0.0
    trips: int = 0

    def line(self) -> bytes:
        """The header of a connection."""
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Job:
        """The inverse of ``line``; raises ValueError."""
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("not a job")
        job = cls(
            str(fields.get("kind")),
            float(fields.get("warmup", 0)),
            float(fields.get("seconds", 0)),
            int(fields.get("trips", 0)),
        )
        if job.kind not in ("up", "down", "echo") or not 0 <= job.warmup + job.seconds <= LONGEST:
            raise ValueError("not a job")
        return job


class Series:
    """Bytes as they come in, every ``STEP`` seconds. Pure: the time is an argument."""

    def __init__(self, job: Job, now: float) -> None:
        self.end = now + job.warmup + job.seconds
        self.total = 0
        self.samples: list[tuple[float, int]] = [(now, 0)]

    def add(self, count: int, now: float) -> bool:
        """Count bytes read at ``now``; whether the time is over."""
        self.total += count
        if now - self.samples[-1][0] >= STEP:
            self.samples.append((now, self.total))
        return now >= self.end

    def stop(self) -> None:
        """Nothing came until the end."""
        self.samples.append((self.end, self.total))


def receive(sock: socket.socket, job: Job) -> dict[str, Any]:
    """Read until the time is over: ``samples`` of time and bytes since the first; raises OSError when data stops."""
    block = bytearray(BLOCK)
    sock.settimeout(STALL_DEADLINE)
    count = sock.recv_into(block)
    if not count:
        raise ConnectionError("the other side closed the connection before the first byte")
    series = Series(job, time.monotonic())
    over = series.add(count, time.monotonic())
    sock.settimeout(job.warmup + job.seconds + STEP)  # once: it is a system call
    while not over:
        try:
            count = sock.recv_into(block)
        except TimeoutError:
            series.stop()  # starved by the others: nothing is a result too
            break
        if not count:
            raise ConnectionError("the other side closed the connection in the middle")
        over = series.add(count, time.monotonic())
    sock.settimeout(STALL_DEADLINE)
    return {"samples": series.samples}


def send_until_told(sock: socket.socket) -> bytes:
    """Send until the receiver says something, which is returned; or until it is gone."""
    block = memoryview(bytes(BLOCK))
    sock.setblocking(False)
    end = time.monotonic() + LONGEST
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while time.monotonic() < end:
            ready = selector.select(STALL_DEADLINE)
            if not ready:
                raise TimeoutError(f"nothing could be sent for {STALL_DEADLINE:g} s")
            if ready[0][1] & selectors.EVENT_READ:
                break
            try:
                sock.send(block)
            except BlockingIOError:
                continue
        else:
            raise TimeoutError("the receiver did not end the transfer")
    sock.settimeout(STALL_DEADLINE)
    return read_line(sock, RESULT_LIMIT)


def read_line(sock: socket.socket, limit: int = HEADER_LIMIT) -> bytes:
    """A short line; raises ConnectionError at the end, ValueError when it is long."""
    line = b""
    while not line.endswith(b"\n"):
        more = sock.recv(limit)
        if not more:
            raise ConnectionError("the other side closed the connection")
        line += more
        if len(line) > limit:
            raise ValueError("a line is too long")
    return line


def drop(sock: socket.socket) -> None:
    """Close with a reset: what is in the buffers is not waited for."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- the far side ------------------------------------------------------------------------------------------------


def serve(listen: str, port: int, idle: float) -> None:
    """Serve, one process a connection, until nothing came for ``idle`` seconds or standard input ends."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.create_server((listen, port), family=family, backlog=CONNECTIONS) as listener:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        _accept(listener, wake, idle)


def _accept(listener: socket.socket, wake: int, idle: float) -> None:
    children: set[int] = set()
    stdin = _standard_input()
    with selectors.DefaultSelector() as selector:
        for source in (listener.fileno(), wake, *stdin):
            selector.register(source, selectors.EVENT_READ)
        try:
            while ready := selector.select(None if children else idle):
                sources = {key.fd for key, _ in ready}
                if stdin and stdin[0] in sources and not os.read(stdin[0], 4096):
                    return
                if wake in sources:
                    os.read(wake, 4096)
                    children -= _reap(children)
                if listener.fileno() in sources:
                    connection, _ = listener.accept()
                    with connection:
                        if len(children) < CONNECTIONS and (pid := _fork_for(connection)):
                            children.add(pid)
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def _standard_input() -> list[int]:
    """Standard input, if its end can tell that whoever started us is gone."""
    return [] if sys.stdin is None or sys.stdin.isatty() else [0]


def _reap(children: set[int]) -> set[int]:
    return {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0] == pid}


def _fork_for(connection: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        answer(connection)
        status = 0
    except (OSError, ValueError) as error:
        print(f"traffic: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def answer(sock: socket.socket) -> None:
    """The server's side of one connection."""
    sock.settimeout(STALL_DEADLINE)
    job = Job.parse(read_line(sock))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if job.kind == "down":
        with contextlib.suppress(ConnectionError):  # the receiver has what it wanted
            send_until_told(sock)
        return
    sock.sendall(b"\n")  # the worker waits for it: its data must not be read as a part of the header
    if job.kind == "echo":
        while data := sock.recv(HEADER_LIMIT):
            sock.sendall(data)
    else:
        result = receive(sock, job)
        sock.sendall(json.dumps(result).encode() + b"\n")
        _discard(sock)


def _discard(sock: socket.socket) -> None:
    """Read until the sender has seen its result: closing at once would reset the connection before."""
    block = bytearray(BLOCK)
    with contextlib.suppress(OSError):
        while sock.recv_into(block):
            pass


# --- in the tunnel -----------------------------------------------------------------------------------------------


def work() -> None:
    """Take jobs from standard input until its end: ``{"server": [host, port], "workers": n, …Job}``."""
    for line in sys.stdin:
        fields = json.loads(line)
        host, port = fields.pop("server")
        print(json.dumps(run_workers((host, port), fields.pop("workers"), Job(**fields))), flush=True)


def run_workers(server: tuple[str, int], workers: int, job: Job) -> list[dict[str, Any]]:
    """Run a job in ``workers`` processes that begin together; what each found, or ``{"error": …}``."""
    ready, went = os.pipe(), os.pipe()
    outputs: dict[int, int] = {}
    for _ in range(workers):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(went[1])
            os.close(reader)
            _worker(server, job, (ready[1], went[0], writer))
        os.close(writer)
        outputs[pid] = reader
    os.close(ready[1])
    os.close(went[0])
    missing = workers
    while missing and (told := os.read(ready[0], missing)):
        missing -= len(told)
    os.close(went[1])  # they see the end of this pipe all at once
    os.close(ready[0])
    return [_collect(pid, reader) for pid, reader in outputs.items()]


def _collect(pid: int, reader: int) -> dict[str, Any]:
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return {"error": f"the worker ended with {os.waitstatus_to_exitcode(status)} and said nothing"}
    found: dict[str, Any] = json.loads(text)
    return found


def _worker(server: tuple[str, int], job: Job, pipes: tuple[int, int, int]) -> None:
    """One process; never returns."""
    ready, went, output = pipes
    result: dict[str, Any] = {"error": "killed"}
    try:
        result = _connect_and_do(server, job, ready, went)
    except (OSError, ValueError) as error:
        result = {"error": f"{server[0]} port {server[1]}: {error}"}
    finally:
        os.write(output, json.dumps(result).encode())
        os._exit(0)


def _connect_and_do(server: tuple[str, int], job: Job, ready: int, went: int) -> dict[str, Any]:
    try:
        sock = socket.create_connection(server, timeout=CONNECT_DEADLINE)
    finally:
        os.write(ready, b".")
        os.close(ready)
    os.read(went, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(STALL_DEADLINE)
    sock.sendall(job.line())
    return do(sock, job)


def do(sock: socket.socket, job: Job) -> dict[str, Any]:
    """The worker's side of one connection, after its header."""
    if job.kind == "down":
        result: dict[str, Any] = receive(sock, job)
    else:
        read_line(sock)
        if job.kind == "echo":
            return {"trips": [_trip(sock) for _ in range(job.trips)]}
        result = json.loads(send_until_told(sock))
    drop(sock)
    return result


def _trip(sock: socket.socket) -> float:
    """Seconds of one round trip of one byte."""
    began = time.perf_counter()
    sock.sendall(b"x")
    if not sock.recv(1):
        raise ConnectionError("the other side closed the connection")
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("traffic", description="Bytes over TCP, for hpcq bench tunnel.")
    commands = parser.add_subparsers(dest="command", required=True)
    server = commands.add_parser("serve")
    server.add_argument("--listen", default="0.0.0.0")  # noqa: S104 - the far side of a measurement must be reachable
    server.add_argument("--port", type=int, default=0)
    server.add_argument("--idle", type=float, default=IDLE)
    commands.add_parser("work")
    options = parser.parse_args(argv)
    if options.command == "serve":
        serve(options.listen, options.port, options.idle)
    else:
        work()


if __name__ == "__main__":
    main()
