"""A slow, long wire between the login node and the outside, for kernels without netem.

One TUN on each side, and a process that reads packets from one, holds them back by a token bucket and half the round
trip, and writes them to the other: `carry.c` where there is a C compiler, else two in Python, one per direction, which
keep up with 1 Gbit/s for a few flows only. The TUNs take offloads, so "packets" have up to 64 kB. A full queue drops,
as a router does; it is the carrier's alone. A wire waits for no processor: the carriers come first where we may say so,
and the TUNs hold what comes meanwhile. (With a TUN's usual 500 packets the wire lost packets of 1.5 kB whenever its
carrier was not run for 6 ms, which no wire does; packets of 64 kB it did not.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from pyroute2 import IPRoute

from simulated_site import kernel, plan
from simulated_site.errors import SiteError

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4
LARGEST = 65536 + 64
QUEUE_SECONDS = 0.05
USUAL = 1500
"""Bytes of most packets."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the wire does to traffic, each way."""

    bits_per_second: float
    round_trip: float
    """Seconds."""

    @property
    def queue(self) -> float:
        """Seconds of traffic it holds: at least a round trip's, as routers do, lest one flow cannot fill it."""
        return max(QUEUE_SECONDS, self.round_trip)

    @property
    def packets(self) -> int:
        """What its queue holds of the usual size."""
        return max(1000, round(self.bits_per_second / 8 * self.queue / USUAL))

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`MBIT:MS`, such as 1000:20."""
        try:
            rate, milliseconds = (float(part) for part in text.split(":"))
        except ValueError:
            rate, milliseconds = 0.0, 0.0
        if rate <= 0 or milliseconds < 0:
            raise SiteError(f"--shape={text}: give Mbit/s and the round trip in ms, such as 1000:20")
        return cls(rate * 1e6, milliseconds / 1e3)


def connect(one: tuple[str, int], other: tuple[str, int], shape: Shape) -> None:
    """Make the two devices, (name, pid of the host's holder) each, and carry packets until the site ends."""
    ends = [_device_of(name, pid, shape) for name, pid in (one, other)]
    kernel.join("/proc/1/ns/net", kernel.CLONE_NEWNET)
    program = _compiled()
    for source, target in (ends,) if program else (ends, reversed(ends)):
        if os.fork() == 0:
            _become(program, source, target, shape)
    for end in ends:
        os.close(end)


def _device_of(name: str, pid: int, shape: Shape) -> int:
    """A TUN in the network namespace of `pid`; a descriptor of it stays valid outside."""
    kernel.join(f"/proc/{pid}/ns/net", kernel.CLONE_NEWNET)
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
        with IPRoute() as netlink:
            netlink.link("set", index=socket.if_nametoindex(name), txqlen=shape.packets)
    except OSError as error:
        raise SiteError(f"--shape needs /dev/net/tun: {error.strerror}") from error
    return descriptor


def _compiled() -> Path | None:
    """The C program, made for this site; None without a compiler that can."""
    program = plan.ROOT / "carry"
    source = Path(__file__).with_name("carry.c")
    try:
        headers = Path(__file__).parents[2] / "vpn/preload"  # joins segments for openconnect's device too
        command = ["cc", "-O2", "-I", headers, "-o", program, source]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return program


def _become(program: Path | None, source: int, target: int, shape: Shape) -> None:
    """A carrier's process: the program carries both ways; never returns."""
    with contextlib.suppress(OSError):  # not in a user namespace
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        if program is None:
            _carry(source, target, shape)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            for end in (source, target):
                os.set_inheritable(end, True)
            numbers = source, target, shape.bits_per_second / 8, shape.round_trip / 2 * 1e9, shape.queue * 1e9
            os.execv(program, [str(program), *(format(number, ".0f") for number in numbers)])
    finally:
        os._exit(1)


def _carry(source: int, target: int, shape: Shape) -> None:
    """One direction's whole life; never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    free = 0.0  # when the wire has sent all it was given
    while True:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        readable = select.select([source], [], [], timeout)[0]
        now = time.monotonic()
        if readable and free - now < shape.queue:
            packet = os.read(source, LARGEST)
            free = max(free, now) + len(packet) * 8 / shape.bits_per_second
            waiting.append((free + shape.round_trip / 2, packet))
        elif readable:
            os.read(source, LARGEST)  # dropped
        while waiting and waiting[0][0] <= now:
            with contextlib.suppress(OSError):  # the device is not up yet, or its queue is full
                os.write(target, waiting.popleft()[1])
