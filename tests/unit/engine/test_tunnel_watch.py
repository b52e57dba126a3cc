"""A pilot's tunnel when the watch over it fails."""

import asyncio
import itertools
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from hpcq.pilot.tunnel import Generation, Tunnel
from vpn import TunnelError


def watched(error):
    """What is told when making a broken tunnel anew raises ``error``."""

    async def story():
        given_up = asyncio.get_running_loop().create_future()

        async def credential():
            raise error

        tunnel = Tunnel("auto", [], credential, print, patience=0.001)
        session = SimpleNamespace(lost=asyncio.get_running_loop().create_future(), can_spawn=True)
        tunnel._now = Generation(session, AsyncExitStack())
        tunnel.on_given_up = given_up.set_result
        tunnel.watch()
        session.lost.set_result(TunnelError("tunnel", "gone"))
        async with asyncio.timeout(60):
            told = await given_up
        await tunnel.close()
        return str(told)

    return asyncio.run(story())


@pytest.mark.parametrize(
    ("error", "words"), [(TunnelError("gateway", "closed"), "closed"), (ValueError("a fault"), "ValueError: a fault")]
)
def test_the_pilot_is_told_whatever_happens(error, words):
    assert words in watched(error)


def test_each_failure_has_the_targets_asked_anew(monkeypatch):
    """What they answered before a task failed says nothing of it."""
    monkeypatch.setattr("hpcq.pilot.tunnel.JUDGED", 0.01)
    answers = [True, False]

    async def probe(targets, _timeout):
        return [SimpleNamespace(ok=answers.pop(0), layer="xrootd", target=targets[0], message="no answer")]

    async def story():
        tunnel = Tunnel("auto", ["root://se:1094"], lambda: None, print, patience=0.001)
        lost = asyncio.get_running_loop().create_future()
        tunnel._now = Generation(SimpleNamespace(lost=lost, probe=probe, can_spawn=True), AsyncExitStack())
        told = [await tunnel.judge(), await tunnel.judge(), await tunnel.judge()]
        await tunnel.close()
        return told

    assert asyncio.run(story()) == ["", *["xrootd: root://se:1094: no answer"] * 2]
    assert not answers


class Silent:
    """A session whose targets do not answer, unless it is made to; counts how often they were asked."""

    def __init__(self):
        self.lost = asyncio.get_running_loop().create_future()
        self.can_spawn, self.answers, self.asked, self.often = True, False, 0, asyncio.Event()

    async def probe(self, targets, _timeout):
        self.asked += 1
        if self.asked == 20:
            self.often.set()
        return [SimpleNamespace(ok=self.answers, layer="xrootd", target=targets[0], message="no answer")]


class Watched:
    """A tunnel over a silent session, and what was told."""

    def __init__(self, patience, mode="relay", **settings):
        async def credential():
            raise TunnelError("gateway", "no credential")

        self.told = asyncio.Queue()
        self.session = Silent()
        self.tunnel = Tunnel(mode, ["root://se:1094"], credential, print, patience, settings=settings)
        self.tunnel._now = Generation(self.session, AsyncExitStack())
        self.tunnel.on_down = lambda error, inside: self.told.put_nowait(("down", str(error), inside))
        self.tunnel.on_up = lambda _: self.told.put_nowait(("up",))
        self.tunnel.on_given_up = lambda error: self.told.put_nowait(("given up", str(error)))

    async def next(self):
        async with asyncio.timeout(60):
            return await self.told.get()


@pytest.fixture
def often(monkeypatch):
    """Asked often, and made anew without a pause."""
    monkeypatch.setattr("hpcq.pilot.tunnel.ASKED_AGAIN", 0.0)
    monkeypatch.setattr("hpcq.pilot.tunnel.BACKOFF", (0.0, 0.001))
    monkeypatch.setattr("hpcq.pilot.tunnel.SELDOM", 0.001)
    return {"probe_interval": 0.001}


DOWN = ("down", "xrootd: root://se:1094: no answer", True)


def test_targets_are_asked_while_nothing_comes_through_the_tunnel(often):
    """No task has failed: the tunnel is down all the same, and up again when they answer."""

    async def story():
        watched = Watched(60, **often)
        watched.tunnel.watch()
        assert await watched.next() == DOWN
        watched.session.answers = True
        assert await watched.next() == ("up",)
        watched.session.answers = False
        assert await watched.next() == DOWN
        await watched.tunnel.close()

    asyncio.run(story())


def test_while_something_comes_they_are_not_asked(often):
    async def story():
        looked, received = asyncio.Event(), itertools.count(0, 1 << 20)

        def count():
            so_far = next(received)
            if so_far > 5 << 20:
                looked.set()
            return so_far

        watched = Watched(60, **often)
        watched.tunnel.received = count
        watched.tunnel.watch()
        async with asyncio.timeout(60):
            await looked.wait()
        assert not watched.session.asked
        await watched.tunnel.close()

    asyncio.run(story())


def test_what_nobody_needed_is_not_given_up_while_tasks_are_here(often):
    async def story():
        watched, busy = Watched(0.001, **often), True
        watched.tunnel.is_busy = lambda: busy
        watched.tunnel.watch()
        assert await watched.next() == DOWN
        async with asyncio.timeout(60):
            await watched.session.often.wait()  # at least a millisecond for each: many times its patience
        assert watched.told.empty()
        busy = False
        assert (await watched.next())[0] == "given up"
        await watched.tunnel.close()

    asyncio.run(story())


def test_the_tunnels_own_end_is_given_up_though_tasks_are_here(often):
    async def story():
        watched = Watched(0.001, **often)
        watched.tunnel.is_busy = lambda: True
        watched.tunnel.watch()
        assert await watched.next() == DOWN
        watched.session.lost.set_result(TunnelError("tunnel", "gone"))
        assert (await watched.next())[0] == "given up"
        await watched.tunnel.close()

    asyncio.run(story())
