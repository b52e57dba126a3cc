"""``hpcq config``: the settings of pilots and queues, and where each came from."""

from __future__ import annotations

from typing import Any

import click

from hpcq import config
from hpcq.batch.templates import packaged_directory
from hpcq.cli.common import json_option, print_json, print_table, verbose_option

EXAMPLE = "config.example.toml"


@click.command("config")
@click.option("--site", metavar="NAME", help="As with [site.NAME].")
@click.option("--example", is_flag=True, help="Print an example of a config.toml instead.")
@json_option
@verbose_option
def show_config(site: str | None, example: bool, as_json: bool) -> None:
    """Show the settings that `hpcq submit-pilots` and `hpcq.Queue` would use, and where each comes from.

    The last of these wins: defaults, /etc/hpcq/config.toml, ~/.config/hpcq/config.toml, [site.NAME] in them, HPCQ_*
    variables, flags.
    """
    if example:
        click.echo((packaged_directory() / EXAMPLE).read_text(encoding="utf-8"), nl=False)
        return
    settings, queue = config.resolve(site=site), config.resolve_queue(site=site)
    values, origins = settings.values | queue.values, settings.origins | queue.origins
    if as_json:
        told = {name: {"value": _plain(values[name]), "origin": origins[name]} for name in sorted(values)}
        print_json({"site": settings.site, "sites": settings.sites, "settings": told})
        return
    chosen = f"site {settings.site}" if settings.site else "no site"
    click.echo(
        f"{chosen}; sites in {config.SYSTEM_FILE} and {config.user_file()}: {', '.join(settings.sites) or 'none'}"
    )
    print_table(("SETTING", "VALUE", "FROM"), ((n, _shown(values[n]), origins[n]) for n in sorted(values)))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | dict) else str(value)


def _shown(value: Any) -> str:
    return str(value) if not isinstance(value, bool) else str(value).lower()
