"""The rule of nat that redirects TCP in a namespace: by netlink, else by the programs that know this kernel.

nf_tables is spoken to directly, which takes no program and no time. A kernel without it, or with one that does not
understand what we say, may still do the same for ``nft``, or for ``iptables`` with its older tables. A program is
started in a mount namespace of its own with an empty /run, where ``iptables`` makes a lock that it may not make in the
host's, and keeps the rights over the network that whoever is not root inside loses otherwise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from vpn import kernel, netlink
from vpn.errors import TunnelError
from vpn.programs import environment, search_path
from vpn.refusals import explain_nat

TABLE = "relay"
DEADLINE = 20.0  # seconds for a program
_NFT_IPV4, _NFT_IPV6 = 2, 10  # NFPROTO_*


def commands(device: str, port: int, *, six: bool) -> list[list[str]]:
    """The programs that can make the rule, in the order to try them, as they are called. Pure."""
    family, tables = ("ip6", "ip6tables") if six else ("ip", "iptables")
    script = (
        f"table {family} {TABLE} {{ chain output {{ type nat hook output priority -100; policy accept; "
        f'oifname "{device}" meta l4proto tcp redirect to :{port}; }}; }}'
    )
    rule = ["-w", "-t", "nat", "-A", "OUTPUT", "-o", device, "-p", "tcp", "-j", "REDIRECT", "--to-ports", str(port)]
    return [["nft", script], *([name, *rule] for name in (tables, f"{tables}-legacy"))]


def redirect(device: str, port: int, *, six: bool, run: Callable[[list[str]], str] | None = None) -> None:
    """Send TCP that leaves by a device to this port of the namespace's loopback; it lasts as long as the namespace.

    Raises TunnelError with what the kernel said, and each program.
    """
    try:
        rule = netlink.redirect(_NFT_IPV6 if six else _NFT_IPV4, TABLE, device, port)
        netlink.perform(netlink.NETFILTER, rule)
    except OSError as error:
        said = []
        for argv in commands(device, port, six=six):
            problem = (run or run_inside)(argv)
            if not problem:
                return
            said.append(f"{argv[0]}: {problem}")
        raise TunnelError("tunnel", f"{explain_nat(error, six=six)} ({'; '.join(said)})") from None


def run_inside(argv: list[str]) -> str:
    """Run one of the programs; its complaint, or "" when it has done it."""
    import subprocess  # noqa: PLC0415 - slow to import, and hardly ever wanted

    program = shutil.which(argv[0], path=search_path())
    if program is None:
        return "not installed"
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            env=environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=DEADLINE,
            check=False,
            preexec_fn=_prepare,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {DEADLINE:g} s"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.decode(errors="replace").split("\n")
    return lines[0].strip()[:200] or f"status {done.returncode}"


def _prepare() -> None:
    """In the child, before the program: the holder has no threads."""
    kernel.unshare(kernel.CLONE_NEWNS)
    if os.path.isdir("/run"):  # noqa: PTH112  (nothing that could raise)
        kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0700,size=1m")
    kernel.keep_rights(kernel.CAP_NET_ADMIN, kernel.CAP_NET_RAW)
