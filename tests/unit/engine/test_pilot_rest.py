"""When results are read: at once from whoever may run out of work, together and a little later from the others."""

import pytest

from hpcq.pilot.rest import REST, Readers

BUSY, IDLE = 2 * REST, 0.0


class Timer:
    def __init__(self, function):
        self.function = function
        self.cancelled = False

    def cancel(self):
        self.cancelled = True


class Loop:
    """What `Readers` uses of an event loop, driven by hand."""

    def __init__(self):
        self.readers = {}
        self.timers = []

    def add_reader(self, socket, function, source):
        self.readers[socket] = lambda: function(source)

    def remove_reader(self, socket):
        return self.readers.pop(socket, None) is not None

    def call_later(self, delay, function):
        assert delay == REST
        self.timers.append(Timer(function))
        return self.timers[-1]

    def fire(self):
        (timer,) = self.timers
        self.timers.clear()
        timer.function()


class Source:
    def __init__(self, name, busy):
        self.results = name
        self.busy = busy
        self.reads = 0


@pytest.fixture
def loop():
    return Loop()


@pytest.fixture
def readers(loop):
    def read(source):
        source.reads += 1

    return Readers(loop, read, lambda source: source.busy)


def test_whoever_may_run_out_of_work_is_read_at_once_each_time(loop, readers):
    source = Source("a", IDLE)
    readers.watch(source)
    for count in (1, 2, 3):
        loop.readers["a"]()
        assert source.reads == count
    assert not loop.timers


def test_busy_ones_are_left_alone_and_then_read_together(loop, readers):
    one, two = Source("a", BUSY), Source("b", BUSY)
    for source in (one, two):
        readers.watch(source)
    for name in ("a", "b"):
        loop.readers[name]()
    assert not loop.readers
    loop.fire()
    assert (one.reads, two.reads) == (2, 2)
    assert not loop.readers
    assert len(loop.timers) == 1  # they rest again


def test_who_becomes_idle_is_watched_again(loop, readers):
    one, two = Source("a", BUSY), Source("b", BUSY)
    for source in (one, two):
        readers.watch(source)
    for name in ("a", "b"):
        loop.readers[name]()
    one.busy = IDLE
    loop.fire()
    assert list(loop.readers) == ["a"]
    assert len(loop.timers) == 1
    two.busy = IDLE
    loop.fire()
    assert sorted(loop.readers) == ["a", "b"]
    assert not loop.timers


def test_before_a_decision_those_at_rest_are_read(loop, readers):
    one, two = Source("a", BUSY), Source("b", IDLE)
    for source in (one, two):
        readers.watch(source)
    for name in ("a", "b"):
        loop.readers[name]()
    readers.catch_up()
    assert (one.reads, two.reads) == (2, 1)


def test_whoever_leaves_is_not_read_again_at_rest_or_not(loop, readers):
    one, two = Source("a", BUSY), Source("b", IDLE)
    for source in (one, two):
        readers.watch(source)
    for name in ("a", "b"):
        loop.readers[name]()
    for source in (one, two):
        readers.leave(source)
    loop.fire()
    assert (one.reads, two.reads) == (1, 1)
    assert not loop.readers
    assert not loop.timers


def test_one_that_leaves_while_it_is_read_stays_away(loop):
    def read(source):
        readers.leave(source)

    readers = Readers(loop, read, lambda source: IDLE)
    readers.watch(Source("a", IDLE))
    loop.readers["a"]()
    assert not loop.readers


def test_nothing_is_read_after_the_end(loop, readers):
    source = Source("a", BUSY)
    readers.watch(source)
    loop.readers["a"]()
    (timer,) = loop.timers
    readers.close()
    assert timer.cancelled
