"""Readers that the selector calls itself: whom it calls, and until when."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from vpn.relay.loop import DirectLoop, run_loop, watch

DEADLINE = 60.0


class Ends:
    """A connected pair, and what its reader was called for."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        for sock in (self.ours, self.theirs):
            sock.setblocking(False)
        self.heard: list[bytes] = []
        self.came = asyncio.Event()

    def read(self) -> None:
        """What a reader does."""
        self.heard.append(self.ours.recv(100))
        self.came.set()

    async def hear(self) -> bytes:
        """The next that was heard."""
        await self.came.wait()
        self.came.clear()
        return self.heard.pop()

    def close(self) -> None:
        """Both."""
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def pairs() -> Iterator[Callable[[], Ends]]:
    """Makes pairs, inside a loop."""
    with ExitStack() as stack:

        def make() -> Ends:
            ends = Ends()
            stack.callback(ends.close)
            return ends

        yield make


def served(main: Coroutine[Any, Any, None]) -> None:
    async def within() -> None:
        async with asyncio.timeout(DEADLINE):
            await main

    run_loop(within())


def test_called_until_removed(pairs):
    async def main() -> None:
        loop, ends = asyncio.get_running_loop(), pairs()
        assert isinstance(loop, DirectLoop)
        watch(loop, ends.ours, ends.read)
        for word in (b"one", b"two"):
            ends.theirs.send(word)
            assert await ends.hear() == word
        assert loop.remove_reader(ends.ours)
        ends.theirs.send(b"three")
        assert await loop.sock_recv(ends.ours, 100) == b"three"  # by a reader of asyncio's own, on the same descriptor
        assert ends.heard == []

    served(main())


def test_another_reader_takes_its_place(pairs):
    async def main() -> None:
        loop, ends, other = asyncio.get_running_loop(), pairs(), asyncio.Event()
        watch(loop, ends.ours, ends.read)
        loop.add_reader(ends.ours, lambda: (ends.ours.recv(100), other.set()))
        ends.theirs.send(b"x")
        await other.wait()
        assert ends.heard == []

    served(main())


def test_a_number_that_is_used_again(pairs):
    async def main() -> None:
        loop, before = asyncio.get_running_loop(), pairs()
        watch(loop, before.ours, before.read)
        number = before.ours.fileno()
        loop.remove_reader(before.ours)
        before.ours.close()
        after = pairs()
        assert after.ours.fileno() == number
        loop.add_reader(after.ours, after.read)
        after.theirs.send(b"x")
        assert await after.hear() == b"x"
        assert before.heard == []

    served(main())


def test_reading_directly_and_waiting_to_write(pairs):
    async def main() -> None:
        loop, ends = asyncio.get_running_loop(), pairs()
        watch(loop, ends.ours, ends.read)
        while True:
            try:
                ends.ours.send(bytes(4096))
            except BlockingIOError:
                break
        writable = asyncio.Event()
        loop.add_writer(ends.ours, writable.set)
        ends.theirs.send(b"both")
        assert await ends.hear() == b"both"
        assert not writable.is_set()
        with suppress(BlockingIOError):
            while ends.theirs.recv(1 << 16):
                pass
        await writable.wait()
        loop.remove_writer(ends.ours)
        ends.theirs.send(b"still")
        assert await ends.hear() == b"still"

    served(main())


def test_an_error_is_told_and_the_loop_goes_on(pairs):
    async def main() -> None:
        loop, broken, ends = asyncio.get_running_loop(), pairs(), pairs()
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop.set_exception_handler(lambda _loop, context: told.put_nowait(context))

        def fail() -> None:
            broken.ours.recv(100)
            raise ZeroDivisionError

        watch(loop, broken.ours, fail)
        watch(loop, ends.ours, ends.read)
        broken.theirs.send(b"x")
        assert isinstance((await told.get())["exception"], ZeroDivisionError)
        ends.theirs.send(b"on")
        assert await ends.hear() == b"on"

    served(main())


@pytest.mark.parametrize("direct", [True, False])
def test_a_reader_ends_another_in_the_same_turn(pairs, direct):
    async def main() -> None:
        loop, turn = asyncio.get_running_loop(), asyncio.Event()
        pair = [pairs(), pairs()]

        def reader(mine: Ends, other: Ends) -> None:
            mine.read()
            if other.ours.fileno() >= 0:
                loop.remove_reader(other.ours)
                other.ours.close()
            turn.set()

        watch(loop, pair[0].ours, lambda: reader(*pair))
        if direct:
            watch(loop, pair[1].ours, lambda: reader(*reversed(pair)))
        else:
            loop.add_reader(pair[1].ours, lambda: reader(*reversed(pair)))
        for ends in pair:
            ends.theirs.send(b"x")
        await turn.wait()
        await asyncio.sleep(0)  # another turn: nothing is left of the one that was ended
        assert sorted(len(ends.heard) for ends in pair) == [0, 1]

    served(main())


def test_timers_run_while_readers_are_called(pairs):
    async def main() -> None:
        loop, ends, over = asyncio.get_running_loop(), pairs(), asyncio.Event()

        def read() -> None:
            ends.read()
            if not over.is_set():
                ends.theirs.send(b"again")

        watch(loop, ends.ours, read)
        loop.call_later(0.02, over.set)
        ends.theirs.send(b"x")
        await over.wait()
        assert len(ends.heard) > 1

    served(main())


def test_with_any_other_loop(pairs):
    async def main() -> None:
        ends = pairs()
        watch(asyncio.get_running_loop(), ends.ours, ends.read)
        ends.theirs.send(b"x")
        assert await ends.hear() == b"x"

    asyncio.run(main())
