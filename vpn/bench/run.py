"""One run of the harness: agents started, tunnels opened, the plan's steps done, the report filled.

Three places take part: the *node* where tunnels begin, *home* where the gateway runs and native is measured from
(both reached by a command prefix such as ``srun -n1`` or ``ssh login``; "" is here), and the *far* side, a server
that runs already or that is started by a third prefix. A way that does not come up, or a transfer that fails, is a
line of the report; only what nothing can be measured without (an agent, the server, native) ends the run.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import platform
import shlex
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from vpn.bench import messages as m
from vpn.bench.agent import TRAFFIC
from vpn.bench.figures import common_rates, fairness
from vpn.bench.goals import judge
from vpn.bench.plan import COPY, NATIVE, PLAIN, Link, Plan, Way, Work
from vpn.bench.report import Report, Row
from vpn.errors import TunnelError, UsageError
from vpn.process import python_argv

ANSWER_LIMIT = 64 << 20
END_DEADLINE = 30.0
"""Seconds an agent has to bring its tunnels down."""
TOLD_LINES = 3

A = TypeVar("A", bound=m.Message)


@dataclass(frozen=True)
class Places:
    """Where things are. ``server`` is HOST and PORT as seen from the tunnels and from home; port 0: started by us."""

    server: tuple[str, int]
    node: str = ""
    home: str = ""
    far: str = ""
    root: str = ""
    """How to be root at home, for an ocserv of root's; "": there is no way."""
    gateway: str = ""
    """A gateway that runs at home; "": one is started for the run."""
    gateway_arguments: tuple[str, ...] = ()
    copy_url: str = ""


@dataclass
class Settings:
    """A run: what, where, and whom to tell of each step that begins."""

    plan: Plan
    places: Places
    link: Link | None = None
    say: Callable[[str], None] = field(default=lambda _text: None)
    step: Callable[[str], None] = field(default=lambda _text: None)


def launcher(prefix: str, argv: Sequence[str]) -> list[str]:
    """The argv that runs ``argv`` behind a prefix; ssh hands one string to a shell."""
    words = shlex.split(prefix)
    if words and Path(words[0]).name == "ssh":
        return [*words, shlex.join(argv)]
    return [*words, *argv]


