"""Slurm of the site: munged and slurmctld on login, one slurmd per compute node, all real.

They run as root of the site and start users' jobs as those users; in a one-id user namespace that is impossible,
so there is no Slurm there.
"""

from __future__ import annotations

import functools
import os
import pwd
import secrets
import shutil
from pathlib import Path

from simulated_site import plan
from simulated_site.client import Site
from simulated_site.daemons import Daemon, asked

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "sinfo")
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
NODES_DEADLINE = 180.0

CONFIGURATION = """\
ClusterName=site
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
PropagateResourceLimits=NONE
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
MinJobAge=300
KillWait=5
BatchStartTimeout=60
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
NodeName={names} NodeAddr={addresses} NodeHostname={names} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=normal Nodes={names} Default=YES MaxTime=24:00:00 DefaultTime=00:30:00 LLN=YES State=UP
PartitionName=debug Nodes={names} Default=NO MaxTime=00:30:00 DefaultTime=00:10:00 LLN=YES State=UP
"""


def missing_programs() -> list[str]:
    """Those of Slurm's programs this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if not shutil.which(program, path=path)]


def write_configuration() -> None:
    """slurm.conf, and a cgroup.conf naming a plugin that needs no hierarchy as long as nothing is constrained."""
    directory = plan.SLURM_CONF.parent
    for name in ("state", *(f"spool-{host.name}" for host in plan.COMPUTE)):
        (directory / name).mkdir(mode=0o755)
    names = ",".join(host.name for host in plan.COMPUTE)
    addresses = ",".join(host.address for host in plan.COMPUTE)
    text = CONFIGURATION.format(login=plan.LOGIN_INSIDE, directory=directory, names=names, addresses=addresses)
    plan.SLURM_CONF.write_text(text)
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainCores=no\n")


def start_munge(site: Site) -> None:
    """The authentication service, with a key of this site's own."""
    directory = plan.ROOT / "munge"
    owner = pwd.getpwnam("munge")
    for path in (directory, MUNGE_SOCKET.parent):
        path.mkdir(mode=0o755 if path == MUNGE_SOCKET.parent else 0o700)
        os.chown(path, owner.pw_uid, owner.pw_gid)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    os.chown(key, owner.pw_uid, owner.pw_gid)
    files = {
        "key-file": key,
        "log-file": directory / "log",
        "pid-file": directory / "pid",
        "seed-file": directory / "seed",
    }
    argv = ["munged", "--foreground", f"--socket={MUNGE_SOCKET}", *(f"--{name}={path}" for name, path in files.items())]
    as_munge = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "--"]
    daemon = Daemon(site, "login", "munged", [*as_munge, *argv])
    daemon.wait_until(lambda: asked(site, "login", ["munge", "--no-input"]))


def start(site: Site) -> list[Daemon]:
    """Controller and node daemons, not yet ready."""
    write_configuration()
    start_munge(site)
    controller = Daemon(site, "login", "slurmctld", ["slurmctld", "-D", "-f", str(plan.SLURM_CONF)])
    nodes = [
        Daemon(site, host.name, f"slurmd-{host.name}", ["slurmd", "-D", "-N", host.name, "-f", str(plan.SLURM_CONF)])
        for host in plan.COMPUTE
    ]
    return [controller, *nodes]


def wait_ready(site: Site, daemons: list[Daemon]) -> None:
    """Ready when the controller answers and calls every node idle."""
    controller, *nodes = daemons
    controller.wait_until(lambda: asked(site, "login", ["scontrol", "ping"], expect="is UP"))
    for host, daemon in zip(plan.COMPUTE, nodes, strict=True):
        daemon.wait_until(functools.partial(idle, site, host.name), NODES_DEADLINE)


def idle(site: Site, node: str) -> bool:
    """Whether Slurm would start a job on `node` now."""
    question = ["sinfo", "--noheader", f"--nodes={node}", "--format=%T", "--partition=normal"]
    return asked(site, "login", question, expect="idle")
