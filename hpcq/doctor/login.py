"""What this host, a login node, has: all that `vpn probe` looks at, the batch system's programs, state, gateway."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile

import msgspec

from hpcq import state_dir
from hpcq.doctor.report import Findings
from hpcq.errors import HpcqError
from vpn import Check, GatewayClient, GatewayError, examine, gateway_names

STATE_WANTED = 100 << 20
"""Bytes free for scripts, keys and the output of jobs, under which it is called little."""

PROGRAMS = {
    "slurm": ("sbatch", "squeue", "scancel"),
    "pbs": ("qsub", "qstat", "qdel"),
    "torque": ("qsub", "qstat", "qdel"),
    "local": (),
}
"""What each batch system's commands are called."""


def guess_batch() -> str:
    """The batch system whose commands this host has; ``local`` when it has none."""
    return next((batch for batch, names in PROGRAMS.items() if names and shutil.which(names[0])), "local")


def look_here(batch: str, gateway: str) -> Findings:
    """Look at this host as one to submit to ``batch`` from, with a gateway of that name."""
    found = asyncio.run(examine())
    own = [*(_program(batch, name) for name in PROGRAMS[batch]), check_state(), check_gateway(gateway)]
    return Findings(socket.gethostname(), msgspec.structs.replace(found, checks=[*found.checks, *own]))


def _program(batch: str, name: str) -> Check:
    path = shutil.which(name)
    advice = f"{name} was not found on PATH: this is no host to submit to {batch} from, or load the site's module"
    return Check(name, path is not None, path or advice)


def check_state() -> Check:
    """The state directory: connection files, scripts and the output of jobs, all seen from the compute nodes."""
    place = state_dir.state_root()
    try:
        state_dir.ensure_private_dir(place)
        with tempfile.TemporaryFile(dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, 4096)
        free = shutil.disk_usage(place).free
    except (OSError, HpcqError) as error:
        return Check("state directory", False, f"{place}: {error}; set HPCQ_STATE_DIR to a directory all nodes see")
    text = f"{place}, {free / 1e9:.1f} GB free"
    return Check("state directory", free >= STATE_WANTED, text if free >= STATE_WANTED else f"{text}: little")


def check_gateway(names: str) -> Check:
    """Whether this user's gateways of these names run here."""
    checks = [_check_gateway(name) for name in gateway_names(names)]
    return Check("gateway", all(check.ok for check in checks), "; ".join(check.detail for check in checks))


def _check_gateway(name: str) -> Check:
    try:
        told = GatewayClient(name).status()
    except GatewayError as error:
        return Check("gateway", False, str(error))
    port = f"port {told.port}, " if told.port else ""
    missing = f"; openconnect is not offered: {told.refusal}" if told.refusal else ""
    return Check("gateway", True, f"{name!r} at {' '.join(told.addresses)} {port}relay port {told.relay_port}{missing}")
