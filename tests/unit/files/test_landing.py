"""An output on its way whose task has ended meanwhile: what is still written of it goes nowhere else."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from hpcq.files.counter import Counter
from hpcq.files.landing import Landing


def received(landing, stream):
    """As `Counter` receives one; ``stream(descriptor)`` is what comes."""

    async def receive_stream(descriptor):
        stream(descriptor)

    async def story():
        with ThreadPoolExecutor(1) as workers:
            counter = Counter(SimpleNamespace(workers=workers), None)
            await counter._receive(SimpleNamespace(receive_stream=receive_stream), landing)

    asyncio.run(story())


def test_one_that_is_dropped_while_it_is_written_is_written_to_no_other_file(tmp_path):
    landing = Landing(str(tmp_path / "o"), "file", False)
    others = []

    def stream(descriptor):
        landing.drop()
        others.extend((tmp_path / f"other{number}").open("xb") for number in range(3))  # which take free numbers
        os.write(descriptor, b"of a task that was cancelled")

    with pytest.raises(OSError, match="its task has ended"):
        received(landing, stream)
    for other in others:
        other.close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {f"other{n}": b"" for n in range(3)}


def test_one_that_was_dropped_before_is_not_received(tmp_path):
    landing = Landing(str(tmp_path / "o"), "file", False)
    landing.drop()
    with pytest.raises(OSError, match="its task has ended"):
        received(landing, pytest.fail)
    assert not list(tmp_path.iterdir())


def test_one_that_is_wanted_takes_its_place_and_no_descriptor_stays(tmp_path):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    landing = Landing(str(tmp_path / "o"), "file", True)
    received(landing, lambda descriptor: os.write(descriptor, b"whole"))
    landing.commit()
    landing.drop()
    assert (tmp_path / "o").read_bytes() == b"whole"
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
