"""The harness's hand on one host: tunnels on a compute node, the gateway on a login node.

``python -c … vpn.bench.agent`` answers the requests of ``messages`` on standard output, one after the other. Every
tunnel has a process inside, ``traffic.py work``, which starts the workers. When standard input ends, or this process
is killed, all of it ends: tunnels by their sessions, a gateway and the native workers by a keeper.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import msgspec

from vpn.bench import messages as m
from vpn.bench.cpu import tree_seconds
from vpn.bench.plain import start_plain
from vpn.config import Credential, TunnelConfig
from vpn.errors import GatewayError, TunnelError, UsageError, VpnError
from vpn.gateway.client import GatewayClient
from vpn.modes.base import TunnelInfo
from vpn.pipes import read_chunks
from vpn.process import Client, Process, python_argv, start_keeper
from vpn.programs import search_path
from vpn.session import Session, open_session

TRAFFIC = str(Path(__file__).with_name("traffic.py"))
JOB_GRACE = 60.0
"""Seconds a job may take beyond its own time: connecting, stalling, reporting."""
COPY_DEADLINE = 600.0
GATEWAY_DEADLINE = 60.0
NATIVE = "native"


class Workers:
    """The process in a tunnel that starts workers, and the way to it."""

    def __init__(self, process: Process, stdin: int, stdout: int) -> None:
        self.process = process
        self._stdin = stdin
        self._lines = _lines(stdout)

    async def run(self, job: Mapping[str, object], deadline: float) -> list[m.Worker]:
        """Give it a job and wait for what its workers found; raises TunnelError."""
        os.write(self._stdin, json.dumps(job).encode() + b"\n")
        try:
            async with asyncio.timeout(deadline):
                line = await anext(self._lines)
        except TimeoutError:
            raise TunnelError("tunnel", f"the workers did not end within {deadline:g} s") from None
        except StopAsyncIteration:
            raise TunnelError("tunnel", "the process that starts the workers was killed") from None
        return msgspec.json.decode(line, type=list[m.Worker])

    async def close(self) -> None:
        """End it."""
        os.close(self._stdin)
        await self._lines.aclose()
        await self.process.end()


async def _lines(fd: int) -> Any:
    """Lines of any length."""
    rest = b""
    async for chunk in read_chunks(fd):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line


class Agent:
    """Everything opened so far; ``stack`` brings it down."""

    def __init__(self, keeper: Client, stack: AsyncExitStack) -> None:
        self.keeper = keeper
        self.stack = stack
        self.tunnels: dict[str, tuple[Workers, Session | None, AsyncExitStack]] = {}
        self.plain: dict[str, Process] = {}

    async def answer(self, request: m.Request) -> m.Answer:
        """Do what is asked."""
        try:
            return await self._perform(request)
        except (VpnError, OSError, TimeoutError) as error:
            return m.Problem(str(error) or type(error).__name__)

    async def _perform(self, request: m.Request) -> m.Answer:
        match request:
            case m.Open():
                return await self._open(request)
            case m.Transfer():
                return await self._transfer(request)
            case m.Copy(name, url):
                return await self._copy(name, url)
            case m.Close(name):
                await self.tunnels.pop(name)[2].aclose()
            case m.StartGateway(name, arguments):
                await self._start_gateway(name, arguments)
            case m.StartPlain() | m.Issue():
                return m.Issued((await self._issue(request)).to_bytes())
            case m.GatewayCpu(gateway):
                own = self.plain.get(gateway)
                return m.Cpu(tree_seconds(own.pid if own is not None else _gateway_pid(gateway)))
        return m.Fine()

    async def _issue(self, request: m.StartPlain | m.Issue) -> Credential:
        if isinstance(request, m.Issue):
            return await asyncio.to_thread(GatewayClient(request.gateway).issue, request.label)
        credential, self.plain[request.name] = await start_plain(self.keeper, self.stack)
        return credential

    async def _open(self, request: m.Open) -> m.Opened:
        loop = asyncio.get_running_loop()
        began = loop.time()
        stack = AsyncExitStack()
        self.stack.push_async_callback(stack.aclose)
        session = None
        if request.mode != NATIVE:
            credential = Credential.from_bytes(request.credential) if request.credential else None
            session = await stack.enter_async_context(open_session(make_config(request, credential)))
        workers = await self._start_workers(session)
        stack.push_async_callback(workers.close)
        self.tunnels[request.name] = workers, session, stack
        info = session.info if session else TunnelInfo(NATIVE)
        return m.Opened(loop.time() - began, info)

    async def _start_workers(self, session: Session | None) -> Workers:
        argv = [sys.executable, "-I", TRAFFIC, "work"]
        stdin, to_it = os.pipe2(os.O_CLOEXEC)
        from_it, stdout = os.pipe2(os.O_CLOEXEC)
        try:
            start = session.spawn if session else self.keeper.spawn
            process = await start(argv, cwd="/", stdin=stdin, stdout=stdout)
        except BaseException:
            os.close(to_it)
            os.close(from_it)
            raise
        finally:
            os.close(stdin)
            os.close(stdout)
        return Workers(process, to_it, from_it)

    async def _transfer(self, request: m.Transfer) -> m.Transferred:
        workers, session, _ = self._tunnel(request.name)
        job = {
            "server": request.server, "workers": request.workers, "kind": request.kind,
            "warmup": request.warmup, "seconds": request.seconds, "trips": request.trips,
        }  # fmt: skip
        # Of several tunnels only this one has anything to do, so that what all of them use is its.
        without = [other.process.pid for other, _, _ in self.tunnels.values()]
        before = tree_seconds(os.getpid(), without)
        try:
            found = await workers.run(job, request.warmup + request.seconds + JOB_GRACE)
        except TunnelError:
            if session is not None and session.lost.done():
                raise session.lost.result() from None
            raise
        return m.Transferred(found, tree_seconds(os.getpid(), without) - before)

    async def _copy(self, name: str, url: str) -> m.Copied:
        _, session, _ = self._tunnel(name)
        program = shutil.which("xrdcp", path=search_path())
        if program is None:
            raise TunnelError("program", "xrdcp was not found: install xrootd-client")
        loop = asyncio.get_running_loop()
        start = session.spawn if session else self.keeper.spawn
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            began = loop.time()
            process = await start(
                [program, "--nopbar", "--silent", "--force", url, os.devnull], cwd="/", stdin=null, stdout=null
            )
        finally:
            os.close(null)
        try:
            async with asyncio.timeout(COPY_DEADLINE):
                status = await process.wait()
            seconds = loop.time() - began
        finally:
            await process.end(grace=0)
        if status:
            raise TunnelError("xrootd", f"xrdcp {url} ended with status {status}")
        return m.Copied(seconds)

    def _tunnel(self, name: str) -> tuple[Workers, Session | None, AsyncExitStack]:
        if name not in self.tunnels:
            raise UsageError(f"no tunnel {name!r} is open")
        return self.tunnels[name]

    async def _start_gateway(self, name: str, arguments: list[str]) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        argv = python_argv("vpn.bench.agent", "gateway", "--name", name, "--foreground", *arguments)
        try:
            process = await self.keeper.spawn(argv, cwd="/", stdin=null, stdout=writer)
        finally:
            os.close(writer)
            os.close(null)
        self.stack.push_async_callback(process.end)
        try:
            async with asyncio.timeout(GATEWAY_DEADLINE):
                async with aclosing(_lines(reader)) as lines:
                    async for _ in lines:
                        return  # it says one line when it accepts pilots
        except TimeoutError:
            raise GatewayError(f"gateway {name!r} did not start within {GATEWAY_DEADLINE:g} s") from None
        raise GatewayError(f"gateway {name!r} did not start")


def make_config(request: m.Open, credential: Credential | None) -> TunnelConfig:
    """The settings of a tunnel; raises UsageError for an option that there is none of."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in request.options.items()}
    try:
        return TunnelConfig(request.mode, credential, **options)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(f"mode {request.mode}: {error}") from None


def _gateway_pid(name: str) -> int:
    record = GatewayClient(name).record()
    if record is None:
        raise GatewayError(f"gateway {name!r} is not running on this host")
    return record.pid


async def serve() -> None:
    """Answer requests until standard input ends."""
    requests = _lines(os.dup(0))
    decode = msgspec.json.Decoder(m.Request).decode
    async with AsyncExitStack() as stack:
        keeper = await start_keeper()
        stack.push_async_callback(keeper.close)
        agent = Agent(keeper.client, stack)
        async for line in requests:
            answer = await agent.answer(decode(line))
            os.write(1, msgspec.json.encode(answer) + b"\n")


def main(argv: list[str]) -> None:
    """Serve; ``gateway …`` is `vpn gateway start …`."""
    if argv[:1] == ["gateway"]:
        from vpn.cli import cli  # noqa: PLC0415

        cli(["gateway", "start", *argv[1:]], prog_name="vpn")
        return
    asyncio.run(serve())
