"""The pilot's tunnel: brought up, watched, made anew when it breaks.

::

    open --> UP --lost, or judged to be--> DOWN --made anew, with back-off--> UP (another generation)
                                             +-- ``patience`` seconds have passed --> given up: the pilot ends

A *generation* is one session of `vpn` with its credential. A broken tunnel costs only what needs it: the old session's
namespace lives on without a way out, and with it tasks that are busy computing, until the last of its processes has
ended; new processes start in the newest. When the namespace itself is gone (its holder was killed), so is all in it.
Each attempt asks the manager for a credential, so none is made while there is no manager; with several gateways it is
one of another gateway. The targets of ``--require``
must answer in every generation; and they are asked again when a task that needs the tunnel has failed (`judge`), since
a task notices a way that leads nowhere before the tunnel does; and now and then while nothing comes through the tunnel:
its own signs of life tell of the gateway, not of what lies beyond it. Found so, nobody had need of the way yet: while
tasks are here, which may never need it, it is not given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from vpn import PROBE_INTERVAL, Credential, Pulse, Session, TunnelConfig, TunnelError, open_session, until_silent

log = logging.getLogger("hpcq.pilot")

BACKOFF = (0.0, 1.0, 2.0, 4.0, 5.0)
"""Seconds before each attempt to make a broken tunnel anew, the last for all that follow: work is to go on within 10 s
of the end of whatever broke it."""

REBUILD = 3
"""Of so many attempts, one is with a new tunnel while the old one still says that it is up."""

RECONNECT_TIMEOUT = 10
"""Seconds a mode may try by itself to mend a broken tunnel: after that a new one is quicker,"""

ELSEWHERE = 3
"""and sooner where there is another gateway."""

PROVE_TIMEOUT = 20.0
"""Seconds each target of ``--require`` has to answer when the tunnel is new."""

JUDGED = 1.0
"""Seconds between two times that ``--require`` targets are asked: tasks that fail one after the other wait for the
next. What was answered before a task failed says nothing of it.
"""

JUDGE_TIMEOUT = 10.0
"""Seconds they have to answer."""

ASKED_EVERY = 4
"""Of so many of the tunnel's own probes, one is of the targets of ``--require``, while nothing comes through it;"""

ASKED_AGAIN = 10.0
"""they must have been silent for so many seconds: one probe that took too long on a busy node is no reason;"""

ASKED_BYTES = 1 << 16
"""and their answers are not so long that they could be taken for other traffic."""

SELDOM = 60.0
"""Seconds between attempts when ``patience`` has passed, and it is not given up all the same."""


class Generation:
    """One session, open until it is closed: at once, or when what runs in it has ended. ``lost`` resolves when it broke
    or was found to lead nowhere.
    """

    def __init__(self, session: Session, stack: AsyncExitStack) -> None:
        self.session = session
        self.lost: asyncio.Future[TunnelError] = asyncio.get_running_loop().create_future()
        self.found_silent = False
        """Whether its targets did not answer, though no task had complained."""
        self._stack = stack
        self._running = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        session.lost.add_done_callback(lambda lost: None if lost.cancelled() else self.lose(lost.result()))

    def revive(self) -> None:
        """It leads somewhere again."""
        self.lost = asyncio.get_running_loop().create_future()
        self.found_silent = False
        if self.session.lost.done():  # in between
            self.lose(self.session.lost.result())

    def lose(self, error: TunnelError) -> None:
        """It is of no use any more; the first reason counts."""
        if not self.lost.done():
            self.lost.set_result(error)

    async def spawn(self, argv: Sequence[str], **options: Any) -> Any:
        """As `Session.spawn`; the process is counted."""
        process = await self.session.spawn(argv, **options)
        self._running += 1
        self._quiet.clear()
        process.ended.add_done_callback(self._one_less)
        return process

    def _one_less(self, _: object) -> None:
        self._running -= 1
        if not self._running:
            self._quiet.set()

    async def close(self) -> None:
        """End it with everything in it."""
        await self._stack.aclose()

    async def close_when_quiet(self) -> None:
        """End it when nothing runs in it any more."""
        await self._quiet.wait()
        await self.close()


