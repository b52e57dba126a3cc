"""When connections are looked at, which results wait for that, and what is told; the kernel is played by the test."""

import asyncio
import socket
from contextlib import AsyncExitStack

import pytest

from hpcq import messages as m
from hpcq.pilot import traffic, watch
from hpcq.pilot.lanes import Report
from hpcq.pilot.sockdiag import Flow
from hpcq.pilot.traffic import Counting
from hpcq.pilot.watch import Place
from vpn import Diagnosis, TunnelError

DEADLINE = 60.0


class Session:
    """A session whose namespace can be asked, or not."""

    def __init__(self, answer=2) -> None:
        self.answer = answer
        self.opened = []

    async def diagnose(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        pairs = [socket.socketpair() for _ in range(self.answer)]
        self.opened += [one for pair in pairs for one in pair]
        return Diagnosis([pair[0] for pair in pairs])


class Kernel:
    """What there is to see, how often it was looked at, and what is told unasked."""

    def __init__(self) -> None:
        self.flows, self.ended, self.owners = [], [], {}
        self.looks = 0
        self.error = None

    def dump(self, _asking, _gates):
        self.looks += 1
        if self.error is not None:
            raise self.error
        return list(self.flows)

    def ends(self, _told, _gates):
        ended, self.ended = self.ended, []
        return ended


class Pilot:
    """Counting with everything round it."""

    def __init__(self) -> None:
        self.places, self.results, self.told = [], [], []
        self.news = asyncio.Event()
        self.counting = Counting(lambda: self.places, self._release, self._tell)
        self.stack = AsyncExitStack()

    def _release(self, report):
        self.results += report.results
        self.news.set()

    def _tell(self, message):
        self.told.append(message)
        self.news.set()

    def runs(self, lane, task):
        self.places = [one for one in self.places if one.lane != lane]
        self.places.append(Place(lane, task, asyncio.get_running_loop().time() - 1, 0))
        self.counting.stir()

    def ends(self, lane, task, seconds=0.5):
        self.runs(lane, 0)
        self.counting.ending(lane, task, seconds)
        left = self.counting.ended(Report([], [m.TaskResult(task, "success", seconds=seconds)], []))
        self.results += left.results

    async def until(self, condition):
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def result(self, task):
        await self.until(lambda: any(one.id == task for one in self.results))
        return next(one for one in self.results if one.id == task)


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(traffic, "REPORT", 0.0)
    monkeypatch.setattr(traffic, "IDLE", 0.0)
    monkeypatch.setattr(watch.sockdiag, "dump", kernel.dump)
    monkeypatch.setattr(watch.sockdiag, "ends", kernel.ends)
    monkeypatch.setattr(watch.sockdiag, "owners", lambda wanted, trees: kernel.owners)
    return kernel


def play(scenario, session=None):
    async def whole():
        pilot, found = Pilot(), session or Session()
        try:
            async with pilot.stack:
                await pilot.counting.watch(found, pilot.stack)
                await scenario(pilot)
            await pilot.counting.close()
        finally:
            for one in found.opened[1::2]:
                one.close()
        assert all(one.fileno() < 0 for one in found.opened), "a namespace is kept alive"

    asyncio.run(whole())


def test_a_result_waits_for_a_look_and_says_what_was_seen(kernel):
    async def scenario(pilot):
        pilot.runs(1, 10)
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        pilot.ends(1, 10)
        assert not pilot.results
        result = await pilot.result(10)
        assert (result.sent, result.received) == (5, 50)
        await pilot.counting.settle()
        await pilot.until(lambda: pilot.told[-1:] == [m.Traffic(5, 50, 0)])

    play(scenario)


def test_short_tasks_do_not_wait_and_are_told_nothing(kernel):
    async def scenario(pilot):
        before = kernel.looks
        for task in range(100):
            pilot.ends(1, task, seconds=0.01)
        assert [(one.sent, one.received) for one in pilot.results] == [(None, None)] * 100
        assert kernel.looks == before

    play(scenario)


def test_what_short_tasks_carried_is_in_the_totals_though_nothing_runs(kernel):
    async def scenario(pilot):
        pilot.ends(1, 10, seconds=0.01)
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}  # which its runner keeps
        await pilot.until(lambda: bool(pilot.told) and pilot.told[-1].received == 50)

    play(scenario)


def test_a_connection_that_ends_when_nothing_runs_is_in_the_totals(kernel):
    async def scenario(pilot):
        await pilot.until(lambda: pilot.counting._asleep or pilot.told)
        kernel.ended = [Flow(7, 0, 9, 90)]
        pilot.counting._watches[0].listen()
        await pilot.until(lambda: pilot.told[-1:] and pilot.told[-1].received == 90)

    play(scenario)


