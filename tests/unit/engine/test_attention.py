"""When a runner watches for its next task, and when it sleeps."""

from hypothesis import given
from hypothesis import strategies as st

from hpcq.pilot.attention import PATIENCE, Attention
from hpcq.pilot.usage import Meter

STEP = PATIENCE / 50


class World:
    """Tasks that arrive after pauses; a clock that a look moves on, and a sleep until the next arrival."""

    def __init__(self, cpus=2):
        self.now = self.slept = self.spent = 0.0
        self.sleeps = self.looks = 0
        self.arrival = 0.0
        self.attention = Attention(self.receive, cpus, self.count, lambda: self.now, lambda: self.now - self.slept)

    def count(self, seconds):
        self.spent += seconds

    def receive(self, flags):
        if flags:
            self.looks += 1
            self.now += STEP
            if self.now < self.arrival:
                raise BlockingIOError
        elif self.now < self.arrival:
            self.sleeps += 1
            self.slept += self.arrival - self.now
            self.now = self.arrival
        return "task"

    def wait(self, pause):
        """Wait for a task that comes after so long; how often it slept."""
        self.arrival = self.now + pause
        before = self.sleeps
        assert self.attention.wait() == "task"
        return self.sleeps - before


def test_short_waits_are_watched_and_long_ones_are_slept_through():
    world = World()
    assert world.wait(PATIENCE / 2) == 1, "nothing is known yet"
    assert world.wait(PATIENCE / 2) == 0
    assert world.wait(PATIENCE / 2) == 0
    assert world.wait(10 * PATIENCE) == 1, "a watch in vain"
    looks = world.looks
    assert world.wait(PATIENCE / 2) == 1
    assert world.looks == looks + 1, "slept at once"
    assert world.wait(PATIENCE / 2) == 0


def test_where_tasks_queue_up_nobody_watches():
    world = World()
    world.wait(PATIENCE / 2)
    world.wait(0)
    assert world.wait(PATIENCE / 2) == 1


def test_with_one_cpu_nobody_watches():
    world = World(cpus=1)
    assert [world.wait(PATIENCE / 2) for _ in range(4)] == [1] * 4
    assert not world.spent


@given(st.lists(st.floats(0, 5 * PATIENCE), max_size=40))
def test_a_watch_is_bounded_and_its_cpu_is_told(pauses):
    world = World()
    for pause in pauses:
        before, spent = world.now - world.slept, world.spent
        world.wait(pause)
        assert world.spent - spent <= PATIENCE + 2 * STEP
        assert world.now - world.slept - before - (world.spent - spent) <= 2 * STEP + 1e-9, "all but a look is told"


def test_the_meter_leaves_it_out():
    meter = Meter()
    meter.leave_out(1000.0)
    assert meter.read(1.0) < -900
    assert meter.read(1.0) >= 0