class Tunnel:
    """The way of tasks to the outside. ``credential`` gets one for each attempt (None where the mode needs none), and
    ``given_back`` hears of each whose session is closed. ``on_down(error, inside)`` and ``on_up(session)`` are called
    when it breaks (``inside``: whether processes in it live on, and new ones can start) and when it is back;
    ``on_given_up(error)`` when it was not back after ``patience`` seconds. ``on_made(session, stack)`` is waited for
    with each new session, before anything runs in it; ``stack`` unwinds when it ends.
    ``settings`` is what else of `TunnelConfig` is asked for. ``gateways``: how many there are.
    """

    def __init__(
        self,
        mode: Any,
        require: Sequence[str],
        credential: Callable[[], Awaitable[Credential | None]],
        given_back: Callable[[Credential], None],
        patience: float,
        *,
        settings: Mapping[str, Any] | None = None,
        gateways: int = 1,
    ) -> None:
        self._mode = mode
        self._require = list(require)
        self._credential = credential
        self._given_back = given_back
        self._patience = patience
        self._settings = settings or {}
        self._gateways = gateways
        self._loop = asyncio.get_running_loop()
        self._now: Generation | None = None
        self._told: Generation | None = None
        self._watching: asyncio.Task[None] | None = None
        self._old: dict[Generation, asyncio.Task[None]] = {}
        self._judged_at = -JUDGED
        self._judging: asyncio.Task[None] | None = None
        self.on_down: Callable[[TunnelError, bool], None] = lambda _error, _inside: None
        self.on_up: Callable[[Session], None] = lambda _session: None
        self.on_given_up: Callable[[TunnelError], None] = lambda _error: None
        self.on_made: Callable[[Session, AsyncExitStack], Awaitable[None]] | None = None
        self.received: Callable[[], int | None] = lambda: None
        """The bytes that have come through the tunnel so far; None where they are not counted."""
        self.is_busy: Callable[[], bool] = lambda: False
        """Whether tasks are here."""

    @property
    def session(self) -> Session:
        """The newest session; only after `open`."""
        assert self._now is not None
        return self._now.session

    async def open(self) -> None:
        """Bring it up for the first time, at any of the gateways.

        Raises:
            TunnelError: names the layer that failed, at the last of them; nothing is left open.
        """
        for _ in range(self._gateways - 1):
            try:
                self._now = await self._make()
            except TunnelError as error:
                log.warning("the tunnel did not come up, trying another gateway: %s", error)
            else:
                return
        self._now = await self._make()

    def watch(self) -> None:
        """From now on, make it anew when it breaks."""
        self._watching = self._loop.create_task(self._watch())
        self._watching.add_done_callback(self._watched)

    def _watched(self, watching: asyncio.Task[None]) -> None:
        """A fault in it must not leave us without a tunnel for ever, waiting for tasks that need one."""
        if not watching.cancelled() and (error := watching.exception()):
            log.error("the tunnel cannot be watched any more", exc_info=error)
            self.on_given_up(TunnelError("tunnel", f"it could not be watched: {type(error).__name__}: {error}"))

    async def spawn(self, argv: Sequence[str], **options: Any) -> Any:
        """Start a program inside the newest session; see `Session.spawn`."""
        assert self._now is not None
        return await self._now.spawn(argv, **options)

    def notice(self) -> None:
        """Tell of a break that is known but not told yet: before anybody judges how a process inside ended."""
        now = self._now
        if now is None or now is self._told or self._ends_us(now):
            return
        if now.session.lost.done():
            now.lose(now.session.lost.result())  # what it calls back for that comes after us
        if now.lost.done():
            self._told = now
            error = now.lost.result()
            log.warning("the tunnel is down: %s", error)
            self.on_down(error, now.session.can_spawn)

    async def judge(self) -> str:
        """Why the tunnel leads nowhere, which is then told; empty if its targets answer, or there are none to ask."""
        now = self._now
        if now is None or not self._require or now.lost.done():
            return str(now.lost.result()) if now is not None and now.lost.done() else ""
        if self._judging is None:
            self._judging = self._loop.create_task(self._ask(now))
        await asyncio.wait([self._judging])
        return str(now.lost.result()) if now.lost.done() else ""

    async def _ask(self, generation: Generation) -> None:
        try:
            await asyncio.sleep(self._judged_at + JUDGED - self._loop.time())
            self._judged_at = self._loop.time()
            if not generation.lost.done():
                await self._prove(generation.session, JUDGE_TIMEOUT)
            for line in generation.session.troubles():
                log.warning("%s", line)
        except TunnelError as error:
            generation.lose(error)
            self.notice()
        except OSError as error:  # ours, such as too many open files: it says nothing of the tunnel
            log.warning("the targets of --require could not be asked: %s", error)
        finally:
            self._judging = None

    def _ends_us(self, generation: Generation) -> bool:
        """Without a tunnel it is our own helper that was killed: nothing outside will be better later."""
        return self._mode == "none" and generation.session.lost.done()

    async def close(self) -> None:
        """End every session with everything in it."""
        tasks = [task for task in (self._watching, self._judging, *self._old.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for generation in [*self._old, *([self._now] if self._now else [])]:
            await generation.close()
        self._old.clear()
        self._now = None

    async def _make(self) -> Generation:
        credential = await self._credential()
        async with AsyncExitStack() as stack:
            if credential is not None:
                stack.callback(self._given_back, credential)
            patience = RECONNECT_TIMEOUT if self._gateways == 1 else ELSEWHERE
            config = TunnelConfig(self._mode, credential, reconnect_timeout=patience, **self._settings)
            session = await stack.enter_async_context(open_session(config))
            await self._prove(session)
            if self.on_made is not None:
                await self.on_made(session, stack)
            return Generation(session, stack.pop_all())

    async def _prove(self, session: Session, timeout: float = PROVE_TIMEOUT) -> None:
        if self._require:
            for result in await session.probe(self._require, timeout):
                if not result.ok:
                    raise TunnelError(result.layer, f"{result.target}: {result.message}")

    async def _watch(self) -> None:
        while True:
            assert self._now is not None
            broken = self._now
            await self._until_lost(broken)
            if self._ends_us(broken):
                self.on_given_up(broken.lost.result())
                return
            self.notice()
            again = await self._make_anew(broken)
            if again is None:
                return
            self._now, self._told = again, None
            if again is not broken:
                self._retire(broken)
            log.info("the tunnel is up again")
            self.on_up(self._now.session)

    async def _until_lost(self, generation: Generation) -> None:
        """Ask its targets meanwhile, now and then."""
        asking = self._loop.create_task(self._ask_when_quiet(generation))
        asking.add_done_callback(_tell_fault)
        try:
            await asyncio.wait([generation.lost])
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _ask_when_quiet(self, generation: Generation) -> None:
        if not self._require or self._mode == "none":
            return

        async def ask() -> None:
            try:
                await self._prove(generation.session, JUDGE_TIMEOUT)
            except OSError as error:
                log.warning("the targets of --require could not be asked: %s", error)

        interval = ASKED_EVERY * self._settings.get("probe_interval", PROBE_INTERVAL)
        pulse = Pulse(interval, ASKED_AGAIN, now=self._loop.time(), answer=ASKED_BYTES)
        error = await until_silent(pulse, ask, self.received)
        generation.found_silent = not generation.lost.done()
        generation.lose(error)

    def _retire(self, generation: Generation) -> None:
        task = self._loop.create_task(generation.close_when_quiet())
        self._old[generation] = task
        task.add_done_callback(lambda done: done.cancelled() or self._old.pop(generation, None))

    def _is_needed(self, broken: Generation) -> bool:
        """Whether tasks may go on in it: nobody but us has missed what is outside."""
        return broken.found_silent and not broken.session.lost.done() and self.is_busy()

    async def _make_anew(self, broken: Generation) -> Generation | None:
        """The next generation, or the same when it leads somewhere again, or None when it was given up."""
        error = broken.lost.result()
        late = deadline = self._loop.time() + self._patience
        attempt = 0
        while self._loop.time() < deadline or self._is_needed(broken):
            await asyncio.sleep(BACKOFF[min(attempt, len(BACKOFF) - 1)] if self._loop.time() < late else SELDOM)
            attempt += 1
            if self._is_needed(broken):
                deadline = self._loop.time() + max(self._patience, 2 * SELDOM)
            try:
                if attempt % REBUILD and not broken.session.lost.done():  # it may be its targets that were away
                    await self._prove(broken.session, JUDGE_TIMEOUT)
                    broken.revive()
                    return broken
                return await self._make()
            except TunnelError as again:
                error = again
            except OSError as again:
                error = TunnelError("tunnel", str(again))
            log.warning("the tunnel could not be made anew: %s", error)
        self.on_given_up(error)
        return None


def _tell_fault(asking: asyncio.Task[None]) -> None:
    """A fault in what only looks ends nothing else."""
    if not asking.cancelled() and (error := asking.exception()):
        log.error("the targets of --require are not asked any more; this is a fault of hpcq", exc_info=error)
