"""``hpcq autoscale``: how many pilots a queue keeps by itself; ``submit-pilots --autoscale`` begins it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from hpcq import client
from hpcq.cli.common import json_option, name_option, print_json, require_queue, verbose_option
from hpcq.errors import UsageError
from hpcq.units import parse_duration

_F = TypeVar("_F", bound=Callable[..., Any])

_LIMITS = [
    click.option("--min", "min_", type=int, metavar="N", help="Pilots kept, with or without work.  [default: 0]"),
    click.option("--max", "max_", type=int, metavar="N", help="Pilots there are at most.  [default: 10]"),
    click.option("--step", type=int, metavar="N", help="Jobs submitted per interval at most.  [default: 5]"),
    click.option("--interval", metavar="TIME", help="See --step.  [default: 30]"),
    click.option("--backlog", type=int, metavar="N", help="Jobs waiting in the batch system at most.  [default: 20]"),
    click.option("--idle-timeout", metavar="TIME", help="An idle pilot leaves after this.  [default: 300]"),
]


def limit_flags(command: _F) -> _F:
    """Add the flags that set limits; `limits_of` takes them out again."""
    return functools.reduce(lambda wrapped, flag: flag(wrapped), reversed(_LIMITS), command)


def limits_of(values: dict[str, Any]) -> dict[str, Any]:
    """Take the limits that were given out of the flags' values."""
    times = {
        name: parse_duration(value, name="--" + name.replace("_", "-"))
        for name in ("interval", "idle_timeout")
        if (value := values.pop(name)) is not None
    }
    counts = {"min": values.pop("min_"), "max": values.pop("max_")}
    counts |= {name: values.pop(name) for name in ("step", "backlog")}
    return {name: value for name, value in counts.items() if value is not None} | times


@click.group("autoscale", invoke_without_command=True)
@name_option
@json_option
@verbose_option
@click.pass_context
def autoscale(ctx: click.Context, *, name: str | None, as_json: bool) -> None:
    """Show, change or end how a queue submits pilots by itself.

    It begins with `hpcq submit-pilots --autoscale` or `queue.autoscale(...)`, and ends with the queue's program.
    """
    ctx.obj = name
    if ctx.invoked_subcommand is None:
        _show(_ask(name, {"do": "show"}), as_json)


@autoscale.command("set")
@name_option
@limit_flags
@json_option
@verbose_option
@click.pass_context
def set_limits(ctx: click.Context, /, *, name: str | None, as_json: bool, **values: Any) -> None:
    """Change limits while it runs; those left out stay. A pause is over."""
    _show(_ask(name or ctx.obj, {"do": "set", "limits": limits_of(values)}), as_json)


@autoscale.command("stop")
@name_option
@json_option
@verbose_option
@click.pass_context
def stop(ctx: click.Context, /, *, name: str | None, as_json: bool) -> None:
    """Submit no more by itself; the pilots that are there stay."""
    _show(_ask(name or ctx.obj, {"do": "stop"}), as_json)


def start(queue: str, batch: str, options: dict[str, Any], limits: dict[str, Any], as_json: bool) -> None:
    """Ask the queue's program to begin."""
    told = {name: str(value) if hasattr(value, "__fspath__") else value for name, value in options.items()}
    _show(_ask(queue, {"do": "start", "batch": batch, "options": told, "limits": limits}), as_json)


def _ask(name: str | None, question: dict[str, Any]) -> dict[str, Any]:
    answer = client.ask(require_queue(name), "autoscale", question)
    if "refused" in answer:
        raise UsageError(answer["refused"])
    return dict(answer)


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    click.echo("\n".join(lines(answer)))


def lines(answer: dict[str, Any]) -> list[str]:
    """A manager's answer for people."""
    if not answer["active"]:
        return ["autoscaling is not in use"]
    limits = answer["limits"]
    told = [
        f"pilots  {answer['working']} at work, {answer['idle']} idle, {answer['coming']} on their way; "
        f"the waiting tasks would fill {answer['needed']} more",
        f"limits  {limits['min']} to {limits['max']} pilots; {limits['step']} jobs per {limits['interval']:g} s, "
        f"{limits['backlog']} waiting at most; idle ones leave after {limits['idle_timeout']:g} s",
    ]
    state = f"paused: {answer['paused']}; `hpcq autoscale set` resumes it" if answer["paused"] else "on"
    return [f"state   {state} ({answer['batch']})", *told]
