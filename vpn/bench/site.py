"""The harness on the simulated site: re-run this command inside one, and say where its hosts are.

The site is a part of a clone (``scripts/site``), not of an installation.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from vpn.bench.plan import Link
from vpn.bench.run import Places
from vpn.errors import TunnelError, UsageError

VARIABLE = "HPCQ_SIMULATED_SITE"
NODE, HOME, FAR = "cn1", "login", "wan"
COPY_BYTES = 200_000_000
COPY_NAME = "bench.dat"


def inside() -> bool:
    """Whether this process is in a simulated site."""
    return VARIABLE in os.environ


def enter(arguments: Sequence[str], link: Link, shown: Sequence[Path]) -> None:
    """Become this command in a site with that link; does not return. ``shown``: directories to write to."""
    program = _find()
    shape = [f"--shape={link.rate / 1e6:g}:{link.round_trip * 1e3:g}"] if link.rate else []
    binds = [f"--bind={path}" for path in shown]
    again = ["sh", "-c", 'exec "$HPCQ_PYTHON" -P -m vpn "$@"', "bench", *arguments]
    argv = [str(program), "run", "--no-slurm", *shape, *binds, "--", *again]
    sys.stdout.flush()
    try:
        os.execv(argv[0], argv)  # noqa: S606 - an argv, no shell
    except OSError as error:
        raise TunnelError("program", f"{program}: {error.strerror}") from None


def _find() -> Path:
    """scripts/site of the clone we are in, or run from."""
    here = Path.cwd()
    for directory in (here, *here.parents, Path(__file__).resolve().parents[2]):
        program = directory / "scripts" / "site"
        if program.is_file():
            return program
    raise UsageError("--site needs a clone of hpcq, with scripts/site: run this there")


def places(copies: bool) -> Places:
    """The site's hosts; raises TunnelError when its description cannot be read."""
    try:
        site = json.loads(Path(os.environ[VARIABLE]).read_text())
    except (OSError, ValueError) as error:
        raise TunnelError("program", f"cannot read {os.environ[VARIABLE]}: {error}") from None
    outside = str(site["hosts"][FAR]["address"])
    return Places(
        server=(outside, 0),
        node=_on(NODE),
        home=_on(HOME),
        far=_on(FAR),
        root=_on(HOME, "--root"),
        copy_url=_make_file(site) if copies else "",
    )


def _on(host: str, *options: str) -> str:
    return shlex.join([sys.executable, "-m", "simulated_site", "exec", *options, host, "--"])


def _make_file(site: dict[str, object]) -> str:
    """A file on the site's XRootD server; its URL."""
    path = f"{site['store']}/{COPY_NAME}"
    argv = [*shlex.split(_on(FAR, "--root")), "sh", "-c", f"head -c {COPY_BYTES} /dev/urandom >{shlex.quote(path)}"]
    done = subprocess.run(argv, check=False)
    if done.returncode:
        raise TunnelError("xrootd", f"cannot make {path} on {FAR}: status {done.returncode}")
    return f"{site['xrootd_url']}{COPY_NAME}"
