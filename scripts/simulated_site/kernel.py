"""The few system calls Python 3.11 has no name for, by ctypes. Decides nothing.

Every call raises `OSError` with the kernel's reason; callers turn it into advice.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the named namespaces for fresh ones."""
    _check(_libc.unshare(flags), f"unshare({flags:#x})")


def join(path: str, flags: int) -> None:
    """Enter the namespace `path` (/proc/PID/ns/…) names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.setns(descriptor, flags), f"setns({path})")
    finally:
        os.close(descriptor)


def mount(source: str, target: Path, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    arguments = (source.encode(), os.fsencode(target), kind.encode() if kind else None)
    result = _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mount {kind or 'bind'} on {target}")


def bind(source: Path | str, target: Path) -> None:
    """Show `source` at `target`."""
    mount(str(source), target, None, MS_BIND | MS_REC)


def tmpfs(target: Path, mode: str = "0755") -> None:
    """An empty file system at `target`."""
    mount("tmpfs", target, "tmpfs", MS_NOSUID, f"mode={mode}")


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    raw = name.encode()
    _check(_libc.sethostname(raw, len(raw)), f"sethostname({name})")


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel for signal `number` when the thread that started us ends."""
    _check(_libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def map_one_id(uid: int, gid: int) -> None:
    """In a new user namespace: we, and nobody else, are root. Groups cannot be changed then."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1\n")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1\n")
