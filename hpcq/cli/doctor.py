"""``hpcq doctor``: look at this host, send a pilot to look at a compute node, show what works; leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import click
import msgspec

from hpcq import config, state_dir
from hpcq.batch.base import batch_system_names, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.cli.cancel import wait_until_gone
from hpcq.cli.common import json_option, print_json, verbose_option
from hpcq.cli.submit import some_pilot_flags
from hpcq.doctor.login import guess_batch, look_here
from hpcq.doctor.report import MODES, TUNNELS, Findings, Report, judge, lines_of
from hpcq.doctor.trip import Trip
from hpcq.errors import HpcqError, UsageError
from hpcq.units import parse_duration
from vpn import GatewayClient, GatewayError, gateway_names, temporary_gateway

NOTHING_WORKS = 5
"""Exit status when no mode works: that of a tunnel which could not be brought up."""
GONE_LIMIT = 60.0
"""Seconds the batch system has to forget the job at the end."""

_OF_PILOTS = (
    "site", "memory", "gpus", "walltime", "partition", "account", "qos", "constraint", "reservation",
    "exclusive", "options", "template", "modules", "setup", "epilogue", "environment", "gateway", "require",
    "scratch",
)  # fmt: skip
_SHORT = {"walltime": "0:15:00", "manager_timeout": "60"}
"""What its own pilot gets when nothing else is asked for: it ends soon, whatever becomes of us."""


@click.command("doctor")
@click.option("--batch", help=f"{', '.join(batch_system_names())}.  [default: what this host has]")
@some_pilot_flags(*_OF_PILOTS)
@click.option("--vpn", type=click.Choice(("auto", *MODES)), default="auto", help="Try this mode only.")
@click.option("--no-pilot", is_flag=True, help="Look at this host alone; submit nothing.")
@click.option("--timeout", default="10m", show_default=True, metavar="TIME", help="How long the job may wait to start.")
@json_option
@verbose_option
@click.pass_context
def doctor(ctx: click.Context, /, *, vpn: str, no_pilot: bool, timeout: str, as_json: bool, **values: Any) -> None:
    """Say which tunnels a site allows, by trying them, and what to ask the site for.

    Looks at this login node, then submits one short pilot that looks at a compute node and brings each tunnel up from
    there to your gateway (one is started for that when none runs). --require TARGET must answer through each of them.
    Exits with 0 when at least one mode works, else with 5.
    """
    limit = parse_duration(timeout, name="--timeout")
    batch, options = _settings(values)
    gateway, targets = options.pop("gateway", None) or "default", options.pop("require", ())
    modes = MODES if vpn == "auto" else (vpn,)
    pilot_request("doctor", batch, 1, {**options, "require": targets}, flags=True)  # refuse what cannot be submitted
    login = look_here(batch, gateway)
    if no_pilot:
        why = dict.fromkeys(modes, "nothing on this host forbids it")
        report = Report(login, batch, judge(login, modes, why))
    else:
        with _ended_by_signals():
            report = _travel(Trip(batch, options, modes, _say), login, gateway, targets, limit)
    _show(report, as_json)
    ctx.exit(0 if report.fit else NOTHING_WORKS)


def _settings(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The batch system, found on this host where nobody says it, and the options of the pilot."""
    given = dict(values)
    found = config.resolve({name: value for name, value in given.items() if name != "site"}, site=given["site"])
    options = {name: value for name, value in found.values.items() if name in _OF_PILOTS}
    batch = guess_batch() if found.origins["batch"] == "default" else found.values["batch"]
    if found.origins.get("walltime") != "command line":
        options["walltime"] = _SHORT["walltime"]
    return get_batch_system(batch).name, {**options, "manager_timeout": _SHORT["manager_timeout"], "vpn": "none"}


def _travel(trip: Trip, login: Findings, name: str, targets: tuple[str, ...], limit: float) -> Report:
    logging.getLogger("hpcq.jobs").setLevel(logging.ERROR)  # what it would warn of is in the report
    with contextlib.ExitStack() as stack:
        gateway, why = _gateway(stack, name, trip.modes)
        stack.callback(_leave_nothing, trip)
        try:
            node = trip.run(gateway, targets, limit)
        except UsageError:
            raise
        except HpcqError as error:  # also what the batch system refused: the rest of the report is still worth showing
            return Report(login, trip.batch, [], job=_job(trip), waited=trip.waited, trouble=str(error))
    way_out = "it has a default route, but only --require TARGET can tell whether that leads outside"
    untried = {**dict.fromkeys(MODES, way_out), **dict.fromkeys(TUNNELS, why), **trip.untried}
    modes = judge(node, trip.modes, untried)
    return Report(login, trip.batch, modes, node, _job(trip), trip.waited)


def _job(trip: Trip) -> str:
    return trip.jobs[0].id if trip.jobs else ""


def _gateway(stack: contextlib.ExitStack, name: str, modes: Sequence[str]) -> tuple[GatewayClient | None, str]:
    """The user's own gateway, else one for now, else None and why there is none."""
    if not set(modes) & set(TUNNELS):
        return None, "no mode needs it"
    own = [GatewayClient(one) for one in gateway_names(name)]
    for client in own:
        with contextlib.suppress(GatewayError):
            client.status()
            return client, ""
    if name != "default":
        own[0].status()  # it was asked for by name: say what is wrong with it
    try:
        _say("no gateway runs here: starting one for now")
        return stack.enter_context(temporary_gateway(f"doctor-{os.getpid()}")), ""
    except GatewayError as error:
        return None, f"no gateway: {error}"


def _leave_nothing(trip: Trip) -> None:
    """Wait until the job is gone, and remove the queue's files."""
    if not trip.queue:
        return
    directory = state_dir.queue_dir(trip.queue)
    left = wait_until_gone(trip.jobs, GONE_LIMIT) if trip.jobs else {}
    if left:
        states = ", ".join(f"{job} ({state})" for job, state in left.items())
        _say(f"cancelled, but {trip.batch} still lists {states}; its files are in {directory}")
        return
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as Ctrl-C does: by way of every clean-up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    click.echo(f"hpcq doctor: {text}", err=True)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        data = json.loads(msgspec.json.encode(report))
        print_json({**data, "works": report.fit, "when": time.time()})
        return
    click.echo("\n".join(lines_of(report)))
