"""A pilot's connections for files: used again soon after, not when whatever is on the way may have forgotten them."""

import asyncio
from types import SimpleNamespace

from hpcq.files.cache import Cache
from hpcq.pilot import contents as module
from hpcq.pilot.contents import IDLE_CHANNELS, KEPT, Contents


class Connecting(Contents):
    """One whose connections are numbered."""

    made = 0

    async def _connect(self):
        self.made += 1
        return SimpleNamespace(number=self.made, close=lambda number=self.made: self.closed.append(number))


def used(tmp_path, story, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def whole():
        one = Connecting(Cache(tmp_path, 1 << 20), "p", SimpleNamespace(), print)
        one.closed = []
        await story(one, clock)
        await one.close()
        assert sorted(one.closed) == list(range(1, one.made + 1))

    asyncio.run(whole())


def test_one_that_was_just_used_is_used_again_and_an_old_one_is_not(tmp_path, monkeypatch):
    async def story(one, clock):
        for wait, number in ((0, 1), (KEPT - 1, 1), (KEPT - 1, 1), (KEPT + 1, 2)):
            clock.now += wait
            async with one._to_manager() as channel:
                assert channel.number == number
        assert one.closed == [1]

    used(tmp_path, story, monkeypatch)


def test_a_few_are_kept(tmp_path, monkeypatch):
    async def story(one, _clock):
        everyone = asyncio.Barrier(IDLE_CHANNELS + 2)

        async def use():
            async with one._to_manager():
                await everyone.wait()

        await asyncio.gather(*(use() for _ in range(IDLE_CHANNELS + 2)))
        assert (one.made, len(one._idle)) == (IDLE_CHANNELS + 2, IDLE_CHANNELS)

    used(tmp_path, story, monkeypatch)
