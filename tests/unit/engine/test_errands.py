"""What is done for tasks before and after they run: who is told what, exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from hpcq import messages as m
from hpcq.pilot.errands import Errands, Job, Phase
from hpcq.pilot.lanes import Report


class Walks(Errands[Job]):
    """Fetching and bringing that last until `gates` opens; a task with ``number`` in `faulty` fails."""

    def __init__(self, told: list[Report]) -> None:
        super().__init__(told.append)
        self.gate = asyncio.Event()
        self.ran: list[int] = []
        self.gone: list[int] = []
        self.faulty: set[int] = set()

    def concerns(self, task: m.TaskSpec) -> bool:
        return task.id < 100

    def begin(self, task: m.TaskSpec) -> None:
        job = self.enter(Job(task.id, Phase.BEFORE))
        self.start(job, self._fetch)

    async def _fetch(self, job: Job) -> None:
        await self.gate.wait()
        if job.number in self.faulty:
            raise RuntimeError("broken")
        job.phase = Phase.CORE
        self.ran.append(job.number)

    def holds_back(self, result: m.TaskResult) -> bool:
        job = self._jobs.get(result.id)
        if job is None:
            return False
        job.phase, job.result = Phase.AFTER, result
        self.start(job, self._bring)
        return True

    async def _bring(self, job: Job) -> None:
        await self.gate.wait()
        assert job.result is not None
        self.tell(job.result)
        if job.number in self.faulty:
            raise RuntimeError("broken after it was told")

    def left(self, job: Job) -> None:
        self.gone.append(job.number)


def spec(number: int) -> m.TaskSpec:
    return m.TaskSpec(number, b"", b"true")


def success(number: int) -> m.TaskResult:
    return m.TaskResult(number, "success")


def play(scenario: Callable[[Walks, list[Report]], Awaitable[None]]) -> list[Report]:
    told: list[Report] = []

    async def whole() -> None:
        await scenario(Walks(told), told)

    asyncio.run(whole())
    return told


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def outcomes(told: list[Report]) -> list[tuple[int, str]]:
    return [(result.id, result.outcome) for report in told for result in report.results]


def test_only_what_concerns_it_is_kept_and_runs_when_fetched():
    async def scenario(walks: Walks, told: list[Report]) -> None:
        rest = walks.take(m.Run([], [spec(1), spec(100)], []))
        assert [task.id for task in rest.tasks] == [100]
        assert not walks.idle.is_set()
        walks.gate.set()
        await turns()
        assert walks.ran == [1]
        assert walks.ended(Report([], [success(1), success(100)], [])).results == [success(100)]
        await turns()
        assert walks.idle.is_set()

    assert outcomes(play(scenario)) == [(1, "success")]


def test_what_the_core_says_besides_results_is_passed_on():
    """A manager that asks for tasks back waits for the answer, even where none can be given."""

    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.take(m.Run([], [spec(1)], []))
        report = walks.ended(Report([7], [], [8], answers=True))
        assert (report.started, report.returned, report.answers) == ([7], [8], True)
        await walks.abandon()

    play(scenario)


@pytest.mark.parametrize("how", ["withdraw", "drain", "abandon"])
def test_what_has_not_begun_is_handed_back_once(how):
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.take(m.Run([], [spec(1), spec(2)], []))
        await turns()
        if how == "withdraw":
            assert walks.withdraw([1, 2, 3]) == [3]
        elif how == "drain":
            walks.drain()
            walks.drain()
        await walks.abandon()
        assert walks.idle.is_set()
        assert sorted(walks.gone) == [1, 2]

    told = play(scenario)
    assert sorted(number for report in told for number in report.returned) == [1, 2]
    assert outcomes(told) == []


def test_a_cancelled_task_whose_outputs_are_brought_ends_at_once():
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.take(m.Run([], [spec(1)], []))
        walks.gate.set()
        await turns()
        walks.gate.clear()
        walks.ended(Report([], [success(1)], []))
        await turns()
        assert walks.withdraw([1], cancel=True) == []
        walks.gate.set()
        await turns()

    assert outcomes(play(scenario)) == [(1, "cancelled")]


def test_what_was_being_brought_when_the_pilot_ends_is_lost():
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.take(m.Run([], [spec(1)], []))
        walks.gate.set()
        await turns()
        walks.gate.clear()
        walks.ended(Report([], [success(1)], []))
        await walks.abandon()

    (result,) = [result for report in play(scenario) for result in report.results]
    assert (result.outcome, result.message) == ("lost", "what it left could not be sent before its pilot ended")


def test_a_fault_of_ours_ends_the_task(caplog):
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.faulty = {1}
        walks.take(m.Run([], [spec(1)], []))
        walks.gate.set()
        await turns()
        assert walks.idle.is_set()

    (result,) = [result for report in play(scenario) for result in report.results]
    assert result.outcome == "lost"
    assert "RuntimeError: broken" in result.message


def test_a_fault_after_it_was_told_tells_it_no_second_time(caplog):
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.take(m.Run([], [spec(1)], []))
        walks.gate.set()
        await turns()
        walks.faulty = {1}
        walks.ended(Report([], [success(1)], []))
        await turns()

    assert outcomes(play(scenario)) == [(1, "success")]


def test_a_draining_pilot_takes_nothing():
    async def scenario(walks: Walks, told: list[Report]) -> None:
        walks.drain()
        walks.take(m.Run([], [spec(1)], []))
        assert walks.idle.is_set()

    (report,) = play(scenario)
    assert report.returned == [1]
