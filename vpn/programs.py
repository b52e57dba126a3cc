"""Find the programs and shims a tunnel needs; say which package has what is missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from vpn.errors import TunnelError

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")  # where servers live, often not on an ordinary user's PATH


class Package(NamedTuple):
    """Where distributions keep a program."""

    debian: str
    redhat: str


PACKAGES = {
    "openconnect": Package("openconnect", "openconnect (EPEL)"),
    "ocserv": Package("ocserv", "ocserv (EPEL)"),
    "occtl": Package("ocserv", "ocserv (EPEL)"),
    "slirp4netns": Package("slirp4netns", "slirp4netns"),
    "pasta": Package("passt", "passt"),
    "nft": Package("nftables", "nftables"),
    "iptables": Package("iptables", "iptables"),
    "cvmfs2": Package("cvmfs (of CERN's repository)", "cvmfs (of CERN's repository)"),
    "squashfuse": Package("squashfuse", "squashfuse (EPEL)"),
}


def environment(**more: str) -> dict[str, str]:
    """What our programs are started with: nothing of the caller's but where programs and libraries are."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {**kept, "PATH": search_path(), "LC_ALL": "C", **more}


def search_path() -> str:
    """PATH with the directories of servers at its end."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN])


def find_program(name: str) -> str:
    """The program's path; raises TunnelError naming the package when it is not installed."""
    path = shutil.which(name, path=search_path())
    if path is None:
        raise TunnelError("program", missing_program(name))
    return path


def missing_program(name: str) -> str:
    """One line for a program that was not found."""
    package = PACKAGES.get(name)
    if package is None:
        return f"{name} was not found on PATH"
    return (
        f"{name} was not found on PATH: install {package.debian} (Debian, Ubuntu) "
        f"or {package.redhat} (RHEL, Alma, Rocky), or load the site's module"
    )


def find_shim(name: str) -> str:
    """The compiled ``preload/NAME.c``; raises TunnelError when the installation could not compile it."""
    path = Path(__file__).resolve().parent / "preload" / f"{name}.so"
    if not path.is_file():
        raise TunnelError(
            "shim",
            f"{path} is missing: it is compiled when hpcq is installed; install gcc and reinstall hpcq",
        )
    return str(path)
