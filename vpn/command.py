"""``vpn run``: one command inside one tunnel, its status passed on.

States: *bringing up* (a signal ends it) → *running* (signals go to the command's process group) → *down*. The
status is the command's, 128+N when a signal N ended it, 127 or 126 when it could not be started, and 5 when
the tunnel could not be brought up or was lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

import click

from vpn.config import TunnelConfig
from vpn.errors import TunnelError
from vpn.probes import ProbeResult
from vpn.process import first_of
from vpn.session import Session, open_session

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LOST_GRACE = 5.0  # seconds a command has to end when its tunnel is gone


class Run:
    """One run; ``status`` is what to exit with."""

    def __init__(
        self, config: TunnelConfig, argv: Sequence[str], require: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.argv = argv
        self.require = require
        self.say = say
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        self._on_signal: Callable[[int], None] = _ignore

    async def run(self) -> int:
        """Bring up, run, bring down."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        interrupted: list[int] = []

        def interrupt(number: int) -> None:
            interrupted.append(number)
            if task is not None:
                task.cancel()

        self._on_signal = interrupt
        for number in FORWARDED:
            loop.add_signal_handler(number, self._signalled, number)
        try:
            async with open_session(self.config, terminal=self.terminal) as session:
                self._report(session)
                await self._prove(session)
                return await self._command(session)
        except asyncio.CancelledError:
            if not interrupted:
                raise
            return 128 + interrupted[0]

    def _signalled(self, number: int) -> None:
        self._on_signal(number)

    def _report(self, session: Session) -> None:
        info = session.info
        for line in info.passed_over:
            click.echo(f"vpn run: {line}", err=True)
        self._report_troubles(session)
        if info.mode != "none":
            self.say(
                f"tunnel up in {info.bring_up_seconds:.2f} s: {info.kind} {info.cipher} to {info.server}, "
                f"address {info.address}, MTU {info.mtu}, DNS {' '.join(info.dns) or 'none'}"
            )

    def _report_troubles(self, session: Session) -> None:
        for line in session.troubles():
            click.echo(f"vpn run: {line}", err=True)

    async def _prove(self, session: Session) -> None:
        if not self.require:
            return
        for result in await session.probe(self.require):
            self.say(f"{result.target}: {result.message} ({result.seconds:.2f} s)")
            require_ok(result)

    async def _command(self, session: Session) -> int:
        self._on_signal = _ignore
        try:
            process = await session.spawn(self.argv, new_session=not self.terminal)
        except OSError as error:
            click.echo(f"vpn run: {self.argv[0]}: {error.strerror}", err=True)
            return 127 if isinstance(error, FileNotFoundError) else 126

        def forward(number: int) -> None:
            # On a terminal the command shares our process group: the terminal has told it already.
            if not (self.terminal and number in (signal.SIGINT, signal.SIGQUIT)):
                process.send_signal(number, group=not self.terminal)

        self._on_signal = forward
        await first_of(process.ended, session.lost)
        if not process.ended.done() or (process.returncode == -signal.SIGKILL and session.lost.done()):
            process.send_signal(signal.SIGTERM, group=not self.terminal)
            await process.end(LOST_GRACE)
            raise session.lost.result()
        status = process.ended.result()
        self._report_troubles(session)
        return status if status >= 0 else 128 - status


def _ignore(_number: int) -> None:
    """A signal while the command is being started."""


def require_ok(result: ProbeResult) -> None:
    """Raise a failed probe as the error it stands for."""
    if not result.ok:
        raise TunnelError(result.layer, result.message)


def read_password() -> str:
    """The first line of standard input, and not a byte more: the rest is the command's."""
    if sys.stdin.isatty():
        return str(click.prompt("Password", hide_input=True, err=True))
    line = bytearray()
    with suppress(OSError):
        while (byte := os.read(0, 1)) not in (b"", b"\n"):
            line += byte
    return line.decode(errors="replace").removesuffix("\r")
