"""What keeps processes running: when to start one again, and what is done then."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.errors import GatewayError
from vpn.gateway.credentials import UNUSED_LIFETIME, Book
from vpn.gateway.ocserv import Event
from vpn.kept import PAUSES, WITHIN, Kept, Restarts, Tally

NOW = 1e9


@given(st.lists(st.floats(0, 30), max_size=40))
def test_pauses_grow_with_the_ends_of_late_and_too_many_are_given_up(gaps):
    restarts, now, ends = Restarts(), 0.0, []
    for gap in gaps:
        now += gap
        ends.append(now)
        of_late = sum(end > now - WITHIN for end in ends)
        assert restarts.after(now) == (PAUSES[of_late - 1] if of_late <= len(PAUSES) else None)
        assert restarts.ends == of_late


class Part:
    """What is kept: ``refusals`` are the starts, counted from 0, that fail."""

    def __init__(self, refusals=()):
        self.refusals = refusals
        self.story = []
        self.ended = None

    async def start(self):
        if len(self.starts) in self.refusals:
            self.story.append("refused")
            raise GatewayError("no port")
        self.story.append("start")
        self.ended = asyncio.get_running_loop().create_future()
        return self.ended

    @property
    def starts(self):
        return [word for word in self.story if word != "close"]

    async def close(self):
        self.story.append("close")


def keep(part, scenario, pauses=(0.0,) * 3):
    """Run a scenario with the part kept; how often it was started again."""
    tally = Tally()

    async def main():
        kept = Kept("a part", part.start, part.close, tally, Restarts(pauses))
        await asyncio.wait_for(scenario(kept), 60)

    asyncio.run(main())
    return tally


async def until(condition):
    while not condition():  # noqa: ASYNC110  (it only lets the other take its turn)
        await asyncio.sleep(0)


def test_what_ends_is_undone_and_started_again():
    part = Part()

    async def scenario(kept):
        await kept.start()
        part.ended.set_result("it was killed")
        await until(lambda: part.starts == ["start"] * 2)
        await kept.running.wait()
        await kept.close()

    tally = keep(part, scenario)
    assert part.story == ["start", "close", "start", "close"]
    assert (tally.count, tally.last) == (1, "it was killed")


def test_a_start_that_is_refused_is_tried_again_and_nothing_runs_meanwhile():
    part = Part(refusals=(1, 2))

    async def scenario(kept):
        await kept.start()
        part.ended.set_result("it was killed")
        await until(lambda: not kept.running.is_set())
        await kept.running.wait()
        await kept.close()

    tally = keep(part, scenario)
    assert part.starts == ["start", "refused", "refused", "start"]
    assert (tally.count, tally.last) == (1, "it was killed")


@pytest.mark.parametrize("refusals", [(), range(1, 99)])
def test_what_ends_again_and_again_is_given_up_with_the_reason(refusals):
    part, reasons = Part(refusals), []

    async def scenario(kept):
        await kept.start()
        while not kept.failed.done():
            if not part.ended.done():
                part.ended.set_result("it was killed")
            await asyncio.sleep(0)
        assert not kept.running.is_set()
        reasons.append(kept.failed.result())
        await kept.close()

    keep(part, scenario)
    why = "it could not be started again: no port" if refusals else "it was killed"
    assert reasons == [f"a part ended 4 times within 60 s: {why}"]
    assert part.story[-1] == "close"


def test_the_first_start_that_is_refused_is_the_callers():
    part = Part(refusals=(0,))

    async def scenario(kept):
        with pytest.raises(GatewayError, match="no port"):
            await kept.start()
        await kept.close()

    keep(part, scenario)
    assert part.story == ["refused", "close"]


def test_closing_it_in_a_pause_starts_nothing():
    part = Part()

    async def scenario(kept):
        await kept.start()
        part.ended.set_result("it was killed")
        await until(lambda: "close" in part.story)
        await kept.close()

    keep(part, scenario, pauses=(3600.0,))
    assert part.starts == ["start"]


def test_a_fault_of_ours_is_a_failure_and_not_a_silence():
    part, reasons = Part(), []

    async def broken():
        raise KeyError("ours")

    async def scenario(kept):
        await kept.start()
        kept._close = broken
        part.ended.set_result("it was killed")
        reasons.append(await kept.failed)

    keep(part, scenario)
    assert reasons == ["a part cannot be kept running: KeyError('ours')"]


@pytest.mark.parametrize("relayed", [True, False])
def test_those_whom_it_served_may_use_their_password_once_more_and_nobody_else(relayed):
    book = Book()
    workers = {"relay": "relay", "ocserv": "11"}
    users = {by: book.issue(by, NOW)[0] for by in (*workers, "nobody")}
    gone = book.issue("gone", NOW)[0]
    for by, worker in workers.items():
        assert book.on_event(Event("connect", users[by], worker, "a"))
    book.on_event(Event("connect", gone, workers["relay" if relayed else "ocserv"], "a"))
    book.on_event(Event("disconnect", gone, workers["relay" if relayed else "ocserv"], "a"))
    book.lost(relayed=relayed, now=NOW + 10)
    served, other = ("relay", "ocserv") if relayed else ("ocserv", "relay")
    states = {pilot.username: pilot.state for pilot in book.pilots({})}
    assert states == {
        users[served]: "restored",
        users[other]: "connected",
        users["nobody"]: "issued",
        gone: "restored",
    }
    assert {name for name, _ in book.passwords()} == {users[served], users["nobody"], gone}
    assert book.deadlines() == [NOW + UNUSED_LIFETIME, NOW + 10 + UNUSED_LIFETIME]
    assert book.on_event(Event("connect", users[served], "12", "a"))  # which spends it again
    assert {name for name, _ in book.passwords()} == {users["nobody"], gone}
