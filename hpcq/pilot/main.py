"""A pilot's life, from the first word to the last.

::

    find the manager --> ask a credential --> tunnel up --> every --require answers --> Ready --> run tasks --> leave
         |                    |                  |                  |                               ^   |
         | nobody for         +-- StartFailed(layer, message) ------+          manager lost: look --+   |
         v manager_timeout                                                     for it again             v
       end (4)                            end (5)                                                      end (0)

The link to the manager is on the host's own network; only tasks live inside the tunnel's namespace. What ends a pilot:

- the manager says `Leave`;
- SIGTERM or the end of the walltime coming near: it takes nothing new, hands back what has not begun, lets running
  tasks finish for `drain_timeout` seconds (less if the walltime is nearer), then ends them as lost; a second SIGTERM
  ends them at once;
- it breaks inside (an exception nobody caught): what it believes of its tasks may be wrong, so all of them are left to
  the manager, which is told why and runs them elsewhere;
- runners cannot start, or the tunnel stays broken (see `tunnel`): what runs is reported lost, and the manager is told
  why;
- the manager is gone: running tasks are ended, since whoever takes over runs them again; the tunnel stays up for
  ``manager_timeout`` seconds, in which a program of the same queue may take the pilot over.

SIGKILL leaves nothing either: the kernel ends the namespace with us, runners outside it die with their keeper.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq.addresses import own_addresses, raise_descriptor_limit
from hpcq.errors import AuthenticationError, HpcqError
from hpcq.files.cache import Cache
from hpcq.parcels import Shelf
from hpcq.pilot import options as opts
from hpcq.pilot.contents import Contents
from hpcq.pilot.core import Core
from hpcq.pilot.ending import End, Ending
from hpcq.pilot.hold import Hold
from hpcq.pilot.host import own_cpus
from hpcq.pilot.lanes import Report
from hpcq.pilot.link import ManagerLink
from hpcq.pilot.parcels import Parcels
from hpcq.pilot.pool import Pool
from hpcq.pilot.reports import Reports
from hpcq.pilot.scratch import scratch_directory
from hpcq.pilot.staging import Staging
from hpcq.pilot.traffic import Counting
from hpcq.pilot.tunnel import Tunnel
from hpcq.pilot.watch import Place
from hpcq.servers import gateways_of
from hpcq.versions import versions
from vpn import WITHOUT_CREDENTIAL, Credential, Session, TunnelConfig, TunnelError, open_session

log = logging.getLogger("hpcq.pilot")

MEMORY_SHARE = 8
"""Large arguments and results may take this part of the pilot's memory; more goes to its scratch directory."""

CREDENTIAL_TIMEOUT = 60.0
"""Seconds the manager has to get a credential from its gateway."""


