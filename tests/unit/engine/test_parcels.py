"""Where payloads are on their way, and how they are cut into pieces."""

import gc
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq import parcels, serialize
from hpcq.parcels import ALIGNMENT, LARGE, Parcel, Pieces, Shelf, new_file, total_size


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


pieces = st.builds(
    lambda stream, buffers: Pieces(stream, [memoryview(bytearray(data)) for data in buffers]),
    st.lists(st.binary(max_size=200), min_size=1),
    st.lists(st.binary(min_size=1, max_size=300)),
)


def contents(views):
    return [bytes(view) for view in views]


@given(pieces, st.booleans())
def test_what_goes_in_comes_out_in_aligned_pieces(given, described):
    parcel = Shelf(1 << 20, described=described).store(given)
    views = parcel.views(given.sizes)
    assert contents(views) == [b"".join(given.pickle), *contents(given.buffers)]
    assert parcel.size == total_size(given.sizes)
    assert parcel.size % ALIGNMENT == 0


@given(pieces, st.integers(min_value=1, max_value=100), st.booleans())
def test_it_is_read_step_by_step(given, step, described):
    parcel = Shelf(1 << 20, described=described).store(given)
    copy, offset = Parcel(parcel.size, -1), 0
    while offset < parcel.size:
        part = parcel.read(offset, memoryview(bytearray(step)))
        assert 0 < len(part) <= step
        copy.write(offset, part)
        offset += len(part)
    assert contents(copy.views(given.sizes)) == contents(parcel.views(given.sizes))


def test_views_of_a_file_are_private_and_outlive_the_parcel():
    parcel = new_file(64, on_disk=False)
    parcel.write(0, b"before")
    (mine,), (other,) = parcel.views([6]), parcel.views([6])
    mine[:3] = b"new"
    assert (bytes(mine), bytes(other)) == (b"newore", b"before")
    del parcel
    assert bytes(other) == b"before"


@pytest.mark.parametrize("sizes", [[65], [64, 1], [-1]])
def test_pieces_that_do_not_lie_in_it_are_refused(sizes):
    with pytest.raises(ValueError, match="in a parcel of 64"):
        new_file(64, on_disk=False).views(sizes)


def test_a_shelf_counts_what_is_in_memory_and_puts_the_rest_on_disk(tmp_path):
    shelf = Shelf(100, tmp_path, described=True)
    first, second = shelf.new(64), shelf.new(64)
    kinds = [str(Path(f"/proc/self/fd/{parcel.descriptor}").readlink()) for parcel in (first, second)]
    assert "memfd:" in kinds[0]
    assert str(tmp_path) in kinds[1]
    assert list(tmp_path.iterdir()) == []
    assert shelf.held == 64
    del first
    assert shelf.held == 0
    adopted = shelf.adopt(os.memfd_create("left"), on_disk=False)
    assert (adopted.size, shelf.held) == (0, 0)
    assert shelf.is_full(101)
    assert not shelf.is_full(100)


def test_small_ones_of_a_manager_take_no_descriptor():
    before = descriptors()
    kept = [Shelf(0).new(1000) for _ in range(10)]
    assert descriptors() == before
    assert {parcel.descriptor for parcel in kept} == {-1}
    large = Shelf(LARGE).new(LARGE)
    assert large.descriptor >= 0


def test_parcels_go_with_their_last_reference_without_the_collector():
    before = descriptors()
    gc.disable()
    try:
        parcel = new_file(64, on_disk=False)
        view = parcel.views([64])
        del parcel, view
        assert descriptors() == before
    finally:
        gc.enable()


def test_a_directory_that_cannot_be_written_to_is_an_error_and_leaves_nothing_open(tmp_path):
    before = descriptors()
    with pytest.raises(OSError, match="nowhere"):
        parcels.new_file(64, on_disk=True, directory=tmp_path / "nowhere")
    assert descriptors() == before


class Block:
    """As arrays do: its data is left out of the pickle."""

    def __init__(self, data):
        self.data = data

    def __reduce_ex__(self, protocol):
        return Block, (pickle.PickleBuffer(self.data),)


def through_a_parcel(dumped):
    assert isinstance(dumped, Pieces)
    return Shelf(0).store(dumped).views(dumped.sizes)


def test_large_buffers_stay_out_of_the_pickle_and_small_ones_in():
    large, small = bytearray(serialize.LARGE), bytearray(1000)
    dumped = serialize.dump_arguments((Block(large), Block(small)), {"again": Block(large)})
    assert [buffer.nbytes for buffer in dumped.buffers] == [serialize.LARGE] * 2
    assert sum(map(len, dumped.pickle)) < 2000
    (one, two), named = serialize.load_arguments(through_a_parcel(dumped))
    assert bytes(one.data) == bytes(named["again"].data) == bytes(large)
    assert bytes(two.data) == bytes(small)
    assert not one.data.readonly


@pytest.mark.parametrize(
    "value", [b"x" * serialize.LARGE, "x" * serialize.LARGE, ["x" * serialize.LARGE], {1: "é" * (1 << 20)}]
)
def test_large_values_without_buffers_are_pieces_too(value):
    assert serialize.load_value(through_a_parcel(serialize.dump_value(value))) == value


def test_large_bytes_are_not_copied_while_they_are_pickled():
    value = os.urandom(serialize.LARGE)
    assert any(chunk is value for chunk in serialize.dump_value([value, object]).pickle)


def test_small_values_are_bytes():
    for value in (1, b"x" * (serialize.LARGE - 100), Block(bytearray(1000)), [object()] * 3):
        assert isinstance(serialize.dump_value(value), bytes)
