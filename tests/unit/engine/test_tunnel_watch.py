"""A pilot's tunnel when the watch over it fails."""

import asyncio
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
