"""A queue and a pilot with a tunnel, in a network namespace of their own: tasks move known numbers of bytes, and what
they are told is printed as JSON. Run by `test_bytes_counted` as ``unshare … python counted.py MODE``.

The server outside (at an address that no device here has, but which leads here) holds connections until it is told to
go on: the pilot's totals say when it has seen what went over them.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading

import cloudpickle
from running import DEADLINE, eventually

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])

OUTSIDE = "203.0.113.1"
COMMANDS = (
    "ip link set lo up",
    "ip link add outside0 type veth peer name outside1",
    "ip link set outside1 up",
    "ip addr add 192.0.2.1/24 dev outside0",
    "ip link set outside0 up",
    "ip route add default via 192.0.2.2",
    f"ip route add local {OUTSIDE} dev lo",
)
LET_LONG_GO, LET_SHORT_GO = 1, 2
SMALL, SHORT, LONG, PUT = 10_000, 100_000, 2_000_000, 300_000


class Server:
    """Takes bytes, gives bytes, and where a gate is named gives as many again when that is opened."""

    def __init__(self) -> None:
        self.listener = socket.create_server((OUTSIDE, 0))
        self.gates = {LET_LONG_GO: threading.Semaphore(0), LET_SHORT_GO: threading.Semaphore(0)}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as lines:
            put, get, gate = map(int, lines.readline().split())
            lines.read(put)
            connection.sendall(b"x" * get)
            if gate:
                self.gates[gate].acquire()
                connection.sendall(b"x" * get)


def transfer(where, *connections):
    """One connection after the other: bytes to put, bytes to get, the gate it waits at."""
    for put, get, gate in connections:
        with socket.create_connection(where) as connection:
            connection.sendall(b"%d %d %d\n" % (put, get, gate) + b"y" * put)
            left = 2 * get if gate else get
            while data := connection.recv(1 << 16):
                left -= len(data)
            assert left == 0


class Counted:
    """A queue with its pilot, and what the server is asked for."""

    def __init__(self, queue, server) -> None:
        self.queue, self.server = queue, server
        self.where = server.listener.getsockname()

    def submit(self, *connections, **options):
        task = hpcq.PythonTask(transfer, self.where, *connections).set(**options)
        self.queue.submit(task)
        return task

    def carried(self):
        [pilot] = self.queue.pilots()
        return (pilot.bytes_received or 0) + (pilot.bytes_sent or 0)

    def see(self, count):
        eventually(lambda: self.carried() >= count, f"{count} bytes are counted")

    def told(self, task):
        assert self.queue.wait_for_id(task.id, timeout=DEADLINE) is task
        assert task.outcome == "success", task.message
        return [task.resources_measured.get(name) for name in ("received", "sent")]

    def alone(self):
        """Many short connections, and nobody else."""
        task = self.submit(*[(0, SMALL, 0)] * 20, (0, SMALL, LET_LONG_GO))
        self.see(21 * SMALL)
        self.server.gates[LET_LONG_GO].release()
        return self.told(task)

    def at_once(self):
        """One long connection, both ways, and short ones meanwhile."""
        before = self.carried()
        long = self.submit((PUT, LONG, LET_LONG_GO))
        short = self.submit(*[(0, SHORT, LET_SHORT_GO)] * 2)
        for count in (1, 3):
            self.see(before + PUT + LONG + count * SHORT)
            self.server.gates[LET_SHORT_GO].release()
        told = self.told(short)
        self.server.gates[LET_LONG_GO].release()
        return self.told(long), told


@contextlib.contextmanager
def gateway():
    command = [sys.executable, "-m", "vpn", "gateway"]
    subprocess.run([*command, "start", "--allow", OUTSIDE], check=True, stdout=sys.stderr)
    try:
        yield
    finally:
        subprocess.run([*command, "stop"], check=True, stdout=sys.stderr)


def main(mode):
    for command in COMMANDS:
        subprocess.run(command.split(), check=True)
    with (
        contextlib.nullcontext() if mode == "slirp" else gateway(),
        hpcq.Queue("counted", address="127.0.0.1") as queue,
    ):
        queue.submit_pilots(1, batch="local", cores=2, vpn=mode)
        queue.wait_for_pilots(1, timeout=DEADLINE)
        counted = Counted(queue, Server())
        alone, (long, short) = counted.alone(), counted.at_once()
        outside = counted.told(counted.submit(network="host"))
        figures = {"alone": alone, "long": long, "short": short, "outside": outside}
        all_told = sum(sum(figures[name]) for name in ("alone", "long", "short"))
        counted.see(all_told)
        [pilot] = queue.pilots()
        figures["pilot"] = [pilot.bytes_received + pilot.bytes_sent - all_told, pilot.bytes_unattributed]
        print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
