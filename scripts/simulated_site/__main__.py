"""Command line of the simulated site (`scripts/site`).

    scripts/site run [options] -- CMD…               a site for the time of CMD, which runs on its host `login`
    scripts/site shell [options]                     a shell as the ordinary user on `login`
    scripts/site exec [--user|--root] HOST -- CMD…   inside a site: CMD on another of its hosts

Exit status: the command's own (128+N for signal N); 125 when the site could not be built, 126 when this machine
refuses one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from simulated_site.client import Site
from simulated_site.errors import SiteError, SiteRefusedError

NOT_BUILT = 125
REFUSED = 126


def main(arguments: Sequence[str]) -> int:
    """Run one subcommand; errors go to standard error in one line."""
    options = parse(arguments)
    return reported(lambda: int(options.action(options)))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; CMD is everything behind the first `--`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="scripts/site", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="run|shell|exec")
    for name, action in (("run", run), ("shell", run)):
        command = commands.add_parser(name)
        command.set_defaults(action=action, shell=name == "shell")
        _site_options(command)
    enter = commands.add_parser("exec")
    enter.set_defaults(action=execute)
    who = enter.add_mutually_exclusive_group()
    who.add_argument("--user", action="store_true", default=True, help="as the ordinary user (default)")
    who.add_argument("--root", action="store_false", dest="user", help="as root of the site")
    enter.add_argument("host")
    options = parser.parse_args(arguments[:split])
    options.command = list(arguments[split + 1 :])
    if not options.command and not getattr(options, "shell", False):
        parser.error("give the command to run behind --")
    return options


def _site_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-slurm", action="store_false", dest="slurm", help="leave Slurm out")
    command.add_argument("--shape", nargs="?", const="1000:20", metavar="MBIT:MS", help="slow the outer link down")
    command.add_argument("--user", action="store_true", help="run CMD as the ordinary user, in its home")
    command.add_argument("--bind", action="append", type=Path, default=[], metavar="DIR", help="keep DIR visible")
    command.add_argument("--logs", type=Path, metavar="DIR", help="copy the servers' logs there at the end")
    command.add_argument("--identity", type=Path, metavar="FILE", help="write there what identifies the site")


def run(options: argparse.Namespace) -> int:
    """Build a site and run the command, or a shell, in it."""
    from simulated_site import build, launch, leftovers, shape  # noqa: PLC0415 - `exec` needs neither, nor pyroute2

    shell = ["/bin/bash", "-l"] if options.shell else []
    plan = build.Options(
        command=[*shell, *options.command],
        user=options.user or options.shell,
        slurm=options.slurm,
        shape=shape.Shape.parse(options.shape) if options.shape else None,
        kept=tuple(options.bind),
        cwd=str(Path.cwd()),
        identity=_descriptor(options.identity, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        mounted=leftovers.mount_points() if options.identity else (),
        logs=_descriptor(options.logs, os.O_RDONLY | os.O_DIRECTORY),
    )
    return launch.launch(lambda: reported(lambda: build.builder(plan)))


def reported(builder: Callable[[], int]) -> int:
    """Its status; an error is reported where it happens (inside a site, only a status travels up)."""
    try:
        return builder()
    except SiteRefusedError as error:
        print(f"site: {error}", file=sys.stderr)
        return REFUSED
    except SiteError as error:
        print(f"site: {error}", file=sys.stderr)
        return NOT_BUILT


def _descriptor(path: Path | None, flags: int) -> int:
    """Opened before the site hides /tmp and /run."""
    if path is None:
        return -1
    try:
        return os.open(path, flags, 0o644)
    except OSError as error:
        raise SiteError(f"cannot use {path}: {error.strerror}") from error


def execute(options: argparse.Namespace) -> int:
    """Become the command on another host."""
    site = Site.load()
    argv = site.command(options.host, options.command, user=options.user)
    os.execvpe(argv[0], argv, site.environment(options.user))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
