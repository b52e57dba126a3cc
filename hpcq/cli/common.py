"""What several commands share: options, the choice of a queue, and the way to the running manager."""

from __future__ import annotations

import contextvars
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from hpcq import config, lock, state_dir
from hpcq.errors import HpcqError, QueueNotFoundError

VERBOSE: contextvars.ContextVar[bool] = contextvars.ContextVar("verbose", default=False)
"""Whether ``-v`` was given, before or after the command's name."""

DEFAULT_QUEUE = "default"

LISTED = 10
"""Queues that an error message names."""

_F = TypeVar("_F", bound=Callable[..., Any])


def _set_verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        VERBOSE.set(True)


def verbose_option(command: _F) -> _F:
    """Add ``-v``."""
    return click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_verbose,
        help="Say more when something fails.",
    )(command)


def json_option(command: _F) -> _F:
    """Add ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def name_option(command: _F) -> _F:
    """Add ``--name``, passed on as ``name`` (None when it was not given: see ``choose_queue``), and ``--state-dir``,
    which is heeded here.
    """
    words = "The queue; if left out, the only one that a program serves now, or the only one there is."
    named = click.option("--name", metavar="QUEUE", help=words)(command)
    return click.option(
        "--state-dir",
        metavar="DIR",
        expose_value=False,
        callback=_use_state_dir,
        help="Where the queue's files are, if its program has Queue(state_dir=DIR).",
    )(named)


def _use_state_dir(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if not ctx.resilient_parsing:
        state_dir.use(config.resolve_queue({"state_dir": value}, origin="--state-dir").values.get("state_dir"))


def choose_queue(name: str | None, among: Sequence[str] | None = None) -> str:
    """Return the queue a command is about: ``name``, or the only one that is served, or else prepared, or else known
    (of these, if ``among`` is given), or "default".

    Raises:
        UsageError: a name that no queue can have.
        QueueNotFoundError: no name was given, there are several queues and none is called "default".
    """
    if name is not None:
        return state_dir.check_queue_name(name)
    known = state_dir.known_queues() if among is None else among
    prepared = [one for one in known if state_dir.connection_file(one).exists()]
    served = [one for one in prepared if lock.may_be_taken(state_dir.lock_file(one))]
    chosen = served or prepared or known
    if len(chosen) == 1:
        return chosen[0]
    if chosen and DEFAULT_QUEUE not in chosen:
        raise QueueNotFoundError(f"there are several queues ({_listed(chosen)}); say which with --name")
    return DEFAULT_QUEUE


def _listed(names: Sequence[str]) -> str:
    left = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + left


def require_queue(name: str | None) -> str:
    """Return the queue a command is about, which must have a directory.

    Raises:
        QueueNotFoundError: there is no such queue; lists those there are.
    """
    queue = choose_queue(name)
    if not state_dir.queue_dir(queue).is_dir():
        raise queue_not_found(queue, "start the program that makes it first")
    return queue


def queue_not_found(queue: str, advice: str) -> QueueNotFoundError:
    """Return the error for a queue that is not there, or that no program serves, with what to do."""
    known = state_dir.known_queues()
    if queue in known:
        return QueueNotFoundError(f"no program serves queue {queue!r} now; {advice}")
    others = f"known are {_listed(known)}" if known else "there are none"
    return QueueNotFoundError(f"no queue {queue!r} under {state_dir.state_root()} ({others}); {advice}")


def ask_manager(queue: str, what: str) -> list[dict[str, Any]]:
    """Ask the manager of ``queue`` and return its answer.

    Raises:
        QueueNotFoundError: no manager answers.
    """
    answer: list[dict[str, Any]] = importlib.import_module("hpcq.client").ask(queue, what)
    return answer


def tell_manager(queue: str) -> None:
    """Tell the manager of ``queue``, if there is one, that jobs were submitted, so that it follows them at once.

    Without an answer nothing is lost: it finds them on disk when it starts.
    """
    try:
        importlib.import_module("hpcq.client").ask(queue, "jobs_submitted")
    except HpcqError as error:
        logging.getLogger(__name__).info("no manager was told of the jobs: %s", error)


def create_queue(queue: str) -> None:
    """Make the files by which pilots can find a queue whose program starts later."""
    importlib.import_module("hpcq.connection").create(queue)


def print_json(data: object) -> None:
    """Print ``data`` as JSON."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table: fitted to a terminal; elsewhere plain columns, uncut, for other programs to read."""
    lines = [list(heads), *(list(row) for row in rows)]
    if sys.stdout.isatty():
        _print_rich(lines)
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _print_rich(lines: list[list[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only wanted on a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in lines[0]:
        table.add_column(head, overflow="fold")
    for line in lines[1:]:
        table.add_row(*(Text(cell) for cell in line))
    Console().print(table)
