"""``hpcq submit-pilots``: from flags and settings to batch jobs."""

from __future__ import annotations

import functools
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from hpcq import config, servers, state_dir
from hpcq.batch.base import BatchJob, RenderedJob, batch_system_names, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.cli.autoscale import limit_flags, limits_of, start
from hpcq.cli.common import (
    choose_queue,
    create_queue,
    json_option,
    name_option,
    print_json,
    queue_not_found,
    tell_manager,
    verbose_option,
)
from hpcq.errors import UsageError
from vpn import MODES, read_password

_F = TypeVar("_F", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path)

_PILOT_FLAGS = [
    click.option("--site", metavar="NAME", help="Settings of [site.NAME] in your config.toml (see `hpcq config`)."),
    click.option("-n", "--count", type=int, help="How many batch jobs, each with a pilot on every node.  [default: 1]"),
    click.option("--batch", help=f"{', '.join(batch_system_names())}.  [default: local]"),
    click.option("--nodes", type=int, help="Nodes of each job: one pilot on each.  [default: 1]"),
    click.option("--cores", type=int, help="Cores of each pilot.  [default: 1]"),
    click.option("--memory", metavar="SIZE", help="Memory of each pilot: 32GB, or MB."),
    click.option("--disk", metavar="SIZE", help="Disk for tasks of each pilot.  [default: what is free]"),
    click.option("--gpus", type=int, help="GPUs of each pilot."),
    click.option("--walltime", metavar="TIME", help="Time limit: H:MM:SS, or seconds."),
    click.option("--partition", "--queue", metavar="NAME", help="Partition (Slurm) or queue (PBS)."),
    click.option("--account", help="Account to charge."),
    click.option("--qos", help="Quality of service (Slurm)."),
    click.option("--constraint", help="Required features of the nodes; for PBS a resource: model=bro."),
    click.option("--reservation", metavar="NAME", help="Reservation to run in."),
    click.option("--exclusive", is_flag=True, default=None, help="Share no node with other jobs."),
    click.option("--mail", metavar="ADDRESS", help="Whom the batch system tells of ends and failures."),
    click.option("--job-name", metavar="NAME", help="Name in the batch system's listings.  [default: hpcq-QUEUE]"),
    click.option("--option", "options", multiple=True, metavar="OPT", help="Any other one: --licenses=x, '-l x=y'."),
    click.option("--template", type=_FILE, metavar="FILE", help="Your own script (see `hpcq template`)."),
    click.option("--module", "modules", multiple=True, metavar="NAME", help="Module to load."),
    click.option("--environment-setup", "setup", multiple=True, metavar="LINE", help="Shell to run before the pilot."),
    click.option("--epilogue", multiple=True, metavar="LINE", help="Shell to run after the pilot."),
    click.option(
        "--environment",
        type=_FILE,
        metavar="DIR|TARBALL",
        help="The pilots' Python environment: a directory they see, or an archive of `hpcq pack-environment`.",
    ),
    click.option(
        "--connection",
        type=click.Choice(["file", "inline"]),
        help="How pilots find the queue: by its file on a shared file system, or inline, by what the batch script "
        "carries, which then is a secret.  [default: file]",
    ),
    click.option("--vpn", type=click.Choice(MODES), help="How tasks get out.  [default: none]"),
    click.option(
        "--gateway",
        metavar="NAME|HOST:PORT,…",
        help="The gateway of yours that tunnels end at; of several, pilots take any.",
    ),
    click.option("--direct", multiple=True, metavar="NETWORK,…", help="Reached from the node itself, in any mode."),
    click.option("--dtls/--no-dtls", default=None, help="openconnect: UDP, or TLS alone.  [default: what is faster]"),
    click.option("--mtu", type=int, metavar="BYTES", help="openconnect: ask for this MTU."),
    click.option("--tls/--no-tls", default=None, help="relay, socks: encrypt what tasks send.  [default: tls]"),
    click.option("--probe-interval", metavar="TIME", help="How often a quiet tunnel is tried.  [default: 15]"),
    click.option("--server", metavar="HOST:PORT", help="An AnyConnect server of your own, for --vpn openconnect."),
    click.option("--servercert", metavar="PIN", help="Its key: pin-sha256:…"),
    click.option("--user", metavar="NAME", help="Who to be there; stdin's first line is the password."),
    click.option("--password-file", type=_FILE, metavar="FILE", help="It is the first line of this one, mode 0600."),
    click.option("--certificate", type=_FILE, metavar="FILE", help="A client's (PEM), seen from the nodes."),
    click.option("--sslkey", type=_FILE, metavar="FILE", help="Its key, if it is not in the same file."),
    click.option("--require", multiple=True, metavar="TARGET", help="What must answer before the first task."),
    click.option("--cvmfs", metavar="REPO,…", help="Repositories readable at /cvmfs: cms.cern.ch,…"),
    click.option("--cvmfs-image", multiple=True, metavar="[REPO=]FILE", help="A squashfs copy of one, or of /cvmfs."),
    click.option("--cvmfs-proxy", metavar="PROXY", help="CVMFS_HTTP_PROXY.  [default: the node's, else DIRECT]"),
    click.option("--cvmfs-server", multiple=True, metavar="URL", help="http://HOST/cvmfs, with --cvmfs-key."),
    click.option("--cvmfs-key", multiple=True, metavar="FILE", help="Its public key."),
    click.option("--cvmfs-cache", type=_FILE, metavar="DIR", help="On a disk of the node.  [default: --scratch]"),
    click.option("--cvmfs-quota", metavar="SIZE", help="Of the node's CVMFS cache.  [default: 4000 MB]"),
    click.option("--scratch", type=_FILE, metavar="DIR", help="Where tasks run on the nodes."),
    click.option("--cache-size", metavar="SIZE", help="Of each node's cache of files; 10GB or half the free space."),
    click.option("--manager-timeout", metavar="TIME", help="How long a pilot waits for the queue's program."),
    click.option("--drain-timeout", metavar="TIME", help="How long running tasks may go on after SIGTERM."),
]


