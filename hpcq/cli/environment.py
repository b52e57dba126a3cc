"""``hpcq pack-environment``: the Python environment as one file, for ``submit-pilots --environment``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpcq.batch.environment import pack
from hpcq.cli.common import verbose_option


@click.command("pack-environment")
@click.argument("archive", type=click.Path(path_type=Path), metavar="FILE.tar.gz")
@click.option(
    "--prefix", type=click.Path(path_type=Path), metavar="DIR", help="The environment; hpcq's own if left out."
)
@verbose_option
def pack_environment(archive: Path, prefix: Path | None) -> None:
    """Pack a Python environment into one file, which pilots unpack once on each node.

    Packages are in it; the Python that a virtual environment was made from is not, and must be on the nodes.
    """
    size = pack(prefix or Path(sys.prefix), archive)
    click.echo(f"packed {prefix or sys.prefix} into {archive}, {size / 2**20:.0f} MB")
