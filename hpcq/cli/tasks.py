"""``hpcq tasks`` and ``hpcq explain``: where each unfinished task is, and why."""

from __future__ import annotations

from typing import Any

import click

from hpcq import client
from hpcq.cli.common import json_option, name_option, print_json, print_table, require_queue, verbose_option


@click.command("tasks")
@name_option
@click.option("--limit", type=click.IntRange(0), default=100, show_default=True, help="Tasks to list at most.")
@json_option
@verbose_option
def tasks(name: str | None, limit: int, as_json: bool) -> None:
    """List a queue's tasks that are not done: those on pilots first, then those that wait, in their order."""
    answer = client.ask(require_queue(name), "tasks", limit)
    if as_json:
        print_json(answer)
        return
    heads = ("ID", "TAG", "CATEGORY", "STATE", "PILOT", "SINCE", "TASK")
    print_table(heads, map(_cells, answer["tasks"]))
    left = answer["total"] - len(answer["tasks"])
    if left > 0:
        click.echo(f"and {left} more (--limit shows more)")


def _cells(task: dict[str, Any]) -> tuple[str, ...]:
    pilot = " ".join(filter(None, (task["pilot"], task["copy"] and f"(copy on {task['copy']})")))
    told = (str(task["id"]), task["tag"] or "-", task["category"] or "-", task["state"], pilot or "-")
    return (*told, f"{task['since']:.0f} s", task["summary"])


@click.command("explain")
@click.argument("task", type=click.IntRange(1))
@name_option
@json_option
@verbose_option
def explain(task: int, name: str | None, as_json: bool) -> None:
    """Say why TASK, given by its id, is not running: what no pilot meets, what is before it; or where it runs."""
    text = client.ask(require_queue(name), "explain", task)
    if as_json:
        print_json({"task": task, "explanation": text})
    else:
        click.echo(text)
