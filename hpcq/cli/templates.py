"""``hpcq template``: the packaged batch templates, to start one's own from."""

from __future__ import annotations

import click

from hpcq.batch.templates import packaged_directory
from hpcq.cli.common import verbose_option

FILES = {"slurm": "slurm.sh.j2", "pbs": "pbs.sh.j2", "torque": "pbs.sh.j2", "local": "local.sh.j2"}
"""The template of each batch system."""


@click.command("template")
@click.argument("batch", type=click.Choice(sorted(FILES)))
@verbose_option
def template(batch: str) -> None:
    """Print the template of a batch system's scripts: `hpcq template slurm > mine.sh.j2`.

    Give your own to `hpcq submit-pilots --template FILE`, which checks it; `--dry-run` shows the script it makes.
    """
    click.echo((packaged_directory() / FILES[batch]).read_text(encoding="utf-8"), nl=False)
