"""The command line: ``python -m vpn``, mounted unchanged as ``hpcq vpn``.

Data goes to standard output, errors to standard error in one line, with the exit status of the error (2
usage, 5 tunnel).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from vpn import capabilities
from vpn.command import Run, read_password
from vpn.config import (
    MODES,
    PROBE_INTERVAL,
    WITHOUT_CREDENTIAL,
    Credential,
    Login,
    Mode,
    TunnelConfig,
    as_json,
    check_honoured,
    check_probe_interval,
    parse_server,
    read_secret,
    server_credential,
    split_networks,
)
from vpn.cvmfs.options import cvmfs_options
from vpn.cvmfs.settings import Cvmfs
from vpn.errors import GatewayError, UsageError, VpnError
from vpn.gateway import control
from vpn.gateway.choice import gateway_names
from vpn.gateway.client import GatewayClient, issue_from, known_gateways, start_gateway
from vpn.gateway.state import UPLINKS, GatewayConfig, Uplink, state_directory
from vpn.probes import check_target
from vpn.units import MAX_DURATION_S, seconds_in

SOCKS_PORT = 1080


def _take_time(ctx: click.Context, param: click.Parameter, value: str) -> float:
    seconds = seconds_in(value.strip())
    if not seconds or seconds > MAX_DURATION_S:
        raise click.BadParameter(f"{value!r} is not a time: write it as 10s, 5m, H:MM:SS, or seconds", ctx, param)
    return seconds


class Failure(click.ClickException):
    """One of our errors, as click ends a program with it."""

    def __init__(self, error: VpnError) -> None:
        super().__init__(str(error))
        setattr(self, "exit_code", error.exit_status)  # noqa: B010  (click declares it a class variable)


class OneLineErrors(click.Group):
    """A group whose expected errors end the program with one line and their own status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except VpnError as error:
            raise Failure(error) from error


_MBIT = 1e6 / 8  # bytes
_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Rootless tunnels: run a command through one, or run the gateway they end at."""


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="openconnect",
    show_default=True,
    help="How the tunnel is made.",
)
@click.option(
    "--gateway", metavar="NAME|HOST:PORT,…", help="A gateway of yours, the first to answer [default: default]."
)
@click.option("--credential", type=click.Path(path_type=Path), help="A credential file of `vpn gateway credential`.")
@click.option("--server", metavar="HOST:PORT", help="Any AnyConnect server; the password is the first line of stdin.")
@click.option("--servercert", metavar="PIN", help="The server's key: pin-sha256:…")
@click.option("--user", help="User at --server.")
@click.option("--cookie-on-stdin", is_flag=True, help="Stdin has a cookie of `openconnect --authenticate` instead.")
@click.option("--certificate", type=_FILE, help="A client certificate for --server (PEM).")
@click.option("--sslkey", type=_FILE, help="Its key, if it is not in the same file.")
@click.option(
    "--require",
    multiple=True,
    metavar="TARGET",
    help="Must answer first: root://H:P, http://…, cvmfs:REPO, dns:NAME.",
)
@click.option(
    "--timeout",
    callback=_take_time,
    default="60",
    metavar="TIME",
    help="Of the bring-up: 10s, 5m, H:MM:SS, or seconds.  [default: 60]",
)
@click.option("--dtls/--no-dtls", default=None, help="openconnect: UDP, or TLS alone [default: what is faster].")
@click.option("--mtu", type=int, default=0, help="openconnect: ask the server for this MTU, in bytes.")
@click.option("--socks", metavar="HOST:PORT", help="A SOCKS5 server for mode socks, such as that of ssh -D.")
@click.option(
    "--direct", multiple=True, metavar="NETWORK,…", help="Reached from this node itself, as all is in slirp and none."
)
@click.option("--tls/--no-tls", default=True, help="Encrypt what the command sends to the gateway (relay, socks).")
@click.option(
    "--probe-interval",
    callback=_take_time,
    default=f"{PROBE_INTERVAL:g}",
    metavar="TIME",
    help=f"How often a quiet tunnel is asked for a sign of life.  [default: {PROBE_INTERVAL:g}]",
)
@cvmfs_options
@click.option("-v", "--verbose", is_flag=True, help="Say what came up.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(
    ctx: click.Context,
    *,
    mode: Mode,
    gateway: str | None,
    credential: Path | None,
    server: str | None,
    servercert: str | None,
    user: str | None,
    cookie_on_stdin: bool,
    certificate: Path | None,
    sslkey: Path | None,
    require: tuple[str, ...],
    timeout: float,
    dtls: bool | None,
    mtu: int,
    socks: str | None,
    direct: tuple[str, ...],
    tls: bool,
    probe_interval: float,
    cvmfs: Cvmfs | None,
    verbose: bool,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND inside a tunnel; the exit status is the command's, 128+N for a signal."""
    for target in require:
        check_target(target)
    where = {"server": server, "gateway": gateway, "credential": credential}
    asked = {"dtls": dtls, "mtu": mtu, "socks": socks, "tls": tls, "probe_interval": probe_interval}
    check_honoured(mode, {**asked, **where})
    check_probe_interval(probe_interval)
    networks = split_networks(direct)
    if sum(option is not None for option in (gateway, credential, server)) > 1:
        raise UsageError("--gateway, --credential and --server exclude each other")
    with ExitStack() as stack:
        here = Login(cookie_on_stdin, _absolute(certificate), _absolute(sslkey))
        _check_login(server, here, user)
        who, why_none = _who(
            mode,
            lambda: _credential(stack, gateway, credential, (server, servercert, user), here),
            named=gateway is not None,
            alone=socks is not None,
        )
        if why_none:
            click.echo(f"vpn run: no gateway: {why_none}", err=True)
        proxy = None if socks is None else parse_server(socks, SOCKS_PORT)
        config = TunnelConfig(
            mode, who, bring_up_timeout=timeout, probe_interval=probe_interval, dtls=dtls, mtu=mtu, direct=networks,
            socks=proxy, tls=tls, cvmfs=cvmfs,
        )  # fmt: skip
        say = (lambda text: click.echo(f"vpn run: {text}", err=True)) if verbose else (lambda _text: None)
        status = asyncio.run(Run(config, command, require, say).run())
    ctx.exit(status)


