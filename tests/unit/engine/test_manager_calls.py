"""Questions to a manager from other threads, when it ends meanwhile."""

import asyncio
from types import SimpleNamespace

import pytest

from hpcq import manager as module
from hpcq.errors import QueueClosedError
from hpcq.manager import Manager


@pytest.fixture
def manager(monkeypatch):
    """One whose loop makes no turn any more."""
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.001)
    made = Manager.__new__(Manager)
    made.name, made._loop = "q", asyncio.new_event_loop()
    yield made
    made._loop.close()


def test_one_that_comes_after_the_last_turn_is_not_waited_for(manager):
    lives = iter([True, True, False])
    manager._thread = SimpleNamespace(is_alive=lambda: next(lives))
    with pytest.raises(QueueClosedError):
        manager.call(lambda: 1)


def test_one_that_comes_after_the_end_is_refused(manager):
    manager._thread = SimpleNamespace(is_alive=lambda: True)
    manager._loop.close()
    with pytest.raises(QueueClosedError):
        manager.call(lambda: 1)


def test_a_time_limit_of_what_is_called_is_no_reason_to_look_again(manager):
    def late():
        raise TimeoutError("its own")

    manager._thread = SimpleNamespace(is_alive=lambda: True)
    manager._loop.call_soon_threadsafe = lambda function: function()
    assert manager.call(lambda: 7) == 7
    with pytest.raises(TimeoutError, match="its own"):
        manager.call(late)
