"""Places to mount on, in a mount namespace of our own: a holder's work, done by a single-threaded process.

An ordinary user cannot make a directory in / of the host, and no overlay of / works without root everywhere. So a root
directory that lacks one is replaced: a small tmpfs with every entry of the old one bound in (links copied), made the
root by pivot_root(2), and read-only like the old one was to this user. Programs, terminals, /proc and automounts stay
as they were, since every mount comes along and stays a slave of the host's.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from vpn import kernel
from vpn.errors import TunnelError

_TMPFS = kernel.MS_NOSUID | kernel.MS_NODEV


def stage(top: str, places: list[str], shown: list[str]) -> None:
    """See ``vpn.messages.Stage``; raises TunnelError, or OSError of a mount."""
    if not top.startswith("/") or "/" in top[1:] or not all(map(_is_name, [*places, *shown])):
        raise TunnelError("cvmfs", f"{top} cannot be staged: a directory of the root, and plain names in it")
    with ExitStack() as stack:
        held = {name: _hold(stack, f"{top}/{name}", os.O_RDONLY | os.O_DIRECTORY) for name in shown}
        if not Path(top).is_dir():
            replace_root([top[1:]])
        kernel.mount("tmpfs", top, "tmpfs", _TMPFS, "mode=0755,size=1m")
        for name in (*places, *shown):
            Path(top, name).mkdir()
        for name, fd in held.items():
            kernel.mount(f"/proc/self/fd/{fd}", f"{top}/{name}", None, kernel.MS_BIND | kernel.MS_REC)


def _is_name(text: str) -> bool:
    return bool(text) and "/" not in text and text not in (".", "..")


def replace_root(more: list[str]) -> None:
    """Give this mount namespace a root with the same entries, and empty directories ``more``."""
    with ExitStack() as stack:
        entries = [(entry.name, entry.is_symlink(), entry.is_dir(follow_symlinks=False)) for entry in os.scandir("/")]
        covered = building_site(
            [name for name, _, directory in entries if directory], Path("/proc/self/mountinfo").read_text()
        )
        # Held from before, since one of them is about to be covered.
        held = {name: _hold(stack, f"/{name}", os.O_PATH | os.O_NOFOLLOW) for name, link, _ in entries if not link}
        base = Path("/", covered)
        kernel.mount("tmpfs", str(base), "tmpfs", _TMPFS, "mode=0755,size=1m")
        for name, link, directory in entries:
            place = base / name
            if link:
                place.symlink_to(os.readlink(f"/{name}"))  # noqa: PTH115 - exactly as it is
                continue
            place.mkdir() if directory else place.touch()
            flags = kernel.MS_BIND if name == covered else kernel.MS_BIND | kernel.MS_REC
            kernel.mount(f"/proc/self/fd/{held[name]}", str(place), None, flags)
        for name in more:
            (base / name).mkdir()
    kernel.pivot_root(str(base))
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _TMPFS)


def building_site(directories: list[str], mounts: str) -> str:
    """The directory of the root to build a new one on: with no mount below it, so that it can be bound without the
    mount that covers it. ``mounts`` is the text of mountinfo (proc(5)).
    """
    points = [line.split(" ")[4] for line in mounts.splitlines() if line.count(" ") > 4]
    for name in sorted(directories):
        if name not in ("proc", "dev") and not any(point.startswith(f"/{name}/") for point in points):
            return name
    raise TunnelError("cvmfs", "no directory of the root is without mounts: there is none to build a new root on")


def _hold(stack: ExitStack, path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd
