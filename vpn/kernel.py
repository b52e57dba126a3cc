"""Calls of the Linux kernel that Python 3.11 lacks: namespaces, mounts, process attributes.

Only thin wrappers live here, each raising OSError with the name of the call; no decisions. ``os.unshare`` is
used where Python has it (3.12), ctypes before that.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_RDONLY, MS_REMOUNT = 1, 32
MS_BIND, MS_REC, MS_SLAVE = 4096, 16384, 1 << 19
MNT_DETACH = 2

RESEND = 5
"""Seconds between two attempts of TCP to send again what pilot or gateway did not acknowledge, at most: after an outage
work is to go on within that, not within as long as it lasted. Kernels before 6.15 cannot be told.
"""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 47, 2
CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN = 12, 13, 21
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str, path: str | None = None) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}", path)


def unshare(flags: int) -> None:
    """Leave the namespaces named by CLONE_NEW* ``flags``; the caller must be single-threaded for
    CLONE_NEWUSER.
    """
    native = getattr(os, "unshare", None)
    if native is not None:
        native(flags)
        return
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, "mount", target)


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), "umount2", target)


def pivot_root(new: str) -> None:
    """Make the mount point ``new`` the root of this mount namespace, and let go of the old one (pivot_root(2), with its
    two directories one and the same).
    """
    os.chdir(new)
    _check(_libc.syscall(_pivot_root_number(), b".", b"."), "pivot_root", new)
    unmount(".")
    os.chdir("/")


def _pivot_root_number() -> int:
    return {"x86_64": 155, "aarch64": 41, "ppc64le": 203, "riscv64": 41}[os.uname().machine]


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def join(namespace: str, kind: int) -> None:
    """Enter the namespace of a file in /proc/PID/ns; the caller must be single-threaded for CLONE_NEWUSER."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, kind), "setns", namespace)
    finally:
        os.close(fd)


def keep_rights(*rights: int) -> None:
    """Let the program this process becomes keep these CAP_… of its user namespace (capabilities(7), ambient)."""
    header, sets = _Header(_CAPABILITY_VERSION_3, 0), (_Capabilities * 2)()
    _check(_libc.capget(ctypes.byref(header), sets), "capget")
    for right in rights:
        sets[0].inheritable |= 1 << right
    _check(_libc.capset(ctypes.byref(header), sets), "capset")
    for right in rights:
        raised = _libc.prctl(_PR_CAP_AMBIENT, ctypes.c_ulong(_PR_CAP_AMBIENT_RAISE), ctypes.c_ulong(right), 0, 0)
        _check(raised, "prctl(PR_CAP_AMBIENT)")


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends (PR_SET_PDEATHSIG)."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends (PR_SET_CHILD_SUBREAPER)."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")
