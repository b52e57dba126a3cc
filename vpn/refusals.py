"""What a refusal of the kernel means on a site, and what to ask its administrators for.

Text only: errno and settings in, one line out. Sources: user_namespaces(7), namespaces(7), and the
distributions' own switches.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

SWITCHES = {
    "user.max_user_namespaces": "/proc/sys/user/max_user_namespaces",
    "user.max_net_namespaces": "/proc/sys/user/max_net_namespaces",
    "kernel.unprivileged_userns_clone": "/proc/sys/kernel/unprivileged_userns_clone",
    "kernel.apparmor_restrict_unprivileged_userns": "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
}


def read_switches() -> dict[str, int]:
    """The sysctls that decide whether an ordinary user may make namespaces; absent ones are left out."""
    found = {}
    for name, path in SWITCHES.items():
        try:
            found[name] = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return found


def explain_unshare(code: int, *, inside: bool = False, switches: Mapping[str, int] | None = None) -> str:
    """Why making namespaces failed with errno ``code``; ``inside``: they were made but give no rights."""
    values = read_switches() if switches is None else switches
    what = "the namespace was made but gives no rights in it" if inside else "this node refuses to make one"
    reason = f"{what} ({errno.errorcode.get(code, code)}, {os.strerror(code)})"
    return f"{reason}; {_advice(code, values)}"


def _advice(code: int, values: Mapping[str, int]) -> str:
    if code in (errno.ENOSPC, errno.EUSERS):
        for name in ("user.max_user_namespaces", "user.max_net_namespaces"):
            if values.get(name) == 0:
                return f"{name} is 0: ask the site to set it, for example sysctl {name}=15000"
        return "user.max_user_namespaces or user.max_net_namespaces is used up here: ask the site to raise it"
    if code == errno.EINVAL:
        return "the kernel lacks namespaces: ask the site for CONFIG_USER_NS, CONFIG_NET_NS and CONFIG_PID_NS"
    if values.get("kernel.unprivileged_userns_clone") == 0:
        return "ask the site for sysctl kernel.unprivileged_userns_clone=1"
    if values.get("kernel.apparmor_restrict_unprivileged_userns"):
        return (
            "AppArmor restricts them: ask the site for sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0, or a profile that allows userns for this Python"
        )
    return (
        "a security policy (seccomp of a container, SELinux, AppArmor) or a chroot forbids it: "
        "ask the site, or run outside the container"
    )


def explain_nat(error: OSError, *, six: bool = False) -> str:
    """Why the redirection of TCP could not be set up in a namespace."""
    what = f"this node's kernel refuses to redirect {'IPv6' if six else 'IPv4'} connections ({error.strerror})"
    if error.errno in (errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL):
        return f"{what}: ask the site to load the modules nf_tables, nft_chain_nat and nft_redir"
    return f"{what}: a security policy (SELinux, seccomp of a container) may forbid it; ask the site"


def explain_tun(error: OSError) -> str:
    """Why /dev/net/tun could not be opened."""
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "this node has no /dev/net/tun: ask the site to load the module (modprobe tun)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            "/dev/net/tun may not be opened: ask the site for mode 0666 (udev's default), "
            "or for it in the job's devices cgroup"
        )
    return f"/dev/net/tun: {error.strerror}"
