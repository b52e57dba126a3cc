"""Who has what: any number of pilots, few servings of the manager."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hpcq.files.holders import SEEDS, Give, Holders, Nobody, TakeFrom, Wait

D = b"d"
PILOTS = [f"p{number}" for number in range(6)]


def serving(count):
    holders = Holders()
    for number in range(count):
        holders.pilot_serves(f"p{number}")
    return holders


def test_the_first_get_it_from_the_manager_the_next_wait():
    holders = serving(5)
    assert [holders.ask(f"p{n}", D, set(), True) for n in range(5)] == [Give()] * SEEDS + [Wait()] * 2


def test_who_has_it_gives_it():
    holders = serving(3)
    holders.ask("p0", D, set(), True)
    holders.gained("p0", D)
    assert holders.ask("p1", D, set(), True) == TakeFrom("p0")


def test_a_pilot_gives_to_a_few_only():
    holders = serving(6)
    holders.gained("p0", D)
    answers = [holders.ask(f"p{n}", D, set(), True) for n in range(1, 6)]
    assert answers == [TakeFrom("p0")] * 3 + [Wait()] * 2


def test_one_that_is_avoided_leaves_it_to_the_manager():
    holders = serving(2)
    holders.gained("p0", D)
    assert holders.ask("p1", D, set(), True) == TakeFrom("p0")
    assert holders.ask("p1", D, {"p0"}, True) == Give()


def test_what_nobody_has_is_said():
    assert serving(2).ask("p0", D, set(), False) == Nobody()


def test_one_that_goes_frees_those_who_took_from_it():
    holders = serving(3)
    holders.gained("p0", D)
    holders.ask("p1", D, set(), False)
    holders.pilot_gone("p0")
    holders.check()
    assert holders.ask("p1", D, set(), False) == Nobody()


def test_twenty_pilots_take_it_from_the_manager_three_times():
    """The shape of the real thing: asks again and again, transfers end in any order."""
    holders, getting, done = serving(20), {}, set()
    while len(done) < 20:
        for number in range(20):
            pilot = f"p{number}"
            if pilot not in done and pilot not in getting:
                answer = holders.ask(pilot, D, set(), True)
                if not isinstance(answer, Wait):
                    getting[pilot] = answer
        pilot = next(iter(getting))
        del getting[pilot]
        holders.gained(pilot, D)
        holders.check()
        done.add(pilot)
    assert holders.given[D] == SEEDS


class Story(RuleBasedStateMachine):
    """Pilots ask, get, fail, go and come in any order; nobody waits for nothing."""

    def __init__(self):
        super().__init__()
        self.holders = Holders()
        self.alive = set()
        self.getting = {}

    @rule(pilot=st.sampled_from(PILOTS))
    def come(self, pilot):
        self.alive.add(pilot)
        self.holders.pilot_serves(pilot)

    @rule(pilot=st.sampled_from(PILOTS))
    def go(self, pilot):
        self.alive.discard(pilot)
        self.getting.pop(pilot, None)
        self.holders.pilot_gone(pilot)

    @rule(pilot=st.sampled_from(PILOTS), manager=st.booleans(), avoid=st.sets(st.sampled_from(PILOTS)))
    def ask(self, pilot, manager, avoid):
        if pilot not in self.alive:
            return
        self.getting.pop(pilot, None)
        answer = self.holders.ask(pilot, D, avoid, manager)
        if isinstance(answer, TakeFrom):
            assert answer.pilot in self.alive - {pilot} - avoid
        if isinstance(answer, Give | TakeFrom):
            self.getting[pilot] = answer
        if isinstance(answer, Wait):
            assert self.getting, "somebody must be busy, or the wait has no end"
        if isinstance(answer, Nobody):
            assert not manager

    @rule(pilot=st.sampled_from(PILOTS))
    def get(self, pilot):
        if self.getting.pop(pilot, None):
            self.holders.gained(pilot, D)

    @rule(pilot=st.sampled_from(PILOTS))
    def fail(self, pilot):
        if self.getting.pop(pilot, None):
            self.holders.ended(pilot, D)

    @rule(pilot=st.sampled_from(PILOTS))
    def evict(self, pilot):
        self.holders.lost(pilot, D)

    @invariant()
    def sound(self):
        self.holders.check()


TestStory = Story.TestCase
TestStory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