def pilot_flags(command: _F) -> _F:
    """Add the flags that say what pilots to submit; they arrive under the names that `hpcq.config` knows."""
    return functools.reduce(lambda wrapped, flag: flag(wrapped), reversed(_PILOT_FLAGS), command)


def some_pilot_flags(*names: str) -> Callable[[_F], _F]:
    """Add those of the flags that arrive under these names."""

    def add(command: _F) -> _F:
        chosen = [flag for flag in _PILOT_FLAGS if _name_of(flag) in names]
        return functools.reduce(lambda wrapped, flag: flag(wrapped), reversed(chosen), command)

    return add


def _name_of(flag: Callable[[Any], Any]) -> str:
    return str(click.command()(flag(lambda: None)).params[0].name)


def settings_of(values: dict[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """The batch system, the count and the other options, from flags and whatever stands behind them."""
    site = values.pop("site")
    resolved = dict(config.resolve(values, site=site).values)
    return resolved.pop("batch"), resolved.pop("count"), resolved


@click.command("submit-pilots")
@name_option
@pilot_flags
@click.option("--autoscale", "scale", is_flag=True, help="As many as the tasks need, at most -n or --max, from now on.")
@limit_flags
@click.option("--create", is_flag=True, help="Make the queue, for a program that starts later.")
@click.option("--dry-run", is_flag=True, help="Print the exact script and command; do nothing.")
@json_option
@verbose_option
def submit_pilots(*, name: str | None, scale: bool, create: bool, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Put pilots for a queue through the batch system.

    Each pilot is one batch job: it finds the queue's program by its connection file, brings its tunnel up,
    proves it on every --require (root://HOST:PORT, http://HOST, cvmfs:REPOSITORY), and takes tasks.
    """
    queue = choose_queue(name)
    limits = limits_of(values)
    if limits and not scale:
        raise UsageError(f"--{next(iter(limits)).replace('_', '-')} means something with --autoscale only")
    if scale and values["count"] is not None:
        limits.setdefault("max", values["count"])
    batch, count, options = settings_of(values)
    system = get_batch_system(batch)
    request = pilot_request(queue, batch, count, options, flags=True)
    if not state_dir.connection_file(queue).exists() and not create:
        raise queue_not_found(queue, "start the program that makes it first, or pass --create")
    if dry_run:
        show_rendered(system.render(request), as_json)
        return
    if scale:
        system.render(request)  # refuse here what could not be submitted
        _keep_password(queue, options)
        start(queue, batch, options, limits, as_json)
        return
    if create and not state_dir.connection_file(queue).exists():
        system.render(request)  # refuse what cannot be submitted before a queue is made for it
        create_queue(queue)
    _keep_password(queue, options)
    try:
        jobs = system.submit(request)
        _show_submitted(queue, jobs, as_json)
    finally:
        tell_manager(queue)  # also of those that were submitted before a refusal
    if batch == "local" and shutil.which("sbatch"):
        click.echo("hpcq: the pilots run on this very host; --batch slurm puts them on compute nodes", err=True)


def _keep_password(queue: str, options: dict[str, Any]) -> None:
    """Keep who to be at a server of the user's own; what the queue's program is told is without where that is from."""
    servers.keep(queue, options, read_password)
    options.pop("password_file", None)


def show_rendered(rendered: RenderedJob, as_json: bool) -> None:
    """Print a script and the command that would submit it."""
    if as_json:
        print_json({"script": rendered.script, "command": list(rendered.command)})
        return
    click.echo(rendered.script, nl=False)
    click.echo(f"# command: {shlex.join(rendered.command)}")


def _show_submitted(queue: str, jobs: Sequence[BatchJob], as_json: bool) -> None:
    if as_json:
        listed = [{"job_id": job.id, "output_file": str(job.output)} for job in jobs]
        print_json({"queue": queue, "batch": jobs[0].batch, "script": str(jobs[0].script), "jobs": listed})
        return
    ids = jobs[0].id if len(jobs) == 1 else f"{jobs[0].id} to {jobs[-1].id}"
    many = "1 pilot" if len(jobs) == 1 else f"{len(jobs)} pilots"
    click.echo(f"submitted {many} for queue {queue} to {jobs[0].batch}: {ids}")
    click.echo(f"script and output: {jobs[0].directory}")
