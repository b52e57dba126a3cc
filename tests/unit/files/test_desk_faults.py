"""A fault of ours with a task's files ends that task, in words: nobody waits for ever."""

import asyncio
from types import SimpleNamespace

import pytest

from hpcq import messages as m
from hpcq.files import desk as module
from hpcq.files.desk import Desk, Plan
from hpcq.files.sources import Buffer
from hpcq.outcome import Outcome
from hpcq.task import Task


def fault(*_):
    raise ArithmeticError("a fault")


@pytest.fixture
def told():
    return []


def a_desk(told):
    return Desk(lambda submission: told.append("released"), lambda *end: told.append(end), lambda work, *args: None)


def submission(outputs=()):
    plan = Plan(Task("true"), {"in": Buffer(b"x")}, dict(outputs))
    return SimpleNamespace(files=plan, spec=SimpleNamespace(id=1))


def test_in_preparing_its_inputs(told, monkeypatch):
    monkeypatch.setattr(module.digests, "of_bytes", fault)
    desk = a_desk(told)

    async def story():
        desk.admit(submission())
        await desk._prepare(1)
        desk.close()

    asyncio.run(story())
    [(number, outcome, message)] = told
    assert (number, outcome) == (1, Outcome.FILES)
    assert "ArithmeticError: a fault" in message
    assert not desk.held_count


def test_in_storing_its_outputs(told, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_commit", fault)
    desk = a_desk(told)

    async def story():
        desk.admit(submission({"out": str(tmp_path / "out")}))
        landing = await desk.land(1, "p", "out", "file", False)
        landing.complete()
        ended = await desk.settle("p", m.TaskResult(1, "success"))
        desk.close()
        return ended

    ended = asyncio.run(story())
    assert ended.outcome == Outcome.FILES
    assert "ArithmeticError: a fault" in ended.message
    assert not list(tmp_path.iterdir())