class Pilot:
    """One pilot."""

    def __init__(self, options: opts.Options, scratch: Path) -> None:
        self._options = options
        self._scratch = scratch
        self._file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise_descriptor_limit()  # each runner takes six of ours; tasks have the limit that they would have without us
        self._loop = asyncio.get_running_loop()
        self._job = opts.job(os.environ)
        self._name = opts.pilot_name(options.batch, self._job)
        ends_at = self._loop.time() + options.walltime if options.walltime else math.inf
        self._ending = Ending(ends_at, options.drain_timeout)
        self._credential: asyncio.Future[m.CredentialReply] = self._loop.create_future()
        self._link = ManagerLink(options.connection, self._hello, self._on_message)
        cpus = own_cpus(options.cores, options.batch)
        self._core = Core(options.cores, options.memory, options.disk, cpus, options.gpus)
        self._pool: Pool | None = None
        self._ready: m.Ready | None = None
        self._tunnel = Tunnel(
            options.vpn, options.require, self._get_credential, self._return_credential, options.tunnel_timeout,
            settings=options.tunnel, gateways=len(gateways_of(options.gateway)),
        )  # fmt: skip
        self._staging: Staging | None = None
        self._parcels: Parcels | None = None
        self._reports = Reports(self._link, self._core, self._tunnel.judge)
        self._counting = Counting(self._places, self._report_counted, self._link.send)
        self._tunnel.on_made, self._tunnel.received = self._counting.watch, self._counting.received
        self._tunnel.is_busy = lambda: self._core.busy
        self._down: m.TunnelDown | None = None

    async def live(self) -> int:
        """From first word to last; returns the exit status."""
        self._loop.set_exception_handler(self._on_unhandled)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        async with AsyncExitStack() as stack:
            end = await self._work(stack)
            await self._leave(end)
        return end.status

    async def _work(self, stack: AsyncExitStack) -> End:
        work = self._loop.create_task(self._serve(stack))
        try:
            await asyncio.wait({work, self._ending.decided}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return self._ending.decided.result()
            error = work.exception()
            if error is None or isinstance(error, OSError):
                return work.result()
            self._fault(error)
            return self._ending.decided.result()
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def _serve(self, stack: AsyncExitStack) -> End:
        try:
            await self._link.connect(self._options.manager_timeout)
            stack.push_async_callback(self._counting.close)
            stack.push_async_callback(self._tunnel.close)
            await self._tunnel.open()
        except TunnelError as error:
            return End(str(error), status=5, layer=error.layer)
        except HpcqError as error:
            return End(str(error), status=error.exit_status)
        self._ending.watch_walltime()
        hold = Hold(Shelf((self._options.memory << 20) // MEMORY_SHARE, self._scratch, described=True))
        spawners = await self._spawners(stack)
        self._pool = Pool(
            self._core, self._scratch, spawners, self._report, self._broken, self._fault, hold, files=self._file_limit
        )
        self._pool.counting = self._counting
        stack.push_async_callback(self._pool.close)
        self._parcels = Parcels(hold, self._name, self._link, self._run_fetched, self._reports.add)
        stack.push_async_callback(self._parcels.close)
        info = self._tunnel.session.info
        self._ready = m.Ready(
            info.mode, info.kind, info.bring_up_seconds, info.address, self._features(),
            tunnel_passed_over=list(info.passed_over),
        )  # fmt: skip
        self._staging = await self._files(stack, self._pool)
        await self._present_ourselves()
        self._watch_tunnel()
        log.info("ready: %d cores, tunnel %s %s", self._options.cores, info.mode, info.kind)
        return await self._keep_manager()

    def _features(self) -> list[str]:
        """What tasks can ask for beside cores and memory: the way out, and each repository that was read."""
        cvmfs = self._options.tunnel.get("cvmfs")
        repositories = cvmfs.names if cvmfs else ()
        return ["wan", *(f"cvmfs={name}" for name in repositories)]

    async def _keep_manager(self) -> End:
        """Serve one manager after the other, until none comes back in time."""
        assert self._pool is not None
        assert self._ready is not None
        while True:
            await self._link.lost.wait()
            log.warning("the manager is gone (%s); waiting for it", self._link.lost_because)
            self._pool.tell(self._core.abandon, "the manager is gone")
            await self._pool.idle.wait()
            self._counting.finish()
            await self._drop_files()
            self._reports.drop()
            self._core.draining = False
            try:
                await self._link.connect(self._options.manager_timeout)
            except HpcqError as error:
                return End(str(error), status=0 if not isinstance(error, AuthenticationError) else error.exit_status)
            await self._present_ourselves()

    async def _present_ourselves(self) -> None:
        """Say that we are ready, and what of our node's cache others can have."""
        assert self._staging is not None
        held = await asyncio.to_thread(self._staging.contents.cache.digests)
        self._link.send(self._ready_now())
        if self._down is not None:
            self._link.send(self._down)
        if held:
            self._link.send(m.Holding([], cached=held))
        self._counting.present()

    # --- start ---

    def _hello(self) -> m.PilotHello:
        left = self._ending.ends_at - self._loop.time()
        return m.PilotHello(
            m.PROTOCOL_VERSION, self._name, self._options.batch, self._job.id, self._job.incarnation,
            socket.gethostname(), os.getpid(), self._options.cores, self._options.memory,
            left if left < math.inf else 0.0, self._options.vpn, self._options.gateway, versions(),
            self._options.disk, len(self._options.gpus),
        )  # fmt: skip

    async def _get_credential(self) -> Credential | None:
        if self._options.vpn in WITHOUT_CREDENTIAL:
            return None
        if self._link.lost.is_set():
            raise TunnelError("gateway", "there is no manager to get a credential from")
        self._credential = self._loop.create_future()
        self._link.send(m.CredentialRequest())
        gone: asyncio.Future[Any] = self._loop.create_task(self._link.lost.wait())
        try:
            either: set[asyncio.Future[Any]] = {self._credential, gone}
            await asyncio.wait(either, timeout=CREDENTIAL_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not self._credential.done():
            raise TunnelError("gateway", f"no credential came within {CREDENTIAL_TIMEOUT:.0f} s")
        reply = self._credential.result()
        if reply.error and self._options.vpn == "auto":
            log.warning("no gateway gave a credential: %s", reply.error)
            return None
        if reply.error:
            raise TunnelError("gateway", reply.error)
        return Credential.from_bytes(reply.credential)

    def _return_credential(self, credential: Credential) -> None:
        self._link.send(m.CredentialReturn(credential.username))

    async def _spawners(self, stack: AsyncExitStack) -> dict[str, Any]:
        inside = self._tunnel.spawn
        if self._tunnel.session.info.mode == "none":
            return {"any": inside, "host": inside}
        outside = await stack.enter_async_context(open_session(TunnelConfig(mode="none")))
        return {"any": inside, "host": outside.spawn}

    async def _files(self, stack: AsyncExitStack, pool: Pool) -> Staging:
        assert self._ready is not None
        limit = None if self._options.cache_size is None else self._options.cache_size << 20
        cache = await asyncio.to_thread(self._cache, limit)
        contents = Contents(cache, self._name, self._link, lambda digests: self._link.send(m.Holding(digests)))
        stack.push_async_callback(contents.close)
        self._ready.data_addresses, self._ready.data_port = own_addresses(), await contents.serve()
        tunnel = self._tunnel
        staging = Staging(
            self._scratch, contents, partial(self._counting.run_errand, tunnel.spawn), tunnel.judge, self._run_staged,
            self._report_staged, pool.sandboxes,
        )  # fmt: skip
        stack.push_async_callback(staging.abandon)
        return staging

    def _cache(self, limit: int | None) -> Cache:
        """The node's, or one of our own where that cannot be used: tasks without files do not depend on it."""
        try:
            return Cache(self._scratch.parent, limit)
        except OSError as error:
            log.warning("the node's cache of files cannot be used, this pilot keeps its own: %s", error)
            return Cache(self._scratch, limit)

    def _run_staged(self, tasks: list[m.TaskSpec]) -> None:
        assert self._pool is not None
        self._pool.tell(self._core.run, tasks)

    def _run_fetched(self, tasks: list[m.TaskSpec]) -> None:
        self._run(m.Run([], tasks, []))

    def _run(self, message: m.Run) -> None:
        assert self._pool is not None
        self._pool.run(self._staging.take(message) if self._staging else message)

    async def _drop_files(self) -> None:
        if self._staging is not None:
            await self._staging.abandon()
        if self._parcels is not None:
            await self._parcels.abandon()

    def _ready_now(self) -> m.Ready:
        """Our readiness, with the time that is left for tasks: they should end before we drain."""
        assert self._ready is not None
        if not self._options.walltime:
            return self._ready
        return msgspec.structs.replace(self._ready, time_left=self._ending.time_left())

    # --- what may end us ---

    def _watch_tunnel(self) -> None:
        def given_up(error: TunnelError) -> None:
            self._ending.finish(End(str(error), status=5, layer=error.layer))

        assert self._pool is not None
        self._pool.on_death = self._tunnel.notice
        self._tunnel.on_down = self._tunnel_down
        self._tunnel.on_up = self._tunnel_up
        self._tunnel.on_given_up = given_up
        self._tunnel.watch()

    def _tunnel_down(self, error: TunnelError, inside: bool) -> None:
        assert self._pool is not None
        self._link.send(m.TunnelDown(error.layer, str(error), inside))
        self._down = m.TunnelDown(error.layer, str(error), inside)
        self._pool.tell(self._core.tunnel_down, str(error), inside=inside)

    def _tunnel_up(self, session: Session) -> None:
        assert self._pool is not None
        assert self._ready is not None
        info = session.info
        self._ready = msgspec.structs.replace(
            self._ready, tunnel_mode=info.mode, tunnel_kind=info.kind, tunnel_seconds=info.bring_up_seconds,
            tunnel_address=info.address, tunnel_passed_over=list(info.passed_over),
        )  # fmt: skip
        self._down = None
        features, passed_over = self._ready.features, self._ready.tunnel_passed_over
        self._link.send(m.TunnelUp(info.mode, info.kind, info.bring_up_seconds, info.address, features, passed_over))
        self._pool.tell(self._core.tunnel_up)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        self._core.job_ends = f"its job was ended: the pilot got {name}"
        if self._pool is not None:
            self._pool.job_ends.set()
        self._ending.signalled(name)

    def _broken(self, message: str) -> None:
        self._ending.finish(End(message, status=1, layer="runner"))

    def _fault(self, error: BaseException) -> None:
        """We broke inside and can be trusted with tasks no more: the manager runs them elsewhere."""
        where = "".join(traceback.format_exception(error))
        log.critical("this pilot ends, it broke inside; this is a fault of hpcq, please report it\n%s", where)
        end = End(f"the pilot broke inside: {type(error).__name__}: {error}; its log has more", 1, layer="pilot")
        if self._ending.decided.done():
            self._link.send(m.StartFailed(end.layer, end.reason))
        self._ending.finish(end)
        self._ending.hurry.set()

    def _on_unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback or task raised, and nobody has caught it. Failures of connections and the like are only noted."""
        error = context.get("exception")
        if (
            isinstance(error, Exception)
            and not isinstance(error, OSError | HpcqError | TunnelError)
            and "transport" not in context
        ):
            self._fault(error)
        else:
            loop.default_exception_handler(context)

    # --- the manager's words ---

    def _on_message(self, message: Any) -> None:
        try:
            self._hear(message)
        except Exception as error:
            self._fault(error)

    def _hear(self, message: Any) -> None:
        pool = self._pool
        kind = type(message)
        if kind is m.CredentialReply:
            if not self._credential.done():
                self._credential.set_result(message)
        elif kind is m.Leave:
            drain = self._options.drain_timeout if message.drain else 0.0
            self._ending.finish(End(message.reason, drain=drain))
        elif pool is None:
            log.warning("%s came before we were ready", kind.__name__)
        elif kind is m.Run:
            self._run(self._parcels.take(message) if self._parcels else message)
        elif kind is m.Retract:
            pool.tell(self._core.retract, self._without_files(message.tasks))
        elif kind is m.Cancel:
            pool.tell(self._core.cancel, self._without_files(message.tasks, cancel=True))

    # --- our reports ---

    def _without_files(self, tasks: list[int], cancel: bool = False) -> list[int]:
        for apart in (self._parcels, self._staging):
            tasks = apart.withdraw(tasks, cancel) if apart else tasks
        return tasks

    def _places(self) -> list[Place]:
        return self._pool.places() if self._pool is not None else []

    def _report(self, report: Report) -> None:
        """What became of tasks in the core; those whose bytes are to be counted are told when they are."""
        self._report_counted(self._counting.ended(report))

    def _report_counted(self, report: Report) -> None:
        """Tasks with outputs are told when these have been collected."""
        if self._staging:
            report = self._staging.ended(report)
        self._report_staged(report)

    def _report_staged(self, report: Report) -> None:
        """Large results are told when they have been brought."""
        self._reports.add(self._parcels.ended(report) if self._parcels else report)

    # --- the end ---

    async def _leave(self, end: End) -> None:
        log.info("leaving: %s", end.reason)
        if end.layer:
            self._link.send(m.StartFailed(end.layer, end.reason))
        else:
            self._link.send(m.Draining(end.reason))
        if self._pool is not None:
            await self._drain(self._pool, end)
        self._counting.finish()
        self._reports.finish()
        self._link.send(m.Goodbye(end.reason))
        await self._link.close(end.reason)

    async def _drain(self, pool: Pool, end: End) -> None:
        for apart in (self._parcels, self._staging):
            if apart:
                apart.drain()
        pool.tell(self._core.drain)
        hurried = self._loop.create_task(self._ending.hurry.wait())
        idle = self._loop.create_task(self._all_done(pool))
        gone = self._loop.create_task(self._link.lost.wait())
        if end.drain > 0:
            await asyncio.wait({hurried, idle, gone}, timeout=end.drain, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            pool.tell(self._core.abandon, f"its pilot ended: {end.reason}")
            await pool.idle.wait()
            self._counting.finish()
            await self._drop_files()
        for waiting in (hurried, idle, gone):
            waiting.cancel()

    async def _all_done(self, pool: Pool) -> None:
        await pool.idle.wait()
        await self._counting.settle()
        if self._staging:
            await self._staging.idle.wait()
        if self._parcels:
            await self._parcels.idle.wait()
        await self._reports.settle()


@contextlib.asynccontextmanager
async def _pilot(options: opts.Options) -> AsyncIterator[Pilot]:
    with scratch_directory(options.scratch) as scratch:
        yield Pilot(options, scratch)


async def _main(options: opts.Options) -> int:
    async with _pilot(options) as pilot:
        return await pilot.live()


def main() -> int:
    """Entry of ``python -m hpcq.pilot``."""
    options = opts.parse()
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)sZ %(levelname)s %(message)s", datefmt="%FT%T"
    )
    try:
        return asyncio.run(_main(options))
    except OSError as error:
        log.error("the pilot cannot work on %s: %s", socket.gethostname(), error)
        return 1
