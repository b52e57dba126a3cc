"""Pilots that got a content and cannot give it, or did not get it, keep no other pilot waiting."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from hpcq import messages as m
from hpcq.files.cache import Cache
from hpcq.files.digests import of_bytes
from hpcq.files.holders import SEEDS, Give
from hpcq.files.service import FileService
from hpcq.pilot.contents import Contents

DATA = b"the same for all"
CONTENT = of_bytes(DATA)


class Asking(Contents):
    """One whose manager is the holders of a service."""

    def __init__(self, service, number, scratch, fails):
        name = f"p{number}"
        (scratch / name).mkdir()
        service._desk.holders.pilot_serves(name)
        link = SimpleNamespace(send=lambda message: service.holding(name, message))

        def announce(digests):
            service.holding(name, m.Holding(digests))

        super().__init__(Cache(scratch / name, 1 << 20), name, link, announce)
        self._service = service
        self._fails = fails

    async def _ask_manager(self, digest, size, task, descriptor, avoid):
        answer = self._service._desk.holders.ask(self._pilot, digest, set(avoid), True)
        assert answer == Give(), "it has to wait, for ever"
        if self._fails:
            raise OSError(28, "No space left on device")
        os.write(descriptor, DATA)


async def in_turn(scratch, take, fails):
    """More pilots than the manager gives to at a time take it, one after the other."""
    service = FileService(print, print, print, print)
    for number in range(2 * SEEDS):
        pilot = Asking(service, number, scratch, fails)
        try:
            await take(pilot)
        except OSError:
            assert fails
        finally:
            await pilot.close()
        service._desk.holders.check()
    await service.close()


async def past_the_cache(pilot):
    descriptor = os.memfd_create("target")
    try:
        await pilot.fetch(CONTENT.digest, CONTENT.size, 1, descriptor)
    finally:
        os.close(descriptor)


async def into_the_cache(pilot):
    os.close(await pilot.obtain(CONTENT.digest, CONTENT.size, 1))


@pytest.mark.parametrize("fails", [False, True])
def test_files_that_are_not_cached_reach_every_pilot(tmp_path, fails):
    asyncio.run(in_turn(tmp_path, past_the_cache, fails))


def test_pilots_that_cannot_write_keep_no_other_waiting(tmp_path):
    asyncio.run(in_turn(tmp_path, into_the_cache, True))


def test_one_that_does_not_wait_for_it_any_more_keeps_no_other_waiting(tmp_path):
    async def story():
        service = FileService(print, print, print, print)
        pilot = Asking(service, 0, tmp_path, False)
        asked = asyncio.Event()

        async def ask(digest, *_):
            service._desk.holders.ask("p0", digest, set(), True)
            asked.set()
            await asyncio.Event().wait()

        pilot._ask_manager = ask
        taking = asyncio.create_task(into_the_cache(pilot))
        await asked.wait()
        assert service._desk.holders._gets
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert not service._desk.holders._gets
        await pilot.close()
        await service.close()

    asyncio.run(story())


def test_of_what_a_nodes_cache_has_from_before_the_manager_remembers_what_concerns_it():
    service = FileService(print, print, print, print)
    service._desk.holders.pilot_serves("p0")
    service._desk._origins[CONTENT.digest] = {}
    service._desk.holders.given[b"needed before"] += 1
    service.holding("p0", m.Holding([], cached=[CONTENT.digest, b"needed before", b"another program's"]))
    assert list(service._desk.holders._have) == [CONTENT.digest, b"needed before"]
