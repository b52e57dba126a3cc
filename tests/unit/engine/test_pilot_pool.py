"""What the pool does between reading from a runner and telling the core; the runner is played by the test."""

import asyncio
import os
import socket
import threading

import pytest

from hpcq import messages as m
from hpcq.parcels import Shelf
from hpcq.pilot import datagrams, pool
from hpcq.pilot.core import Core
from hpcq.pilot.hold import Hold
from hpcq.pilot.runner import Ready
from hpcq.protocol import frame


class Played:
    """A process that does nothing, and the runner's ends of its sockets."""

    def __init__(self) -> None:
        self.tasks = self.results = None
        self.process = None
        self.started = asyncio.Event()

    async def spawn(self, argv, *, pass_fds, **_):
        self.tasks, self.results = (socket.socket(fileno=os.dup(fd)) for fd in pass_fds)
        self.process = await asyncio.create_subprocess_exec("sleep", "600", start_new_session=True)
        self.started.set()
        return self.process

    def say(self, message):
        self.results.sendall(frame(message))

    def done(self, number):
        self.say(m.TaskResult(number, "success", seconds=1e-5))

    def close(self):
        self.tasks.close()
        self.results.close()


class Story:
    """What the pool reports."""

    def __init__(self) -> None:
        self.results, self.faults = [], []
        self.news = asyncio.Event()

    def report(self, report):
        self.results += [result.id for result in report.results]
        self.news.set()

    async def until(self, numbers):
        async with asyncio.timeout(30):
            while not (self.faults or set(self.results) >= numbers):
                self.news.clear()
                await self.news.wait()

    def fault(self, error):
        self.faults.append(error)
        self.news.set()


def a_task(number):
    return m.TaskSpec(number, b"f", b"")


async def begin(tmp_path):
    """A pool whose one runner is ready and has done task 1, so that short ones are given ahead."""
    played, story = Played(), Story()
    hold = Hold(Shelf(1 << 20, tmp_path, described=True))
    runners = pool.Pool(Core(1, 0), tmp_path, {"any": played.spawn}, story.report, story.fault, story.fault, hold)
    runners.run(m.Run([m.FunctionBody(b"f", b"")], [a_task(1)], []))
    await played.started.wait()
    assert datagrams.receive(played.tasks).key == b"f"
    assert datagrams.receive(played.tasks).task.id == 1
    played.say(Ready(1))
    played.done(1)
    await story.until({1})
    return runners, played, story


async def race(tmp_path, monkeypatch):
    """While tasks are taken back, the runner gets one from the middle and has it done at once."""
    runners, played, story = await begin(tmp_path)
    receive = datagrams.receive

    def taken(channel, flags=0):
        monkeypatch.setattr(datagrams, "receive", receive)
        message = receive(channel, flags)
        assert [message.task.id, receive(played.tasks).task.id] == [3, 4]
        played.done(2)
        played.done(4)
        return message

    runners.run(m.Run([], [a_task(number) for number in (2, 3, 4, 5)], []))
    assert receive(played.tasks).task.id == 2
    monkeypatch.setattr(datagrams, "receive", taken)
    await story.until({2, 4})  # task 2 keeps the others waiting: they are recalled
    for number in () if story.faults else (3, 5):
        assert receive(played.tasks).task.id == number
        played.done(number)
        await story.until({number})
    await runners.close()
    played.close()
    return story


def test_a_result_that_comes_while_tasks_are_taken_back_is_read_after_the_core_knows(tmp_path, monkeypatch):
    story = asyncio.run(race(tmp_path, monkeypatch))
    assert (story.faults, story.results) == ([], [1, 2, 4, 3, 5])


async def fault(tmp_path, broken):
    runners, played, story = await begin(tmp_path)
    runners.run(m.Run([], [a_task(2), a_task(3)], []))
    assert not runners.idle.is_set()
    played.results.sendall(broken)
    await story.until({2})
    played.done(2)
    runners.run(m.Run([], [a_task(4)], []))  # nothing is done any more
    await runners.idle.wait()
    await runners.close()
    assert played.process.returncode is not None
    played.close()
    return story


@pytest.mark.parametrize("broken", [frame(m.TaskResult(9, "success")), frame(m.Forget(b"f")), b"\xff" * 9])
def test_whatever_a_runner_says_that_makes_no_sense_is_a_fault_told_once(tmp_path, broken):
    story = asyncio.run(fault(tmp_path, broken))
    assert (len(story.faults), story.results) == (1, [1])


def test_a_sampler_that_breaks_is_a_fault(tmp_path, monkeypatch):
    async def broken(_sampler):
        raise ArithmeticError("no figures")

    async def story_of_it():
        story = Story()
        hold = Hold(Shelf(1 << 20, tmp_path, described=True))
        runners = pool.Pool(Core(1, 0), tmp_path, {}, story.report, story.fault, story.fault, hold)
        await story.until({1})
        await runners.close()
        return story

    monkeypatch.setattr(pool.Sampler, "run", broken)
    assert [str(error) for error in asyncio.run(story_of_it()).faults] == ["no figures"]


async def late_kill(tmp_path, monkeypatch):
    """A runner has ended by itself, and what is left of its session is being ended, when it is to be killed."""
    ending, go_on, killed = threading.Event(), threading.Event(), []

    def end_session(_leader):
        ending.set()
        assert go_on.wait(60)

    runners, played, story = await begin(tmp_path)
    monkeypatch.setattr(pool, "kill_session", end_session)
    monkeypatch.setattr(pool, "kill_tree", lambda pid, handle: killed.append(pid))
    monkeypatch.setattr(pool, "kill_descendants", lambda pid, handle: killed.append(pid))
    played.process.kill()
    await asyncio.to_thread(ending.wait, 60)
    runners._kill(1)
    runners._end_children(1)
    go_on.set()
    while runners._lives:
        await asyncio.wait(runners._lives)
    await runners.close()
    played.close()
    assert not story.faults
    return killed


def test_a_runner_that_has_ended_is_not_killed_its_handle_may_be_anothers_by_then(tmp_path, monkeypatch):
    assert asyncio.run(late_kill(tmp_path, monkeypatch)) == []


def test_what_a_runner_leaves_on_disk_is_removed_beside_everything_else(tmp_path, monkeypatch):
    removed = []

    def noted(directory):
        removed.append((directory.name, threading.current_thread() is threading.main_thread()))

    async def story_of_it():
        runners, played, story = await begin(tmp_path)
        monkeypatch.setattr(pool, "remove_tree", noted)
        await runners.close()
        played.close()
        return story.faults

    assert asyncio.run(story_of_it()) == []
    assert removed == [("runner-1", False)]


def test_a_runner_that_cannot_have_a_directory_is_no_fault(tmp_path):
    async def story_of_it():
        story, told = Story(), []
        broken = asyncio.Event()

        def tell(message):
            told.append(message)
            broken.set()

        hold = Hold(Shelf(1 << 20, tmp_path, described=True))
        runners = pool.Pool(Core(1, 0), tmp_path / "full", {}, story.report, tell, story.fault, hold)
        runners.run(m.Run([m.FunctionBody(b"f", b"")], [a_task(1)], []))
        async with asyncio.timeout(60):
            await broken.wait()
        await runners.close()
        return story.faults, told

    faults, (message,) = asyncio.run(story_of_it())
    assert faults == []
    assert "No such file or directory" in message
