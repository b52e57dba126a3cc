"""What the pilot tells of its tasks: what waits, for what, and what it becomes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hpcq import messages as m
from hpcq.pilot import reports
from hpcq.pilot.core import Core
from hpcq.pilot.lanes import Report
from hpcq.pilot.reports import Reports

KILLED = 143
JOB_ENDS = "the batch system ended its job"


class Place:
    """Reports with everything round it: ``verdict`` is the tunnel's, or raised; ``sent`` what the manager has heard."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.core = SimpleNamespace(suspects=set(), job_ends="")
        self.core.excused = lambda result: Core.excused(self.core, result)  # type: ignore[arg-type]
        self.verdict: str | Exception = ""
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        link = SimpleNamespace(send=lambda message, now=False: self.sent.append(message))
        self.reports = Reports(link, self.core, self._judge)  # type: ignore[arg-type]

    async def _judge(self) -> str:
        self.asked.set()
        await self.answer.wait()
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict

    def ends(self, number: int, exit_code: int, suspect: bool = False) -> None:
        if suspect:
            self.core.suspects.add(number)
        self.reports.add(Report([], [m.TaskResult(number, "exit_code", exit_code=exit_code)], []))

    def heard(self) -> dict[int, str]:
        found = [result for message in self.sent for result in message.results]
        assert len({result.id for result in found}) == len(found), "told twice"
        return {result.id: result.outcome for result in found}


def play(scenario: Callable[[Place], Awaitable[None]]) -> None:
    async def whole() -> None:
        await scenario(Place())

    asyncio.run(whole())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(reports, "NEWS_TIMEOUT", 0)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("news", "outcome"), [(JOB_ENDS, "lost"), ("", "exit_code")])
def test_a_command_that_a_signal_ended_waits_for_news_of_the_job(news, outcome):
    async def scenario(place: Place) -> None:
        place.ends(1, KILLED)
        place.ends(2, 1)
        assert place.heard() == {}
        place.core.job_ends = news
        await turns()
        assert place.heard() == {1: outcome, 2: "exit_code"}

    play(scenario)


@pytest.mark.parametrize(("verdict", "outcome"), [("no way out", "network"), ("", "exit_code")])
def test_a_task_that_needs_the_tunnel_waits_for_its_verdict(verdict, outcome):
    async def scenario(place: Place) -> None:
        place.verdict = verdict
        place.ends(1, 1, suspect=True)
        await place.asked.wait()
        assert place.heard() == {}
        place.answer.set()
        await turns()
        assert place.heard() == {1: outcome}

    play(scenario)


@pytest.mark.parametrize(("news", "outcome"), [(JOB_ENDS, "lost"), ("", "exit_code")])
def test_a_tunnel_that_leads_somewhere_does_not_end_the_doubt(news, outcome):
    async def scenario(place: Place) -> None:
        place.ends(1, KILLED, suspect=True)
        place.answer.set()
        await place.asked.wait()
        place.core.job_ends = news
        await place.reports.settle()
        await turns()
        assert place.heard() == {1: outcome}

    play(scenario)


def test_a_verdict_that_fails_costs_no_result(caplog):
    async def scenario(place: Place) -> None:
        place.verdict = RuntimeError("broken")
        place.answer.set()
        for number in (1, 2):
            place.ends(number, 1, suspect=True)
            await place.reports.settle()
            await turns()
        assert place.heard() == {1: "exit_code", 2: "exit_code"}

    play(scenario)


@pytest.mark.parametrize("exit_code", [1, KILLED])
def test_last_words_tell_everything_once(exit_code, monkeypatch):
    monkeypatch.setattr(reports, "NEWS_TIMEOUT", 3600)

    async def scenario(place: Place) -> None:
        place.ends(1, exit_code)
        place.ends(2, exit_code, suspect=True)
        await place.asked.wait()
        place.core.job_ends = JOB_ENDS
        place.reports.finish()
        place.answer.set()
        await turns()
        outcome = "lost" if exit_code == KILLED else "exit_code"
        assert place.heard() == {1: outcome, 2: outcome}

    play(scenario)


def test_what_nobody_is_there_to_hear_is_dropped(monkeypatch):
    monkeypatch.setattr(reports, "NEWS_TIMEOUT", 3600)

    async def scenario(place: Place) -> None:
        place.ends(1, KILLED)
        place.ends(2, 1, suspect=True)
        await place.asked.wait()
        place.reports.drop()
        place.answer.set()
        place.ends(2, 1)
        await turns()
        assert place.heard() == {2: "exit_code"}

    play(scenario)


# --- beginnings -------------------------------------------------------------------------------------------------------


def test_a_beginning_is_told_with_the_result_that_follows_soon(monkeypatch):
    monkeypatch.setattr(reports, "SOON", 3600)

    async def scenario(place: Place) -> None:
        place.reports.add(Report([1, 2], [], []))
        await turns()
        assert place.sent == []
        place.ends(1, 1)
        await turns()
        assert [(message.started, [one.id for one in message.results]) for message in place.sent] == [([2], [1])]

    play(scenario)


def test_a_beginning_that_nothing_follows_is_told_by_itself(monkeypatch):
    monkeypatch.setattr(reports, "SOON", 0)

    async def scenario(place: Place) -> None:
        place.reports.add(Report([1], [], []))
        await turns()
        assert place.sent == [m.Update([1], [])]

    play(scenario)


def test_a_beginning_that_must_be_known_is_told_at_once(monkeypatch):
    monkeypatch.setattr(reports, "SOON", 3600)

    async def scenario(place: Place) -> None:
        place.reports.add(Report([1], [], []))
        place.reports.add(Report([2], [], [], announce=True))
        await turns()
        assert place.sent == [m.Update([1, 2], [])]

    play(scenario)


def test_a_task_that_comes_back_was_told_to_have_begun_before(monkeypatch):
    monkeypatch.setattr(reports, "SOON", 3600)

    async def scenario(place: Place) -> None:
        place.reports.add(Report([1], [], []))
        place.reports.add(Report([], [], [1]))
        assert place.sent == [m.Update([1], []), m.Returned([1])]
        await turns()
        assert len(place.sent) == 2

    play(scenario)
