"""Measures a gateway by hand: ``python tests/measure_gateway.py [--mode openconnect|relay] [--clients 500]``.

A client of openconnect is an ``openconnect --script-tun`` of this host, which needs no device: what arrives is thrown
away. One of the relay is a session with ``CONNECTIONS`` open connections, as a pilot has; all are in this process. What
is measured are the gateway's processes: how long all clients take to connect, what CPU time that costs, memory (PSS:
pages that processes share count once), and what clients cost that send nothing. 500 openconnect take about 5 GB of this
host.
"""

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter

import psutil

from vpn.gateway.client import GatewayClient, start_gateway
from vpn.gateway.state import GatewayConfig
from vpn.relay.link import Link
from vpn.spawn import raise_file_limit

CONNECT_DEADLINE = 300.0
IDLE = 20.0
CONNECTIONS = 4
AT_ONCE = 50  # relay clients that log in at the same time
HERE = "127.0.0.1"


@contextlib.contextmanager
def running(name):
    """A gateway through which this host itself can be reached."""
    client = GatewayClient(name)
    start_gateway(GatewayConfig(name, allow=(HERE,)))
    try:
        yield client
    finally:
        client.stop()
        shutil.rmtree(client.directory, ignore_errors=True)


class Gauge:
    """What the gateway's processes use."""

    def __init__(self, client):
        self.client = client
        self.began, self.spent = time.monotonic(), self.cpu()

    def processes(self):
        daemon = psutil.Process(self.client.record().pid)
        return [daemon, *daemon.children(recursive=True)]

    def memory(self):
        """MB."""
        return sum(process.memory_full_info().pss for process in self.processes()) / 1e6

    def cpu(self):
        """Seconds."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def tell(self, there, count):
        took, spent = time.monotonic() - self.began, self.cpu() - self.spent
        print(f"{there} of {count} connected in {took:.1f} s, {spent:.1f} s of CPU, {self.memory():.0f} MB")

    def tell_idle(self, spent):
        print(f"idle: {100 * (self.cpu() - spent) / IDLE:.1f} % of a core, {self.memory():.0f} MB")


def start_openconnect(client, number):
    credential = client.issue(f"client {number}")
    argv = [
        "openconnect", "--protocol=anyconnect", "--non-inter", "--no-proxy", "--no-dtls", "--disable-ipv6",
        "--passwd-on-stdin", f"--user={credential.username}", f"--servercert={credential.pin}",
        "--script-tun", "--script", "exec sleep 3600", f"https://{credential.addresses[0]}:{credential.port}/",
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process.stdin.write(credential.password.reveal().encode() + b"\n")
    process.stdin.close()
    return process


def measure_openconnect(client, count):
    if refusal := client.status().refusal:
        sys.exit(f"no openconnect here: {refusal}")
    gauge, clients = Gauge(client), []
    try:
        clients += (start_openconnect(client, number) for number in range(count))
        while (there := sum(one.state == "connected" for one in client.status().pilots)) < count:
            if time.monotonic() > gauge.began + CONNECT_DEADLINE:
                break
            time.sleep(0.5)
        gauge.tell(there, count)
        spent = gauge.cpu()
        time.sleep(IDLE)
        gauge.tell_idle(spent)
    finally:
        for process in clients:
            process.terminate()
        for process in clients:
            process.wait()


async def measure_relay(client, count):
    raise_file_limit()
    gauge, turn = Gauge(client), asyncio.Semaphore(AT_ONCE)

    async def connect(credential, port):
        async with turn:
            link = Link(credential)
            await link.open()
            return link, [await link.connect(HERE, port) for _ in range(CONNECTIONS)]

    with socket.create_server((HERE, 0), backlog=4096) as server:
        server.setblocking(False)
        accepting = asyncio.create_task(accept(server))
        port = server.getsockname()[1]
        attempts = []
        for number in range(count):
            credential = await asyncio.to_thread(client.issue, f"client {number}")
            attempts.append(asyncio.create_task(connect(credential, port)))
        results = await asyncio.gather(*attempts, return_exceptions=True)
        made = [one for one in results if not isinstance(one, BaseException)]
        there = sum(one.state == "connected" for one in client.status().pilots)
        gauge.tell(there, count)
        print(f"connections: {sum(len(streams) for _, streams in made)}")
        for reason, times in Counter(str(one) for one in results if isinstance(one, BaseException)).items():
            print(f"failed {times} times: {reason}")
        spent = gauge.cpu()
        await asyncio.sleep(IDLE)
        gauge.tell_idle(spent)
        accepting.cancel()
        for _, streams in made:
            for stream in streams:
                stream.close()
        await asyncio.gather(*(link.close() for link, _ in made))


async def accept(server):
    with contextlib.ExitStack() as stack:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(server)
            stack.enter_context(connection)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=("openconnect", "relay"), default="openconnect")
    parser.add_argument("--clients", type=int, default=500)
    given = parser.parse_args()
    with running(f"measured-{os.getpid()}") as client:
        print(f"alone: {Gauge(client).memory():.0f} MB")
        if given.mode == "relay":
            asyncio.run(measure_relay(client, given.clients))
        else:
            measure_openconnect(client, given.clients)


if __name__ == "__main__":
    main()
