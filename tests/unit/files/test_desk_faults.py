"""A fault of ours with a task's files ends that task, in words: nobody waits for ever."""

import asyncio
from types import SimpleNamespace

import pytest

from hpcq import messages as m
from hpcq.files import desk as module
from hpcq.files.desk import Desk, Plan
from hpcq.files.sources import Buffer, Temp
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


def test_what_a_task_waits_for_is_told(told):
    desk, first = a_desk(told), Task("true").set(outputs={"o": Temp(), "p": Temp()})
    first.id = 7

    async def story():
        plan = Plan(Task("true"), {"a": first.file("o"), "b": first.file("p"), "c": Buffer(b"x")}, {})
        desk.admit(SimpleNamespace(files=plan, spec=SimpleNamespace(id=8)))
        desk.admit(submission())
        assert desk.why_held(8) == "output 'o' of task 7 (true) is not there yet, nor 1 more"
        assert desk.why_held(1) == "its inputs are being read"
        assert [number for number, _ in desk.held()] == [8, 1]
        assert desk.has_inputs(8)
        desk.cancel([1])
        assert desk.why_held(1) is None
        desk.close()

    asyncio.run(story())


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
