"""A thread that was given a descriptor has done with it before anybody closes that, whatever is cancelled meanwhile."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpcq.files import threads, wire
from hpcq.protocol import frame


class Slow:
    """A digest that a thread is busy with until it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def update(self, _data):
        self.begun.set()
        assert self.go_on.wait(60)

    def digest(self):
        return b""


class Nobody:
    """A transport that nothing is written to."""

    async def drain(self):
        pass

    def write(self, _data):
        pass


async def until_begun(slow):
    await asyncio.get_running_loop().run_in_executor(None, slow.begun.wait, 60)


async def cancelled_twice(task, slow):
    """Cancel it, and again while it waits for its thread; whether it ended before that."""
    await until_begun(slow)
    for _ in range(2):
        task.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
    early = task.done()
    slow.go_on.set()
    await asyncio.wait([task])
    assert task.cancelled()
    return early


async def receiving(tmp_path):
    """A chunk is being written when its reader is cancelled, who closes the file; another file is opened then."""
    with ThreadPoolExecutor(1) as workers:
        reader = asyncio.StreamReader()
        channel = wire.Channel(reader, Nobody(), workers, "here")
        slow = Slow()
        descriptor = os.open(tmp_path / "one", os.O_RDWR | os.O_CREAT)

        async def receive():
            try:
                await channel.receive_stream(descriptor, total=slow)
            finally:
                os.close(descriptor)

        reader.feed_data((5).to_bytes(4, "big") + b"WRONG" + (0).to_bytes(4, "big") + frame(wire.End(5)))
        return await cancelled_twice(asyncio.create_task(receive()), slow)


def test_a_chunk_is_written_before_its_file_is_closed(tmp_path):
    assert not asyncio.run(receiving(tmp_path))
    assert (tmp_path / "one").read_bytes() == b"WRONG"


async def sending():
    with ThreadPoolExecutor(1) as workers:
        slow = Slow()

        def chunks():
            slow.update(b"")
            yield b"x"

        channel = wire.Channel(asyncio.StreamReader(), Nobody(), workers, "here")
        return await cancelled_twice(asyncio.create_task(channel.send_stream(chunks())), slow)


def test_a_file_is_read_to_the_end_of_a_chunk_before_it_is_closed():
    assert not asyncio.run(sending())


async def blocking(undone):
    with ThreadPoolExecutor(1) as workers:
        slow = Slow()

        def make():
            slow.update(b"")
            return 7

        made = asyncio.create_task(threads.call(workers, make, undo=undone.append))
        return await cancelled_twice(made, slow)


def test_what_a_call_made_that_nobody_waits_for_any_more_is_undone():
    undone = []
    assert not asyncio.run(blocking(undone))
    assert undone == [7]


async def refused(cancel):
    with ThreadPoolExecutor(1) as workers:
        slow = Slow()

        def fail():
            slow.update(b"")
            raise FileNotFoundError("gone")

        call = asyncio.create_task(threads.call(workers, fail, undo=print))
        if cancel:
            return await cancelled_twice(call, slow)
        slow.go_on.set()
        return await call


def test_the_error_of_a_call_is_its_callers():
    with pytest.raises(FileNotFoundError):
        asyncio.run(refused(False))
    assert not asyncio.run(refused(True))