def _who(mode: Mode, get: Callable[[], Credential], *, named: bool, alone: bool) -> tuple[Credential | None, str]:
    """Who to be; or None and, in mode auto with no gateway ``named``, why none gave a credential."""
    if alone or mode in WITHOUT_CREDENTIAL:
        return None, ""
    try:
        return get(), ""
    except GatewayError as error:
        if mode != "auto" or named:
            raise
        return None, str(error)


def _credential(
    stack: ExitStack,
    gateway: str | None,
    file: Path | None,
    server: tuple[str | None, str | None, str | None],
    login: Login,
) -> Credential:
    if file is not None:
        return read_credential(file)
    address, pin, user = server
    if address is not None:
        server_credential(address, pin, user, "", login)  # refuse what is wrong before anybody is asked
        return server_credential(address, pin, user, read_password() if user or login.cookie else "", login)
    client, credential = issue_from(gateway or "", f"vpn run, pid {os.getpid()} on {socket.gethostname()}")
    stack.callback(_revoke, client, credential.username)
    return credential


def _absolute(file: Path | None) -> str:
    return str(file.absolute()) if file is not None else ""


def _check_login(server: str | None, login: Login, user: str | None) -> None:
    if server is None and login != Login():
        raise UsageError("--cookie-on-stdin, --certificate and --sslkey are for --server")
    if login.cookie and (user or login.certificate):
        raise UsageError("--cookie-on-stdin is a login by itself: without --user and --certificate")


def _revoke(client: GatewayClient, username: str) -> None:
    try:
        client.revoke(username)
    except VpnError as error:
        logging.getLogger("vpn").info("the credential was not revoked: %s", error)


def read_credential(file: Path) -> Credential:
    """A credential file; it must be nobody else's business."""
    return Credential.from_bytes(read_secret(file))