def test_short_tasks_of_a_runner_that_keeps_a_connection_are_told_theirs(kernel):
    async def scenario(pilot):
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        pilot.ends(1, 10)
        await pilot.result(10)
        kernel.flows = [Flow(7, 70, 6, 80)]
        pilot.ends(1, 11, seconds=0.01)
        result = await pilot.result(11)
        assert (result.sent, result.received) == (1, 30)

    play(scenario)


def test_the_last_bytes_of_a_connection_are_waited_for(kernel):
    async def scenario(pilot):
        pilot.runs(1, 10)
        pilot.runs(2, 20)
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        await pilot.until(lambda: pilot.told[-1:] == [m.Traffic(5, 50, 0)])
        kernel.flows = []
        kernel.ended = [Flow(7, 0, 9, 90)]
        pilot.ends(1, 10)
        result = await pilot.result(10)
        assert (result.sent, result.received) == (9, 90)

    play(scenario)


def test_a_word_of_the_kernel_that_never_comes_is_not_waited_for_forever(kernel, monkeypatch):
    monkeypatch.setattr(traffic, "PATIENCE", 0.05)

    async def scenario(pilot):
        pilot.runs(1, 10)
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        await pilot.until(lambda: pilot.told[-1:] == [m.Traffic(5, 50, 0)])
        kernel.flows = []
        pilot.ends(1, 10)
        result = await pilot.result(10)
        assert (result.sent, result.received) == (5, 50)

    play(scenario)


def test_with_several_at_work_a_connection_that_was_never_seen_is_the_pilots(kernel):
    async def scenario(pilot):
        pilot.runs(1, 10)
        pilot.runs(2, 20)
        kernel.ended = [Flow(7, 0, 5, 50)]
        pilot.ends(1, 10)
        assert (await pilot.result(10)).received is None
        await pilot.until(lambda: pilot.told[-1:] == [m.Traffic(5, 50, 55)])

    play(scenario)


def test_what_the_pilot_itself_fetches_is_not_taken_for_a_tasks(kernel):
    async def scenario(pilot):
        class Process:
            ended = asyncio.get_running_loop().create_future()

        async def spawn(*_argv, **_options):
            return Process

        assert await pilot.counting.run_errand(spawn, ["fetch"], cwd=".") is Process
        pilot.runs(1, 10)
        kernel.ended = [Flow(7, 0, 5, 50)]
        Process.ended.set_result(0)
        pilot.ends(1, 10)
        assert (await pilot.result(10)).received is None

    play(scenario)


def test_nothing_is_looked_at_while_nothing_runs(kernel):
    async def scenario(pilot):
        before = kernel.looks
        for _ in range(100):
            pilot.counting.stir()
            await asyncio.sleep(0)
        assert kernel.looks == before
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        pilot.runs(1, 10)
        await pilot.until(lambda: pilot.told[-1:] == [m.Traffic(5, 50, 0)])

    play(scenario)


def test_the_end_lets_all_results_go(kernel):
    async def scenario(pilot):
        kernel.flows, kernel.owners = [Flow(7, 70, 5, 50)], {70: 1}
        pilot.ends(1, 10)
        pilot.ends(2, 20)
        pilot.counting.finish()
        assert {one.id: one.received for one in pilot.results} == {10: None, 20: None}
        await pilot.counting.settle()

    play(scenario)


def test_another_manager_is_told_the_totals_again(kernel):
    async def scenario(pilot):
        pilot.counting.present()
        pilot.counting.present()
        assert pilot.told == [m.Traffic(0, 0, 0)] * 2

    play(scenario)


@pytest.mark.parametrize("answer", [0, OSError(13, "no"), TunnelError("tunnel", "the holder is gone")])
def test_without_a_namespace_to_ask_nothing_is_told(kernel, answer):
    async def scenario(pilot):
        assert not pilot.counting.active
        pilot.counting.present()
        assert not pilot.told

    play(scenario, Session(answer))


def test_a_kernel_that_does_not_tell_costs_figures_only(kernel):
    async def scenario(pilot):
        assert pilot.counting.active
        kernel.error = FileNotFoundError(2, "no such thing")
        pilot.ends(1, 10)
        assert (await pilot.result(10)).outcome == "success"
        assert not pilot.counting.active

    play(scenario)
    kernel.error = FileNotFoundError(2, "no such thing")

    async def from_the_start(pilot):
        assert not pilot.counting.active

    play(from_the_start)


def test_a_fault_of_ours_costs_figures_only(kernel, monkeypatch, caplog):
    async def scenario(pilot):
        monkeypatch.setattr(watch.Table, "look", None)
        pilot.ends(1, 10)
        result = await pilot.result(10)
        assert (result.sent, pilot.counting.active) == (None, False)

    play(scenario)
    assert "fault of hpcq" in caplog.text
