"""``vpn bench``, which is ``hpcq bench tunnel``: options in, a report out."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click
import msgspec

from vpn.bench import show, whole
from vpn.bench import site as simulated
from vpn.bench import traffic as wire
from vpn.bench.plan import Link, Plan, Way, default_ways
from vpn.bench.report import Report
from vpn.bench.run import Places, Run, Settings
from vpn.config import as_json, parse_server
from vpn.errors import UsageError


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--workers {text!r}: write numbers, such as 1,2,4,8,20") from None


@click.command("tunnel")
@click.option("--mode", "modes", multiple=True, metavar="MODE[:SETTING=VALUE,…]", help="[default: every mode]")
@click.option("--workers", default="1,2,4,8,20", show_default=True, help="Workers at once, each a process.")
@click.option("--direction", type=click.Choice(["up", "down", "both"]), default="both", show_default=True)
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Of one transfer, after warming up.")
@click.option("--warmup", type=float, help="Seconds before them.  [default: by the round trip and the workers]")
@click.option("--rounds", type=int, default=3, show_default=True, help="Of everything; medians are told.")
@click.option("--server", metavar="HOST:PORT", help="The far side, where this command runs with --serve.")
@click.option("--serve", is_flag=True, help="Be the far side.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="With --serve.  [default: a free one]")
@click.option("--listen", default="0.0.0.0", show_default=True, help="With --serve.")  # noqa: S104
@click.option("--node", default="", metavar="PREFIX", help="How to run on a compute node: 'srun -n1'.  [default: here]")
@click.option("--home", default="", metavar="PREFIX", help="How to run where the gateway is.  [default: here]")
@click.option("--root", default="", metavar="PREFIX", help="How to be root there, for --mode plain: 'sudo -n'.")
@click.option("--gateway", default="", metavar="NAME", help="A gateway that runs.  [default: one for this run]")
@click.option("--gateway-option", multiple=True, metavar="OPT", help="For the one of this run: '--allow=…'.")
@click.option("--xrdcp", "copy_url", default="", metavar="URL", help="Also time `xrdcp` of this file.")
@click.option("--site", is_flag=True, help="On the simulated site of a clone.")
@click.option("--goals", is_flag=True, help="With --site: what the goals need, link after link.")
@click.option("--link", metavar="RATE,TIME", help="The site's outer link: 1gbit,20ms.  [default: unshaped]")
@click.option("--no-xrdcp", is_flag=True, help="On the site: without the copies.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="PNG", help="Draw throughput against workers.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON there too.")
@click.option("--json", "as_data", is_flag=True, help="Print JSON, for programs.")
@click.pass_context
def tunnel(ctx: click.Context, /, **values: object) -> None:
    """Throughput of every tunnel mode against native, from memory to memory, with its CPU time and round trip.

    Native is measured from where the gateway is. Run it on a login node with --node 'srun -n1', and with --serve on a
    host outside; or with --site. Exit status 1: a goal was missed.
    """
    options = msgspec.convert(values, type=_Options)
    if options.serve:
        _serve(options)
        return
    if options.goals:
        ctx.exit(_measure_goals(options))
    plan, link = options.plan(), Link.parse(options.link) if options.link else None
    if options.site and not simulated.inside():
        simulated.enter(_again(), link or Link(), options.shown())
    report = _measure(options, plan, link)
    _print(report, options)
    ctx.exit(any(goal.ok is False for goal in report.goals))


class _Options(msgspec.Struct):
    """The command line, typed."""

    modes: tuple[str, ...]
    workers: str
    direction: str
    seconds: float
    warmup: float | None
    rounds: int
    server: str | None
    serve: bool
    port: int
    listen: str
    node: str
    home: str
    root: str
    gateway: str
    gateway_option: tuple[str, ...]
    copy_url: str
    site: bool
    goals: bool
    link: str | None
    no_xrdcp: bool
    plot: object
    output: object
    as_data: bool

    def plan(self) -> Plan:
        """What to measure; raises UsageError."""
        ways = tuple(Way.parse(text) for text in self.modes) or tuple(default_ways(root=self.site or bool(self.root)))
        return Plan(
            ways,
            _numbers(self.workers),
            ("up", "down") if self.direction == "both" else (self.direction,),
            self.rounds,
            self.seconds,
            self.warmup,
            copies=bool(self.copy_url) or (self.site and not self.no_xrdcp),
        )

    def files(self) -> list[Path]:
        """What will be written."""
        return [path.absolute() for path in (self.plot, self.output) if isinstance(path, Path)]

    def check_files(self) -> None:
        """Raise UsageError when one could not be written at the end."""
        for path in self.files():
            if not os.access(path.parent, os.W_OK):
                raise UsageError(f"cannot write {path}: {path.parent} is not a directory you may write to")

    def shown(self) -> list[Path]:
        """Directories of these, for a site, which hides /tmp."""
        return sorted({path.parent for path in self.files()})


def _again() -> list[str]:
    """This command line, as `python -m vpn` takes it."""
    words = sys.argv[1:]
    start = words.index("tunnel") if "tunnel" in words else words.index("bench")
    return ["bench", *words[start + 1 :]]


def _serve(options: _Options) -> None:
    click.echo("serving; there: hpcq bench tunnel --server THIS-HOST:PORT; Ctrl-C ends it", err=True)
    wire.serve(options.listen, options.port, wire.IDLE, follow=False)


def _measure_goals(options: _Options) -> bool:
    """The whole table; whether something was missed."""
    if not options.site or options.link or options.modes:
        raise UsageError("--goals is for --site, and knows links and modes by itself")
    options.check_files()
    click.echo(f"measuring what every goal needs, about {_clock(whole.duration())}", err=True)
    found = whole.measure(lambda text: click.echo(f"bench: {text}", err=True))
    if isinstance(options.output, Path):
        options.output.write_text(as_json(found) + "\n")
    if isinstance(options.plot, Path):
        show.plot_goals(found.reports, options.plot)
    if options.as_data:
        click.echo(as_json(found))
        return found.missed
    for report in found.reports:
        click.echo(f"link {report.link}\n")
        _print_tables(report)
    return found.missed


def _measure(options: _Options, plan: Plan, link: Link | None) -> Report:
    options.check_files()
    settings = Settings(plan, _places(options, plan), link or (Link() if options.site else None))
    names = ", ".join(plan.labels)
    click.echo(f"measuring {names}: {plan.count()} steps, about {_clock(plan.duration())}", err=True)
    with _progress(plan.count()) as (settings.say, settings.step):
        return asyncio.run(Run(settings).go())


def _places(options: _Options, plan: Plan) -> Places:
    if options.site:
        places = simulated.places(plan.copies)
    elif options.server:
        places = Places(
            parse_server(options.server), options.node, options.home, root=options.root, copy_url=options.copy_url
        )
    else:
        raise UsageError("say where the far side is: --server HOST:PORT (run there with --serve), or --site")
    return replace(places, gateway=options.gateway, gateway_arguments=options.gateway_option)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def _progress(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Where to say things, and where each step begins: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield (lambda text: click.echo(f"bench: {text}", err=True)), (lambda _text: None)
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("bringing up", total=steps)
        begun = False

        def step(text: str) -> None:
            nonlocal begun
            progress.update(task, description=text, advance=1 if begun else 0)
            begun = True

        yield progress.console.print, step


def _print(report: Report, options: _Options) -> None:
    data = as_json(report)
    if isinstance(options.output, Path):
        options.output.write_text(data + "\n")
    if isinstance(options.plot, Path):
        show.plot(report, options.plot)
    if options.as_data:
        click.echo(data)
        return
    _print_tables(report)


def _print_tables(report: Report) -> None:
    for lines in (show.table(report), show.setup_table(report), show.goal_lines(report.goals)):
        click.echo("\n".join(show.plain(lines)) + "\n")