@cli.group("gateway", cls=OneLineErrors, invoke_without_command=True)
@click.pass_context
def gateway_group(ctx: click.Context) -> None:
    """The gateway on a login node: ocserv without root, for your own pilots only."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(status)


_name = click.option("--name", default="default", show_default=True, help="Which gateway.")
_json = click.option("--json", "as_data", is_flag=True, help="Print data.")


@gateway_group.command()
@_name
@click.option("--listen", default="", help="Address to listen on [default: all of this host].")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP and UDP port [default: a free one].")
@click.option("--dns", multiple=True, help="Name server for pilots [default: this host's own].")
@click.option("--foreground", is_flag=True, help="Stay; log to standard error.")
@click.option(
    "--uplink",
    type=click.Choice(UPLINKS),
    default="sockets",
    show_default=True,
    help="What carries pilots' packets: this host's own sockets, or slirp4netns (slow).",
)
@click.option("--relay-port", type=click.IntRange(0, 65535), default=0, help="TCP port of the relay [default: near].")
@click.option(
    "--allow",
    multiple=True,
    metavar="RULE",
    help="Where pilots may go: HOST[:PORT], *.DOMAIN, NETWORK, default  [default: every public address].",
)
@click.option("--limit", type=click.FloatRange(min=0), default=0.0, help="Mbit/s each way, all pilots together.")
@click.option("--limit-per-pilot", type=click.FloatRange(min=0), default=0.0, help="Mbit/s each way of one pilot.")
@click.option("--privileged", is_flag=True, help="Run by root: no user namespaces.")
@_json
def start(
    *,
    name: str,
    listen: str,
    port: int,
    dns: tuple[str, ...],
    foreground: bool,
    as_data: bool,
    uplink: Uplink,
    relay_port: int,
    allow: tuple[str, ...],
    limit: float,
    limit_per_pilot: float,
    privileged: bool,
) -> None:
    """Start the gateway; returns when it accepts pilots."""
    from vpn.gateway.daemon import describe, run_daemon  # noqa: PLC0415 - slow to import, and wanted here only

    if privileged and os.geteuid() != 0:
        raise UsageError("--privileged is for root; without it the gateway needs no privilege")
    rates = limit * _MBIT, limit_per_pilot * _MBIT
    config = GatewayConfig(name, listen, port, dns, uplink, relay_port, allow, *rates, privileged)
    if foreground:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        run_daemon(
            config,
            lambda record: click.echo(as_json(record) if as_data else f"gateway {name!r}: {describe(record)}"),
        )
        return
    record, fresh = start_gateway(config)
    what = "started" if fresh else "was running already"
    click.echo(as_json(record) if as_data else f"gateway {name!r} {what}: {describe(record)}")


@gateway_group.command()
@click.option("--name", default="", metavar="NAME,…", help="Which gateways  [default: all that run here, or default].")
@_json
def status(*, name: str = "", as_data: bool = False) -> None:
    """What each gateway is, and whom it serves; with --json a list, when several are named."""
    names = gateway_names(name) if name else known_gateways() or gateway_names("")
    if as_data and not name:  # one object, as ever: of the default gateway, unless another is the only one
        names = names if len(names) == 1 else gateway_names("")
    if as_data and len(names) == 1:
        click.echo(as_json(GatewayClient(names[0]).status()))
        return
    reports, problems = [], []
    for one in names:
        try:
            reports.append(GatewayClient(one).status())
        except GatewayError as error:
            problems.append(error)
    if as_data:
        click.echo(as_json(reports))
    for report in [] if as_data else reports:
        _show(report)
    if problems:
        raise GatewayError("; ".join(map(str, problems)))


def _show(report: control.Report) -> None:
    click.echo(
        f"gateway {report.name!r} on {report.host}, up {report.uptime:.0f} s: {' '.join(report.addresses)} "
        f"{f'port {report.port}, ' if report.port else ''}relay port {report.relay_port}"
    )
    if report.refusal:
        click.echo(f"openconnect is not offered: {report.refusal}")
    if report.restarts:
        click.echo(f"processes started again since then: {report.restarts}, the last after {report.last_end}")
    click.echo(f"key {report.pin}, name servers {' '.join(report.dns)}")
    click.echo(f"its log and access.log are in {state_directory(report.name)}")
    for pilot in report.pilots:
        carried = f"{pilot.connections} open, {pilot.up / 1e6:.1f} MB up, {pilot.down / 1e6:.1f} MB down"
        click.echo(f"  {pilot.state:12} {pilot.address or '-':15} {pilot.username}  {carried}  {pilot.label}")


@gateway_group.command()
@_name
def stop(name: str) -> None:
    """End the gateway and every tunnel to it; those of pilots that have another gateway are made anew there."""
    GatewayClient(name).stop()
    click.echo(f"gateway {name!r} stopped")


@gateway_group.command()
@_name
@click.option("--label", default="by hand", help="For `status`.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The file to make, 0600.")
def credential(name: str, label: str, output: Path) -> None:
    """Write a credential good for one login, for `vpn run --credential` on a compute node."""
    data = GatewayClient(name).issue(label).to_bytes()
    try:
        output.unlink(missing_ok=True)
        with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None


@cli.command("bench", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bench(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Measure tunnels against native (`hpcq bench tunnel`)."""
    from vpn.bench.cli import tunnel  # noqa: PLC0415 - slow to import, and rarely wanted

    ctx.exit(tunnel.main(args=list(arguments), prog_name=ctx.command_path, standalone_mode=False) or 0)


@cli.command()
@click.option("--server", metavar="HOST:PORT", help="Also ask a gateway: TCP, MTU, UDP.")
@click.option("--against", metavar="URL", default="", help="Compare the clock with this web server's.")
@_json
def probe(*, as_data: bool, server: str | None, against: str) -> None:
    """Say what this host allows, what each tunnel mode lacks here, and what to ask the site for."""
    host, port = parse_server(server) if server is not None else ("", 0)
    report = asyncio.run(capabilities.examine(([host], port) if host else None, against))
    if as_data:
        click.echo(as_json(report))
        return
    for check in report.checks:
        click.echo(f"{'yes' if check.ok else 'NO ':3}  {check.name:16} {check.detail}")
    for use in report.uses:
        reasons = report.why_not(use)
        click.echo(f"{use}: {'works' if not reasons else 'does not work, because'}")
        for reason in reasons:
            click.echo(f"    {reason}")
