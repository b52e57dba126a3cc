"""Measures a gateway by hand, with real openconnect clients: ``python tests/measure_gateway.py [CLIENTS]``.

Each client is an ``openconnect --script-tun`` of this host, which needs no device: what arrives is thrown away. Prints
how long all take to connect, what CPU time that costs the gateway, its memory (PSS: pages that its processes share
count once) and what it costs while nothing is sent. 500 clients take about 5 GB of this host.
"""

import os
import subprocess
import sys
import time

import psutil

from vpn import temporary_gateway

CONNECT_DEADLINE = 300.0
IDLE = 20.0


def processes(client):
    daemon = psutil.Process(client.record().pid)
    return [daemon, *daemon.children(recursive=True)]


def memory(client):
    """MB."""
    return sum(process.memory_full_info().pss for process in processes(client)) / 1e6


def cpu(client):
    """Seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in processes(client))


def connect(client, number):
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


def measure(client, count):
    if refusal := client.status().refusal:
        sys.exit(f"no openconnect here: {refusal}")
    print(f"alone: {memory(client):.0f} MB")
    began, spent, clients = time.monotonic(), cpu(client), []
    try:
        clients += (connect(client, number) for number in range(count))
        while (there := sum(one.state == "connected" for one in client.status().pilots)) < count:
            if time.monotonic() > began + CONNECT_DEADLINE:
                break
            time.sleep(0.5)
        took = time.monotonic() - began
        print(
            f"{there} of {count} connected in {took:.1f} s, {cpu(client) - spent:.1f} s of CPU, {memory(client):.0f} MB"
        )
        spent = cpu(client)
        time.sleep(IDLE)
        print(f"idle: {100 * (cpu(client) - spent) / IDLE:.1f} % of a core")
    finally:
        for process in clients:
            process.terminate()
        for process in clients:
            process.wait()


if __name__ == "__main__":
    with temporary_gateway(f"measured-{os.getpid()}") as gateway:
        measure(gateway, int(sys.argv[1]) if len(sys.argv) > 1 else 500)
