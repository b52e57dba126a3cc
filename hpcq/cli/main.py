"""``hpcq``: finds the command, runs it, and turns every end into an exit status and at most one line.

Commands are named here by import path and imported only when they run, so that ``hpcq --help`` is quick and a
broken part does not take the others with it. Errors go to standard error as ``hpcq: …``; ``-v`` adds what is
known beside (the notes of an error, a traceback). Nothing else of the program's logic belongs here.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

import click

from hpcq.cli.common import VERBOSE, verbose_option

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as shells have it."""
BROKEN_PIPE = 1
"""Exit status when the reader of our output went away; click's own, which it gives where it sees that first."""
COMMANDS = {
    "submit-pilots": ("hpcq.cli.submit:submit_pilots", "Put pilots through the batch system."),
    "pilots": ("hpcq.cli.pilots:pilots", "Show the pilots of a queue and their batch jobs."),
    "cancel-pilots": ("hpcq.cli.cancel:cancel_pilots", "Cancel pilots and wait until they are gone."),
    "template": ("hpcq.cli.templates:template", "Print a batch template, to start your own."),
    "config": ("hpcq.cli.config:show_config", "Show the settings of pilots and where they come from."),
    "pack-environment": ("hpcq.cli.environment:pack_environment", "Pack a Python environment for the pilots."),
    "autoscale": ("hpcq.cli.autoscale:autoscale", "Show or change how a queue submits pilots by itself."),
    "status": ("hpcq.cli.status:status", "Show what a queue is doing."),
    "tasks": ("hpcq.cli.tasks:tasks", "List a queue's tasks that wait or run."),
    "explain": ("hpcq.cli.tasks:explain", "Say why a task is not running, or where it runs."),
    "report": ("hpcq.cli.report:report", "Tell what a queue's program has done, from its journal."),
    "doctor": ("hpcq.cli.doctor:doctor", "Say which tunnels a site allows, by trying them on a compute node."),
    "bench": ("hpcq.cli.bench:bench", "Measure the queue on this machine."),
    "vpn": ("vpn.cli:cli", "Tunnels by themselves: run a command in one, or run their gateway."),
}
"""Name → where the command is, and its line in ``hpcq --help``."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - takes a while to import

        try:
            click.echo(f"hpcq {version('hpcq')}")
        except PackageNotFoundError:
            click.echo("hpcq (not installed: running from its source)")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version)
@verbose_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run Python functions and shell commands on HPC machines whose compute nodes have no way out."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors have been shown."""
    logging.basicConfig(format="hpcq: %(message)s", level=logging.WARNING)
    VERBOSE.set(False)
    try:
        status = cli.main(args=list(arguments), prog_name="hpcq", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        click.echo("hpcq: interrupted", err=True)
        return INTERRUPTED
    except Exception as error:
        return _report(error)
    return status if isinstance(status, int) else 0


def _report(error: Exception) -> int:
    """Show ``error`` in one line (with ``-v``, all that is known) and return its exit status."""
    status, message = _meaning(error)
    click.echo("hpcq: " + "; ".join(filter(None, map(str.strip, message.splitlines()))), err=True)
    if VERBOSE.get():
        click.echo("".join(traceback.format_exception(error)).rstrip(), err=True)
    return status


def _meaning(error: Exception) -> tuple[int, str]:
    """Return the exit status and the words for an error."""
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message() + _hint(error)
    # By attribute, not by type: the errors of ``vpn`` are a tree of their own with the same attribute.
    status = getattr(error, "exit_status", None)
    if isinstance(status, int):
        return status, str(error)
    if isinstance(error, OSError):
        return 1, _system_error(error)
    return 1, f"{type(error).__name__}: {error} (a fault of hpcq's; -v shows where)"


def _system_error(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)


def _hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see {context.command_path} --help)" if context is not None else ""


if __name__ == "__main__":
    main()
