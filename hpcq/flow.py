"""Many calls at once: what `Queue.map`, `Queue.pair` and `Queue.tree_reduce` do. Runs in the user's own thread.

Each stream of calls has a `Mailbox` of its own, so it takes nothing from the user's `wait` and needs no tags. Arguments
are read as values are taken: at most `AHEAD` tasks (or `PER_CORE` for each core of the pilots, if that is more) are
out or waiting to be taken, whatever the length of the input.

Failure cases: a call that fails ends its stream, with its own exception, and cancels what is still out; so do an error
of the user's input iterator, closing the stream and dropping it. A queue that closes ends it with `QueueClosedError`.
May not live here: threads, pickling, anything about pilots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from hpcq.errors import UsageError
from hpcq.mailbox import Mailbox
from hpcq.options import DEFAULTS, changed
from hpcq.task import PythonTask

if TYPE_CHECKING:
    from hpcq.queue import Queue

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 1024
"""Tasks of one stream that may be out at least, so that short ones keep a pilot busy."""

PER_CORE = 4
"""Tasks of one stream that may be out for each core, where that is more."""


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items, the last one perhaps shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def each(function: Callable[..., R]) -> Callable[[list[Any]], list[R]]:
    """``function`` of every item of a list; made as a closure, whose pickled form the queue remembers."""

    def call(items: list[Any]) -> list[R]:
        return [function(item) for item in items]

    return call


class Stream(Generic[R]):
    """The values of ``function`` of each argument, in order. An iterator; the first calls are out when it is made."""

    def __init__(
        self, queue: Queue, function: Callable[[Any], R], arguments: Iterable[Any], options: Mapping[str, Any]
    ) -> None:
        self._options = changed(DEFAULTS, options)
        self._queue = queue
        self._function = function
        self._arguments = iter(arguments)
        self._mailbox = Mailbox()
        self._out: deque[int] = deque()
        self._ahead = AHEAD
        self._until_look = 0
        self._refill()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        if not self._out:
            raise StopIteration
        number = self._out[0]
        task = self._mailbox.take(lambda: self._mailbox.has(number), lambda: self._mailbox.expects(number), None)
        assert task is not None
        self._out.popleft()
        try:
            value: R = task.result()
        except BaseException:
            self.close()
            raise
        self._refill()
        return value

    def _refill(self) -> None:
        try:
            for argument in islice(self._arguments, self._room()):
                task = PythonTask(self._function, argument)
                task._options = self._options
                self._out.append(self._queue.submit_to(self._mailbox, task))
                task.args = ()  # pickled: what waits in the queue need not hold it twice
        except BaseException:
            self.close()
            raise

    def _room(self) -> int:
        if self._until_look <= 0:  # pilots come and go, but asking for each task would cost more than the task
            self._ahead = max(AHEAD, PER_CORE * self._queue.cores)
            self._until_look = AHEAD
        room = max(0, self._ahead - len(self._out))
        self._until_look -= room
        return room

    def close(self) -> None:
        """Cancel what is still out. May be called twice."""
        self._arguments = iter(())
        if self._out:
            self._queue.cancel_ids(self._out)
            self._out.clear()

    def __del__(self) -> None:
        if getattr(self, "_out", None):  # not there when the options were refused
            self.close()


def map_over(
    queue: Queue, function: Callable[[Any], R], items: Iterable[Any], chunksize: int, options: Mapping[str, Any]
) -> Iterator[R]:
    """See `Queue.map`."""
    _at_least(1, chunksize)
    if chunksize == 1:
        return Stream(queue, function, items, options)
    return _flat(Stream(queue, each(function), chunks(items, chunksize), options))


def _flat(stream: Stream[list[R]]) -> Iterator[R]:
    for values in stream:
        yield from values


def tree_reduce(
    queue: Queue, function: Callable[[list[T]], T], items: Iterable[T], chunksize: int, options: Mapping[str, Any]
) -> T:
    """See `Queue.tree_reduce`. A round begins as soon as the one before has its first values."""
    _at_least(2, chunksize)
    values: Iterator[T] = iter(items)
    with ExitStack() as rounds:
        while len(head := list(islice(values, 2))) == 2:
            a_round = _round(queue, function, chain(head, values), chunksize, options)
            rounds.callback(a_round.close)
            values = a_round
    if not head:
        raise UsageError("tree_reduce was given nothing to reduce")
    return head[0]


def _round(
    queue: Queue, function: Callable[[list[T]], T], values: Iterable[T], size: int, options: Mapping[str, Any]
) -> Generator[T, None, None]:
    alone: list[T] = []

    def groups() -> Iterator[list[T]]:
        for group in chunks(values, size):
            if len(group) == 1:  # only the last can be
                alone.extend(group)
            else:
                yield group

    yield from Stream(queue, function, groups(), options)
    yield from alone


def _at_least(least: int, chunksize: int) -> None:
    if isinstance(chunksize, bool) or not isinstance(chunksize, int) or chunksize < least:
        raise UsageError(f"chunksize must be a whole number, {least} or more, not {chunksize!r}")
