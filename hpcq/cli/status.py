"""``hpcq status``: what a queue is doing, once or as a live view."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from hpcq import client
from hpcq.cli.common import json_option, name_option, print_json, require_queue, verbose_option

REFRESH = 1.0
"""Seconds between two looks of ``--watch``."""


@click.command("status")
@name_option
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C or the program's end.")
@json_option
@verbose_option
def status(name: str | None, watch: bool, as_json: bool) -> None:
    """Show a queue's tasks, pilots and cores, as its running program knows them."""
    queue = require_queue(name)
    while True:
        answer = client.ask(queue, "status")
        if as_json:
            print_json(answer)
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            click.echo("\n".join(lines(answer)))
        if not watch:
            return
        time.sleep(REFRESH)  # the manager does not push: a view for people may as well ask


def lines(answer: dict[str, Any]) -> list[str]:
    """A manager's answer for people."""
    tasks, pilots = answer["tasks"], answer["pilots"]
    done = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tasks["done"].items())) or "none"
    states = ", ".join(f"{count} {state}" for state, count in pilots.items() if count) or "none"
    return [
        f"queue   {answer['queue']}, served by process {answer['pid']} on {answer['hostname']}",
        f"tasks   {tasks['waiting']} waiting, {tasks['sent']} sent, {tasks['running']} running; done: {done}",
        f"pilots  {states}",
        f"cores   {answer['cores_busy']} of {answer['cores']} busy",
    ]
