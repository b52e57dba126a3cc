"""Names, addresses and paths of the simulated site. Constants and pure functions only.

::

    wan 203.0.113.10 ───── 203.0.113.1 login 192.0.2.1 ──┬── cn1 192.0.2.11
                                       (does not forward) └── cn2 192.0.2.12

`wan` is the outside: name server, XRootD, HTTP. The compute nodes have a route to the login node's network and
to nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

ROOT = Path("/run/hpcq-site")
"""Everything the site writes; on the site's own tmpfs, so it ends with the site."""

DESCRIPTION = ROOT / "site.json"
LOGS = ROOT / "log"
SCRATCH = ROOT / "scratch"
SCRIPTS = ROOT / "scripts"
STORE = ROOT / "xrootd" / "data" / "store"
SLURM_CONF = ROOT / "slurm" / "slurm.conf"

USER = "physicist"
HOME = ROOT / "home" / USER
FIRST_FREE_UID = 2000

XROOTD_NAME = "xrootd.wan.test"
HTTP_NAME = "http.wan.test"
XROOTD_PORT = 1094
XROOTD_URL = f"root://{XROOTD_NAME}:{XROOTD_PORT}//store/"
HTTP_URL = f"http://{HTTP_NAME}/store/"
ROOT_FILES = ("uproot-Zmumu.root", "uproot-HZZ.root")

WAN_ADDRESS = "203.0.113.10"
LOGIN_OUTSIDE = "203.0.113.1"
LOGIN_INSIDE = "192.0.2.1"
PREFIX_LENGTH = 24

BRIDGE = "cluster0"


@dataclasses.dataclass(frozen=True)
class Host:
    """One simulated machine."""

    name: str
    address: str
    """The address other hosts know it by."""
    name_server: str
    compute: bool = False


HOSTS = (
    Host("wan", WAN_ADDRESS, WAN_ADDRESS),
    Host("login", LOGIN_INSIDE, WAN_ADDRESS),
    # Nothing answers on the login node's port 53: names of the outside do not resolve on a compute node.
    Host("cn1", "192.0.2.11", LOGIN_INSIDE, compute=True),
    Host("cn2", "192.0.2.12", LOGIN_INSIDE, compute=True),
)
HOST_NAMES = tuple(host.name for host in HOSTS)
COMPUTE = tuple(host for host in HOSTS if host.compute)

ZONE = {XROOTD_NAME: WAN_ADDRESS, HTTP_NAME: WAN_ADDRESS, "dns.wan.test": WAN_ADDRESS}
"""What the outside's name server answers."""


def hosts_file(host: Host) -> str:
    """/etc/hosts: the cluster's own names inside, the outside's own names outside."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    if host.name == "wan":
        lines += [f"{WAN_ADDRESS} {XROOTD_NAME} {HTTP_NAME} wan", f"{LOGIN_OUTSIDE} login"]
    else:
        lines += [f"{other.address} {other.name}" for other in HOSTS if other.name != "wan"]
    return "\n".join(lines) + "\n"


def resolv_conf(host: Host) -> str:
    """/etc/resolv.conf: one name server, asked once, so that a dead one fails fast."""
    return f"nameserver {host.name_server}\noptions timeout:1 attempts:1\n"
