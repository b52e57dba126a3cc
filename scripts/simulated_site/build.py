"""Bringing the site up, in order, and running the caller's command in it. The file to read for the sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulated_site import daemons, hosts, mounts, plan, slurm, storage
from simulated_site.client import Site
from simulated_site.daemons import Daemon, asked
from simulated_site.errors import SiteError
from simulated_site.shape import Shape

ENDING = ((2.0, signal.SIGINT), (3.0, signal.SIGTERM), (2.0, signal.SIGKILL))
"""After an interrupt: how long to wait, and what to send when that was not enough."""
INTERRUPTED = 128 + signal.SIGINT
SOURCES = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Options:
    """What the caller asked for."""

    command: Sequence[str]
    user: bool = False
    slurm: bool = True
    shape: Shape | None = None
    """Of the wire between the login node and the outside; None: as fast as it goes."""
    kept: tuple[Path, ...] = ()
    cwd: str = "/"
    identity: int = -1
    """File descriptor that gets what `leftovers` needs to know the site by."""
    mounted: Sequence[str] = ()
    """Mount points before the site."""
    logs: int = -1
    """Directory descriptor that gets the servers' logs at the end."""


def builder(options: Options) -> int:
    """The site, then the command; its status."""
    is_root = Path("/proc/self/uid_map").read_text().split()[2] != "1"
    site = build(options, is_root)
    try:
        return run_command(site, options)
    finally:
        copy_logs(options.logs)


def build(options: Options, is_root: bool) -> Site:
    """Mounts, user, hosts, then the servers; described in `plan.DESCRIPTION` when all answer."""
    kept = mounts.prepare([SOURCES.parent, Path(sys.prefix), Path(options.cwd), *options.kept])
    tell_identity(options)
    mounts.copy_scripts(SOURCES)
    user = mounts.free_user(is_root)
    mounts.add_user(user)
    left_out = {f"device {index}": reason for index, reason in enumerate(mounts.prepare_devices(), 1)}
    pids = hosts.bring_up(kept, options.shape)
    description = describe(pids, user, is_root, left_out)
    left_out |= decide_left_out(options, is_root)
    description["slurm"] = "slurm" not in left_out
    site = Site(description)
    start_servers(site)
    plan.DESCRIPTION.write_text(json.dumps(description, indent=2))
    return site


def describe(pids: dict[str, int], user: mounts.User, is_root: bool, left_out: dict[str, str]) -> dict[str, Any]:
    """What `site.json` says."""
    return {
        "path": str(plan.DESCRIPTION),
        "root": is_root,
        "hosts": {
            host.name: {"pid": pids[host.name], "address": host.address, "compute": host.compute} for host in plan.HOSTS
        },
        "user": dataclasses.asdict(user),
        "python": sys.executable,
        "scripts": str(plan.SCRIPTS),
        "scratch": str(plan.SCRATCH),
        "logs": str(plan.LOGS),
        "dns": plan.WAN_ADDRESS,
        "outside_address": {"wan": plan.WAN_ADDRESS, "login": plan.LOGIN_OUTSIDE},
        "xrootd_url": plan.XROOTD_URL,
        "store": str(plan.STORE),
        "http_url": plan.HTTP_URL,
        "files": list(plan.ROOT_FILES),
        "slurm": False,
        "slurm_conf": str(plan.SLURM_CONF),
        "partitions": ["normal", "debug"],
        "left_out": left_out,
    }


def decide_left_out(options: Options, is_root: bool) -> dict[str, str]:
    """Which servers this machine or this caller cannot have, and why."""
    reasons = {}
    if not options.slurm:
        reasons["slurm"] = "not asked for (--no-slurm)"
    elif not is_root:
        reasons["slurm"] = "munged and slurmd must run as root and change users; a user namespace of one id cannot"
    elif missing := slurm.missing_programs():
        reasons["slurm"] = f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    if not shutil.which("xrootd"):
        reasons["xrootd"] = "xrootd not found: apt-get install xrootd-server xrootd-client"
    return reasons


def start_servers(site: Site) -> None:
    """All servers at once, then wait for each."""
    check_user_python(site)
    batch = slurm.start(site) if site.slurm else []
    outside = start_outside(site)
    store = storage.start(site) if "xrootd" not in site.left_out else None
    outside.wait_until(lambda: asked(site, "login", ["getent", "hosts", plan.XROOTD_NAME]))
    if store:
        storage.wait_ready(site, store)
    if batch:
        slurm.wait_ready(site, batch)


def start_outside(site: Site) -> Daemon:
    """Name and web server; as root they give it up for the ordinary user's ids."""
    ids = site.description["user"]
    give_up = [str(ids["uid"]), str(ids["gid"])] if site.description["root"] else []
    argv = [sys.executable, "-m", "simulated_site.outside", str(plan.STORE.parent), *give_up]
    return Daemon(site, "wan", "outside", argv)


def check_user_python(site: Site) -> None:
    """Jobs run this Python as the ordinary user: find out now whether they can."""
    answer = site.run("login", [sys.executable, "-c", "import encodings"], timeout=daemons.PROBE_DEADLINE)
    if answer.returncode:
        raise SiteError(
            f"the site's ordinary user cannot run {sys.executable}: {answer.stderr.strip()};"
            " use a Python at a path everybody can read (scripts/demo and scripts/test make one)"
        )


def run_command(site: Site, options: Options) -> int:
    """The caller's command on the login node, on the caller's terminal."""
    cwd = None if options.user else options.cwd
    argv = site.command("login", options.command, user=options.user, cwd=cwd)
    process = subprocess.Popen(argv, env=site.environment(options.user))
    try:
        status = process.wait()
    except KeyboardInterrupt:  # a terminal sent it to the command as well: let it end by itself
        status = end(process)
    return status if status >= 0 else 128 - status


def end(process: subprocess.Popen[bytes]) -> int:
    """After an interrupt, the command's status; what it leaves behind ends with the site."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes on the one the terminal sent us already
    for grace, stronger in ENDING:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(grace) or INTERRUPTED
        process.send_signal(stronger)
    return INTERRUPTED


def tell_identity(options: Options) -> None:
    """Tell who wants to look for leftovers afterwards what was the site's (`leftovers`)."""
    if options.identity < 0:
        return
    numbers = {kind: Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("pid", "mnt", "net")}
    os.write(options.identity, json.dumps({"namespaces": numbers, "mounts": options.mounted}).encode())
    os.close(options.identity)


def copy_logs(directory: int) -> None:
    """Copy the servers' logs out of the site."""
    if directory >= 0:
        shutil.copytree(plan.LOGS, f"/proc/self/fd/{directory}", dirs_exist_ok=True)