class AgentProcess:
    """An agent on some host."""

    def __init__(self, process: asyncio.subprocess.Process, where: str, log: IO[bytes]) -> None:
        self._process = process
        self._where = where
        self._log = log

    @classmethod
    async def start(cls, prefix: str, where: str) -> AgentProcess:
        """Start one; raises UsageError when the prefix cannot be run."""
        argv = launcher(prefix, python_argv("vpn.bench.agent"))
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the agent
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=ANSWER_LIMIT
            )
        except OSError as error:
            log.close()
            raise UsageError(f"cannot start {argv[0]!r} ({where}): {error.strerror}") from None
        return cls(process, where, log)

    async def ask(self, request: m.Request, kind: type[A]) -> A:
        """Its answer; raises TunnelError with what it says, or why it is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(ConnectionError):
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise TunnelError("tunnel", f"the harness's agent {self._where} ended: {self.last_words()}")
        answer: Any = msgspec.json.decode(line, type=m.Answer)
        if isinstance(answer, m.Problem):
            raise TunnelError("tunnel", answer.message)
        assert isinstance(answer, kind)
        return answer

    def last_words(self) -> str:
        """The end of what it wrote to standard error."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 4096))
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return "; ".join(said[-TOLD_LINES:]) or "it said nothing"

    async def close(self) -> None:
        """End it and everything it opened."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_DEADLINE)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        self._log.close()


class Run:
    """The state of a run; ``go`` does it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plan = settings.plan
        self.places = settings.places
        self.server = settings.places.server
        self._gateways: dict[str, str] = {"": settings.places.gateway} if settings.places.gateway else {}
        self._gateway_of: dict[str, tuple[AgentProcess, str]] = {}
        self._root: AgentProcess | None = None
        self._issued: m.Issued | None = None
        self._stack = AsyncExitStack()
        self.report = Report(
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            hosts={},
            link=str(settings.link) if settings.link else "",
            server="",
            settings={},
        )

    async def go(self) -> Report:
        """All of it; raises VpnError when nothing can be measured."""
        async with self._stack as stack:
            self.server = await self._far_side(stack)
            self.home = await AgentProcess.start(self.places.home, "at home")
            stack.push_async_callback(self.home.close)
            self.node = self.home
            if self.places.node != self.places.home:
                self.node = await AgentProcess.start(self.places.node, "on the node")
                stack.push_async_callback(self.node.close)
            await self._native()
            await self._tunnels()
            await self._steps()
        self._finish()
        return self.report

    async def _far_side(self, stack: AsyncExitStack) -> tuple[str, int]:
        host, port = self.places.server
        if port:
            return host, port
        argv = launcher(self.places.far, [sys.executable, "-I", TRAFFIC, "serve"])
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        stack.push_async_callback(process.wait)
        assert process.stdin is not None
        assert process.stdout is not None
        stack.callback(process.stdin.close)
        line = await process.stdout.readline()
        if not line:
            raise TunnelError("tunnel", f"the far side's server did not start: {shlex.join(argv)}")
        return host, int(msgspec.json.decode(line)["port"])

    # --- bringing up ---

    def _agent(self, label: str) -> AgentProcess:
        return self.home if label == NATIVE else self.node

    async def _native(self) -> None:
        row = Row(NATIVE, NATIVE)
        self.report.rows.append(row)
        await self.home.ask(m.Open(NATIVE, NATIVE), m.Opened)
        try:
            row.round_trips.append(await self._ping(NATIVE))
        except TunnelError as error:
            host, port = self.server
            raise TunnelError(
                "tunnel", f"the far side, {host}:{port}, does not answer without a tunnel: {error.message}"
            ) from None
        self.plan = replace(self.plan, round_trip=row.round_trips[0])

    async def _ping(self, label: str) -> float:
        host, port = self.server
        answer = await self._agent(label).ask(
            m.Transfer(label, (host, port), "echo", workers=1, trips=self.plan.pings()), m.Transferred
        )
        found = answer.workers[0]
        if found.error:
            raise TunnelError("tunnel", found.error)
        return statistics.median(found.trips)

    async def _tunnels(self) -> None:
        for way in self.plan.ways:
            self.settings.say(f"bringing up {way.label}")
            row = Row(way.label, way.mode)
            self.report.rows.append(row)
            try:
                await self._tunnel(way, row)
            except TunnelError as error:
                row.problem = error.message
                self.settings.say(f"{way.label} is left out: {error.message}")

    async def _tunnel(self, way: Way, row: Row) -> None:
        issued = await (self._plain(way) if way.plain else self._login(way))
        opened = await self.node.ask(m.Open(way.label, way.mode, way.options, issued.credential), m.Opened)
        row.info, row.bring_up = opened.info, opened.seconds
        await self._ping(way.label)

    async def _login(self, way: Way) -> m.Issued:
        gateway = await self._gateway(way.uplink)
        self._gateway_of[way.label] = self.home, gateway
        return await self.home.ask(m.Issue(gateway, f"bench {way.label}"), m.Issued)

    async def _plain(self, way: Way) -> m.Issued:
        """An ocserv of root's, one for all such ways."""
        if self._root is None:
            if not self.places.root:
                raise TunnelError("gateway", "an ocserv of root's needs --root 'sudo -n', or --site")
            self._root = await AgentProcess.start(self.places.root, "of root's")
            self._stack.push_async_callback(self._root.close)
        if self._issued is None:
            self._issued = await self._root.ask(m.StartPlain(PLAIN), m.Issued)
        self._gateway_of[way.label] = self._root, PLAIN
        return self._issued

    async def _gateway(self, uplink: str) -> str:
        """The name of a gateway of this kind; one of our own is started where none was given."""
        if uplink not in self._gateways:
            name = "-".join(filter(None, ["bench", str(os.getpid()), uplink]))
            arguments = [*self.places.gateway_arguments, *(["--uplink", uplink] if uplink else [])]
            try:
                await self.home.ask(m.StartGateway(name, arguments), m.Fine)
            except TunnelError as error:
                raise TunnelError("gateway", f"{error.message}: {self.home.last_words()}") from None
            self._gateways[uplink] = name
        return self._gateways[uplink]

    # --- measuring ---

    async def _steps(self) -> None:
        labels = [row.label for row in self.report.rows if not row.problem]
        for number, step, label in self.plan.steps(labels):
            what = f"{step.workers} {step.direction}" if isinstance(step, Work) else step
            self.settings.step(f"round {number + 1}, {what}, {label}")
            if isinstance(step, Work):
                await self._transfer(label, step)
            elif step == COPY:
                await self._copy(label)
            else:
                await self._round_trip(label)

    async def _round_trip(self, label: str) -> None:
        row = self.report.row(label)
        assert row is not None
        try:
            row.round_trips.append(await self._ping(label))
        except TunnelError as error:
            self.settings.say(f"{label}, round trip: {error.message}")

    async def _transfer(self, label: str, work: Work) -> None:
        row = self.report.row(label)
        assert row is not None
        point = row.point(work.direction, work.workers)
        try:
            before = await self._gateway_cpu(label)
            warmup = self.plan.warming(work.workers)
            request = m.Transfer(label, self.server, work.direction, work.workers, warmup, self.plan.seconds)
            answer = await self._agent(label).ask(request, m.Transferred)
            after = await self._gateway_cpu(label)
            wrong = [worker.error for worker in answer.workers if worker.error]
            if wrong:
                raise TunnelError("tunnel", f"{len(wrong)} of {work.workers} workers failed: {wrong[0]}")
            rates = common_rates([worker.samples for worker in answer.workers], warmup)
        except (TunnelError, ValueError) as error:
            point.problem = str(error)
            self.settings.say(f"{label}, {work.workers} {work.direction}: {error}")
            return
        point.bits_per_second.append(sum(rates))
        point.fairness.append(fairness(rates))
        gigabytes = sum(worker.samples[-1][1] for worker in answer.workers) / 1e9
        if label != NATIVE and gigabytes:
            point.cpu_node.append(answer.cpu_seconds / gigabytes)
            point.cpu_gateway.append((after - before) / gigabytes)

    async def _gateway_cpu(self, label: str) -> float:
        if label == NATIVE:
            return 0.0
        agent, gateway = self._gateway_of[label]
        return (await agent.ask(m.GatewayCpu(gateway), m.Cpu)).seconds

    async def _copy(self, label: str) -> None:
        row = self.report.row(label)
        assert row is not None
        try:
            copied = await self._agent(label).ask(m.Copy(label, self.places.copy_url), m.Copied)
        except TunnelError as error:
            self.settings.say(f"{label}, xrdcp: {error.message}")
            return
        row.copies.append(copied.seconds)

    def _finish(self) -> None:
        report, plan = self.report, self.plan
        report.server = f"{self.server[0]}:{self.server[1]}"
        report.hosts = {
            "host": socket.gethostname(),
            "kernel": platform.release(),
            "cpus": str(os.cpu_count()),
            "node": self.places.node or "here",
            "home": self.places.home or "here",
        }
        warmup = round(plan.warming(1), 3)
        report.settings = {"rounds": plan.rounds, "seconds": plan.seconds, "warmup_of_one": warmup}
        report.goals = judge(report, self.settings.link)
