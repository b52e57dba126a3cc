"""Measuring large arguments and results: a round trip against what TLS moves between two processes of this machine.

The yardstick is Python's own ``ssl`` with blocking sockets, one process sending and one receiving into the same small
buffer again and again, so nothing is kept. It is measured before each round trip, in the same sitting: on a machine
that others use too, only figures of the same minute can be compared. A round trip moves the data twice, and has it in
fresh memory four times: the copy that ``submit`` makes, the pilot's, the function's result, and the user's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import ssl
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from hpcq import connection as conn
from hpcq import state_dir
from hpcq.errors import HpcqError
from hpcq.queue import Queue
from hpcq.task import PythonTask

PILOT_TIMEOUT = 60.0
"""Seconds the local pilot has to be ready."""

TASK_TIMEOUT = 600.0
"""Seconds one round trip may take."""

STEP = 1 << 20


class Block:
    """Bytes that pickle as an array's data does: beside the pickle, not in it."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @classmethod
    def of_size(cls, size: int) -> Self:
        """Random bytes, the same every mebibyte."""
        return cls(bytearray(os.urandom(STEP)) * (size // STEP))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Block, (pickle.PickleBuffer(self.data),)


def same(block: Block) -> Block:
    """The argument as it came."""
    return block


def measure_data(megabytes: int, repeat: int) -> dict[str, Any]:
    """Rates in MB/s (10**6 bytes), the round trip's for both ways together.

    Raises:
        HpcqError: the pilot did not start, or a task did not succeed.
    """
    block = Block.of_size(megabytes << 20)
    runs = []
    with Queue() as queue:
        queue.submit_pilots(1, batch="local", cores=1)
        _round_trip(queue, Block(bytearray(2 * STEP)), PILOT_TIMEOUT)
        for _ in range(repeat):
            loopback = measure_tls(queue.name, megabytes << 20)
            trip = _round_trip(queue, block, TASK_TIMEOUT)
            runs.append({"tls": loopback, "round_trip": trip, "ratio": trip / loopback})
    middle = {name: statistics.median(run[name] for run in runs) for name in ("tls", "round_trip", "ratio")}
    return {"megabytes": megabytes, **middle, "runs": runs}


def _round_trip(queue: Queue, block: Block, timeout: float) -> float:
    began = time.perf_counter()
    queue.submit(PythonTask(same, block))
    task = queue.wait(timeout)
    if task is None:
        raise HpcqError(f"the task did not end within {timeout:.0f} s; the pilots: {queue.pilots() or 'none has come'}")
    data = task.result().data
    seconds = time.perf_counter() - began
    if memoryview(data) != memoryview(block.data):
        raise HpcqError("the result is not the argument")
    return 2 * len(block.data) / seconds / 1e6


def measure_tls(queue: str, size: int) -> float:
    """MB/s from this process to another one, with the queue's certificates."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(PILOT_TIMEOUT)
        command = [sys.executable, "-m", "hpcq.benchmark_data", str(state_dir.connection_file(queue))]
        receiver = subprocess.Popen([*command, str(server.getsockname()[1]), str(size)])
        try:
            plain, _ = server.accept()
            tls = conn.manager_tls(conn.own_identity(queue))
            with tls.wrap_socket(plain, server_side=True) as sock:
                return _send(sock, size)
        finally:
            receiver.kill()
            receiver.wait()


def _send(sock: ssl.SSLSocket, size: int) -> float:
    chunk = os.urandom(STEP)
    sock.settimeout(PILOT_TIMEOUT)
    began = time.perf_counter()
    for _ in range(size // STEP):
        sock.sendall(chunk)
    if sock.recv(1) != b"!":
        raise HpcqError("the receiving process of the TLS measurement has ended")
    return size / (time.perf_counter() - began) / 1e6


def _receive(path: str, port: int, size: int) -> None:
    info = conn.read(Path(path))
    plain = socket.create_connection(("127.0.0.1", port))
    with conn.pilot_tls(info).wrap_socket(plain, server_hostname=conn.MANAGER_NAME) as sock:
        room = bytearray(STEP)
        while size > 0:
            count = sock.recv_into(room)
            if not count:
                return
            size -= count
        sock.sendall(b"!")
        with contextlib.suppress(OSError):
            sock.recv(1)


if __name__ == "__main__":
    _receive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
