"""pasta (passt(1)): slirp's work at several times its speed, where it is installed; and how it is made to end in time.

pasta joins a namespace by itself, which gives it new rights, and with them the kernel forgets its death signal: killed,
its keeper would leave it behind. So it is started by ``main``, already in the user namespace and with the few rights
there that it needs, and changes them no more. With these it may not look at the holder, which has more (ptrace(2)):
the network namespace is mounted on a file for it, where nobody else sees it. It says that it is ready by writing its
pid to a file: a FIFO.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from vpn import kernel
from vpn.gateway.addresses import UPLINK, UPLINK_DNS, UPLINK_GUEST, UPLINK_HOST
from vpn.namespace import Namespace
from vpn.process import Client, Process, python_argv
from vpn.programs import environment, find_program

RIGHTS = (kernel.CAP_NET_ADMIN, kernel.CAP_SYS_ADMIN)


def options(device: str, mtu: int, *, six: bool) -> list[str]:
    """Of passt(1): addresses as slirp4netns gives them, and nothing of the host's loopback, either way."""
    ports = [word for name in "tuTU" for word in (f"-{name}", "none")]
    return [
        "--foreground", "--quiet", "--config-net", "--no-map-gw", *ports, "--no-dhcp", "--no-dhcpv6", "--no-ra",
        *([] if six else ["--ipv4-only"]), "--address", UPLINK_GUEST, "--netmask", UPLINK.partition("/")[2],
        "--gateway", UPLINK_HOST, "--dns-forward", UPLINK_DNS, "--ns-ifname", device, "--mtu", str(mtu),
    ]  # fmt: skip


async def start(keeper: Client, namespace: Namespace, more: Sequence[str], room: str, log: int) -> tuple[Process, int]:
    """Start it, with a directory for it that is empty; its process, and a descriptor, readable when it is ready."""
    program, fifo = find_program("pasta"), f"{room}/ready"
    os.mkfifo(fifo, 0o600)
    os.close(os.open(f"{room}/net", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    ready = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        argv = python_argv("vpn.pasta", str(keeper.pid), str(namespace.pid), room, program, *more)
        return await keeper.spawn(argv, env=environment(), cwd="/", stdin=null, stdout=log, stderr=log), ready
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(null)


def main(argv: list[str]) -> None:
    """PARENT PID ROOM PROGRAM OPTION…: become the program, for the namespace of ``PID``."""
    parent, pid, room, program, *more = argv
    kernel.join(f"/proc/{pid}/ns/user", kernel.CLONE_NEWUSER)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount(f"/proc/{pid}/ns/net", f"{room}/net", None, kernel.MS_BIND)
    kernel.keep_rights(*RIGHTS)
    kernel.die_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and pasta takes that for an error
    if os.getppid() != int(parent):
        sys.exit(1)
    where = ["--pid", f"{room}/ready", "--netns-only", "--netns", f"{room}/net", "--no-netns-quit"]
    os.execv(program, [program, *more, *where])  # noqa: S606  (an argv, no shell)
