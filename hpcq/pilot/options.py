"""What a pilot is told on its command line, and what it finds out about its job and host."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hpcq.connection import ConnectionInfo, from_line
from hpcq.errors import ConnectionFileError
from hpcq.pilot.host import free_disk, own_gpus
from hpcq.pilot.scratch import scratch_base
from hpcq.servers import gateways_of
from vpn import PROBE_INTERVAL, Cvmfs, check_mtu, check_probe_interval, split_networks

MANAGER_TIMEOUT = 300.0
"""Seconds a pilot goes on looking for a manager that is not there, by default."""

TUNNEL_TIMEOUT = 1800.0
"""Seconds a pilot tries to make its broken tunnel anew, by default; tasks that need no tunnel run on meanwhile."""

DRAIN_TIMEOUT = 20.0
"""Seconds running tasks have to finish after SIGTERM, by default: less than Slurm's KillWait of 30."""

LINE_LIMIT = 1 << 20
"""Characters of connection data on standard input."""


class Options(NamedTuple):
    """Sizes in MB, times in seconds; ``walltime`` is 0 when the job has no limit."""

    connection: Path | ConnectionInfo
    cores: int
    memory: int
    walltime: float
    vpn: str
    gateway: str
    require: tuple[str, ...]
    scratch: Path | None
    manager_timeout: float
    drain_timeout: float
    batch: str
    disk: int
    gpus: tuple[str, ...]
    cache_size: int | None = None
    tunnel_timeout: float = TUNNEL_TIMEOUT
    tunnel: Mapping[str, Any] = {}
    """What of `vpn.TunnelConfig` is asked for, by name."""


class Job(NamedTuple):
    """The batch job we are in; ``incarnation`` counts its restarts under the same id."""

    id: str
    incarnation: int
    rank: int


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hpcq.pilot", description="Started by a batch script of `hpcq submit-pilots`.")
    parser.add_argument(
        "--connection",
        type=_connection,
        required=True,
        metavar="FILE",
        help="the queue's connection file; -: what would be in it comes on standard input",
    )
    parser.add_argument("--cores", type=int, default=0, help="cores for tasks (default: those we may run on)")
    parser.add_argument("--memory", type=int, default=0, metavar="MB", help="memory for tasks (default: the node's)")
    parser.add_argument("--disk", type=int, metavar="MB", help="disk for tasks (default: what is free for scratch)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs for tasks (default: those of the job)")
    parser.add_argument("--walltime", type=float, default=0, metavar="S", help="seconds until the job is killed")
    parser.add_argument("--vpn", default="none", metavar="MODE", help="tunnel mode")
    parser.add_argument(
        "--gateway", default="", metavar="NAME|HOST:PORT,…", help="as the manager knows them; or server:USER@HOST:PORT"
    )
    parser.add_argument("--direct", metavar="NETWORK,…", help="reached from this node itself")
    parser.add_argument("--mtu", type=int, default=0, metavar="BYTES", help="asked of the VPN server")
    parser.add_argument("--dtls", action=argparse.BooleanOptionalAction, help="UDP, or TLS alone")
    parser.add_argument("--tls", action=argparse.BooleanOptionalAction, default=True, help="encrypt what tasks send")
    parser.add_argument(
        "--probe-interval", type=float, default=PROBE_INTERVAL, metavar="S", help="how often a quiet tunnel is tried"
    )
    parser.add_argument("--cvmfs", metavar="JSON", help="settings of CVMFS, as `hpcq submit-pilots` writes them")
    parser.add_argument("--require", action="append", default=[], metavar="TARGET", help="must answer first")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="node-local directory (default: $TMPDIR or /tmp)")
    parser.add_argument(
        "--cache-size",
        type=int,
        metavar="MB",
        help="of the node's cache of files (default: 10240, or half the free space)",
    )
    parser.add_argument("--manager-timeout", type=float, default=MANAGER_TIMEOUT, metavar="S")
    parser.add_argument("--tunnel-timeout", type=float, default=TUNNEL_TIMEOUT, metavar="S")
    parser.add_argument("--drain-timeout", type=float, default=DRAIN_TIMEOUT, metavar="S")
    parser.add_argument("--batch", default="", metavar="NAME", help="the batch system that started us")
    return parser


def _connection(text: str) -> Path | ConnectionInfo:
    if text != "-":
        return Path(text)
    line = sys.stdin.readline(LINE_LIMIT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # tasks have no use for the rest of it
    os.close(nothing)
    try:
        return from_line(line)
    except ConnectionFileError as error:
        raise argparse.ArgumentTypeError(f"standard input: {error}") from None


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line; exits with status 2 on a bad one."""
    parser = _parser()
    known = parser.parse_args(argv)
    cores = known.cores or len(os.sched_getaffinity(0))
    memory = known.memory or psutil.virtual_memory().total // 2**20
    if (
        cores < 1
        or memory < 0
        or known.walltime < 0
        or (known.disk or 0) < 0
        or (known.gpus or 0) < 0
        or (known.cache_size or 0) < 0
    ):
        parser.error("--cores, --memory, --disk, --gpus, --cache-size and --walltime must be positive")
    try:
        tunnel = {
            "direct": split_networks([known.direct]) if known.direct else (),
            "mtu": check_mtu(known.mtu),
            "dtls": known.dtls,
            "tls": known.tls,
            "probe_interval": check_probe_interval(known.probe_interval),
            "cvmfs": Cvmfs.from_json(known.cvmfs) if known.cvmfs else None,
        }
        gpus = own_gpus(known.gpus, os.environ)
        gateways_of(known.gateway)
        disk = free_disk(scratch_base(known.scratch)) if known.disk is None else known.disk
    except OSError as error:
        where = "--scratch" if known.scratch else "TMPDIR" if os.environ.get("TMPDIR") else "the default"
        parser.error(f"the scratch directory (by {where}) cannot be used: {error}; name one with --scratch")
    except ValueError as error:
        parser.error(str(error))
    return Options(
        known.connection, cores, memory, known.walltime, known.vpn, known.gateway, tuple(known.require),
        known.scratch, known.manager_timeout, known.drain_timeout, known.batch,
        disk, gpus, known.cache_size, known.tunnel_timeout, tunnel,
    )  # fmt: skip


def job(environment: Mapping[str, str]) -> Job:
    """The batch job named by the environment: Slurm's variables, or those our own templates set (``HPCQ_STARTS`` counts
    from 1, where the batch system does not count).
    """
    own = environment.get("HPCQ_JOB_ID", "")
    identifier = own or environment.get("SLURM_JOB_ID", "")
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    if not own and array and index:
        identifier = f"{array}_{index}"
    incarnation = _number(environment, "SLURM_RESTART_COUNT") or max(0, _number(environment, "HPCQ_STARTS") - 1)
    return Job(identifier, incarnation, _number(environment, "SLURM_PROCID"))


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def pilot_name(batch: str, where: Job) -> str:
    """A name no other pilot of the queue has, also not an earlier incarnation of the same job."""
    hostname = socket.gethostname()
    if not where.id:
        return f"{hostname}-{os.getpid()}"
    incarnation = f".{where.incarnation}" if where.incarnation else ""
    rank = f"/{where.rank}" if where.rank else ""
    return f"{batch or 'job'}-{where.id}{incarnation}{rank}@{hostname}"
