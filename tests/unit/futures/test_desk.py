"""The thread that sets futures: whatever comes in, every future is done in the end."""

import pytest

from hpcq import serialize
from hpcq.dispatch import Finished
from hpcq.futures import BrokenExecutorError, _Call, _Desk
from hpcq.options import DEFAULTS
from hpcq.outcome import Attempt, Outcome


class Played:
    """A queue in which nothing runs."""

    name = "q"

    def __init__(self) -> None:
        self.cancelled = []

    def submit_to(self, desk, call):
        call.id = 1 + len(desk.expected())
        desk.expect(call.id, call)
        return call.id

    def cancel_ids(self, numbers):
        self.cancelled += numbers

    def running(self, _numbers):
        return set()


@pytest.fixture
def desk():
    made = _Desk(Played(), owns_queue=False, has_pilots=False)
    yield made
    made.shutdown(wait=True, cancel_futures=True)


def submitted(desk):
    return desk.submit(_Call(len, ((),), {}, DEFAULTS, desk))


def test_an_exception_that_cannot_be_rebuilt_is_its_own_futures_alone(desk):
    broken, good = submitted(desk), submitted(desk)
    desk.put([
        Finished(1, Attempt(Outcome.EXCEPTION, payload=b"junk")),
        Finished(2, Attempt(Outcome.SUCCESS, payload=serialize.dump_value(7))),
    ])  # fmt: skip
    assert good.result(60) == 7
    assert broken.exception(60) is not None


def test_a_fault_breaks_the_executor_and_nobody_waits_for_ever(desk, monkeypatch):
    def fault(_finished):
        raise ArithmeticError("a fault")

    waiting = submitted(desk)
    monkeypatch.setattr(desk, "_settle", fault)
    desk.put([])
    with pytest.raises(BrokenExecutorError, match="a fault"):
        waiting.result(60)
    with pytest.raises(BrokenExecutorError):
        submitted(desk)
    assert list(desk.queue.cancelled) == [1]
