"""The rules of autoscaling, each by example, and what holds whatever happens."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hpcq.autoscale import (
    FAILED_STARTS,
    REFUSALS,
    WORTHWHILE,
    Autoscale,
    Decision,
    Limits,
    Picture,
    Shape,
    Work,
    pilots_for,
)
from hpcq.errors import UsageError

SHAPE = Shape(cores=8, memory=16000, disk=0, gpus=2, walltime=3600)


@pytest.mark.parametrize(
    ("work", "pilots"),
    [
        ([], 0),
        ([Work(1)], 1),
        ([Work(16)], 2),
        ([Work(17)], 3),
        ([Work(4), Work(4)], 1),
        ([Work(4, cores=8)], 4),
        ([Work(4, cores=5)], 4),  # one to a pilot, however much is left
        ([Work(4, memory=8000)], 2),
        ([Work(4, gpus=1)], 2),
        ([Work(8, cores=2, gpus=1)], 4),
        ([Work(5, cores=9)], 0),  # no such pilot could run it
        ([Work(5, memory=16001)], 0),
        ([Work(5, gpus=3)], 0),
        ([Work(5, walltime=3601)], 0),
        ([Work(5, disk=10**6)], 1),  # how much disk a node has is not known beforehand
        ([Work(8000, seconds=0.06)], 1),  # a minute's work for one
        ([Work(8000, seconds=0.6)], 10),
        ([Work(8000, seconds=600)], 1000),
        ([Work(10**9)], 125_000_000),
    ],
)
def test_pilots_for_work(work, pilots):
    assert pilots_for(work, SHAPE) == pilots


def scaling(**limits):
    return Autoscale(Limits(**{"max": 100, **limits}), SHAPE)


def test_it_ramps():
    one = scaling()
    picture = Picture([Work(1000)])
    assert one.decide(picture, 0.0) == Decision(submit=5)
    one.submitted(5, 0.0)
    assert one.decide(Picture([Work(1000)], coming=5, pending=5), 29.0) == Decision()
    assert one.decide(Picture([Work(1000)], coming=5, pending=5), 30.0) == Decision(submit=5)


def test_what_is_on_its_way_counts():
    one = scaling()
    assert one.decide(Picture([Work(16)], working=3, coming=1, pending=1), 0.0) == Decision(submit=1)
    assert one.decide(Picture([Work(16)], working=3, coming=2, pending=2), 0.0) == Decision()


def test_jobs_that_wait_in_the_batch_system_are_limited():
    one = scaling(backlog=7, step=50)
    assert one.decide(Picture([Work(1000)], coming=4, pending=4), 0.0) == Decision(submit=3)


def test_the_most_and_the_least():
    assert scaling(max=2).decide(Picture([Work(1000)], working=1), 0.0) == Decision(submit=1)
    assert scaling(min=2).decide(Picture(), 0.0) == Decision(submit=2)
    assert scaling(min=2).decide(Picture(idle={"a": 0.0}, coming=1), 1e6) == Decision()


def test_several_nodes_to_a_job_never_exceed_the_most():
    one = Autoscale(Limits(max=5, step=9), Shape(cores=8, nodes=2))
    assert one.decide(Picture([Work(1000)]), 0.0) == Decision(submit=2)


def test_idle_pilots_leave_in_time():
    one = scaling(min=1, idle_timeout=60)
    idle = {"a": 10.0, "b": 0.0, "c": 5.0}
    assert one.decide(Picture(idle=idle), 59.0) == Decision()
    assert one.decide(Picture(idle=idle), 65.0) == Decision(leave=("b", "c"))
    assert one.decide(Picture(idle=idle), 70.0) == Decision(leave=("b", "c"))  # the last stays
    assert one.decide(Picture(idle={"a": 0.0}), 1e6) == Decision()


def test_a_smaller_limit_holds_at_once():
    one = scaling()
    picture = Picture([Work(1000)], working=5, idle={"a": 0.0}, coming=6, pending=4)
    one.set_limits(Limits(max=9))
    assert one.decide(picture, 1.0) == Decision(cancel=3)
    one.set_limits(Limits(max=6))
    assert one.decide(picture, 1.0) == Decision(cancel=4, leave=("a",))


def test_jobs_that_nobody_needs_any_more_are_cancelled_after_a_while():
    one = scaling(idle_timeout=60)
    picture = Picture(working=1, coming=3, pending=2)
    assert one.decide(picture, 0.0) == Decision()
    assert one.decide(picture, 59.0) == Decision()
    assert one.decide(picture, 60.0) == Decision(cancel=2)


def test_refusals_make_it_wait_and_then_pause():
    one = scaling()
    picture = Picture([Work(1)])
    now = 0.0
    for _ in range(REFUSALS):
        assert one.decide(picture, now).submit == 1
        one.refused("over the limit", now)
        assert one.decide(picture, now + 29.0).submit == 0
        now += 601.0
    assert one.decide(picture, now + 1e6).submit == 0
    assert one.paused == f"{REFUSALS} submissions in a row were refused; the last: over the limit"
    one.set_limits(one.limits.changed({"max": 3}))
    assert one.decide(picture, now).submit == 1


def test_pilots_that_never_serve_pause_it():
    one = scaling()
    for _ in range(FAILED_STARTS - 1):
        one.failed("no python")
    one.served()
    for _ in range(FAILED_STARTS):
        assert not one.paused
        one.failed("no python")
    assert "3 pilots in a row never came to serve; the last: no python" in one.paused
    assert one.decide(Picture([Work(1)]), 0.0) == Decision()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min": -1}, "min must be"),
        ({"max": 1.5}, "max must be"),
        ({"step": 0}, "step must be"),
        ({"min": 5, "max": 4}, "min 5 is more than max 4"),
        ({"interval": math.nan}, "interval must be"),
        ({"idle_timeout": -1}, "idle_timeout must be"),
        ({"backlog": True}, "backlog must be"),
    ],
)
def test_limits_that_cannot_be(values, words):
    with pytest.raises(UsageError, match=words):
        Limits(**values)
    with pytest.raises(UsageError, match="unknown limit 'x'"):
        Limits().changed({"x": 1})


works = st.lists(
    st.builds(
        Work,
        st.integers(0, 10**6),
        st.integers(1, 10),
        st.integers(0, 20000),
        st.just(0),
        st.integers(0, 3),
        st.sampled_from([0.0, 60.0, 7200.0]),
        st.none() | st.floats(0, 1e5),
    ),
    max_size=4,
)


@given(works)
def test_pilots_for_work_are_enough_and_not_far_too_many(work):
    fitting = [one for one in work if pilots_for([one], SHAPE)]
    assume(fitting)
    pilots = pilots_for(work, SHAPE)
    assert 1 <= pilots <= sum(one.count for one in fitting)
    assert pilots <= sum(pilots_for([one], SHAPE) for one in work)
    lasting = [one for one in fitting if one.seconds is None or one.seconds >= WORTHWHILE]
    assert pilots * SHAPE.cores >= sum(one.count * one.cores for one in lasting) * (1 - 1e-9)


class Scaling(RuleBasedStateMachine):
    """A batch system and pilots that do as they like; whatever happens, the limits are kept."""

    @initialize(nodes=st.integers(1, 3))
    def begin(self, nodes):
        self.nodes = nodes
        self.one = Autoscale(Limits(max=20), Shape(cores=8, nodes=nodes))
        self.now = 0.0
        self.pending, self.starting, self.working = 0, 0, 0
        self.idle = {}
        self.work = []
        self.names = 0
        self.submissions = []

    @rule(work=works)
    def work_comes(self, work):
        self.work = work

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(low=st.integers(0, 10), more=st.integers(0, 20), step=st.integers(1, 10), idle=st.sampled_from([0.0, 60.0]))
    def limits_change(self, low, more, step, idle):
        self.submissions = []
        self.one._recent.clear()
        self.one.set_limits(Limits(min=low, max=low + more, step=step, idle_timeout=idle))

    @rule()
    def a_job_starts(self):
        if self.pending:
            self.pending -= 1
            self.starting += self.nodes

    @rule(works=st.booleans())
    def a_pilot_is_ready(self, works):
        if self.starting:
            self.starting -= 1
            self.one.served()
            if works:
                self.working += 1
            else:
                self.names += 1
                self.idle[f"p{self.names}"] = self.now

    @rule()
    def a_pilot_fails(self):
        if self.starting:
            self.starting -= 1
            self.one.failed("x")

    @rule()
    def a_pilot_becomes_idle(self):
        if self.working:
            self.working -= 1
            self.names += 1
            self.idle[f"p{self.names}"] = self.now

    @rule(refused=st.booleans())
    def it_decides(self, refused):
        coming = self.pending * self.nodes + self.starting
        before = self.working + len(self.idle) + coming
        picture = Picture(self.work, self.working, dict(self.idle), coming, self.pending)
        decision = self.one.decide(picture, self.now)
        limits = self.one.limits
        assert decision.submit >= 0
        assert 0 <= decision.cancel <= self.pending
        assert not (decision.submit and (decision.cancel or decision.leave))
        assert set(decision.leave) <= self.idle.keys()
        assert not (self.one.paused and decision.submit)
        if decision.submit:
            assert before + decision.submit * self.nodes <= limits.max
            assert self.pending + decision.submit <= limits.backlog
            if refused:
                self.one.refused("no", self.now)
            else:
                self.one.submitted(decision.submit, self.now)
                self.submissions.append((self.now, decision.submit))
                self.pending += decision.submit
        gone = len(decision.leave) + decision.cancel * self.nodes
        if gone:
            assert before - gone >= min(before, limits.min)
        for name in decision.leave:
            del self.idle[name]
        self.pending -= decision.cancel

    @invariant()
    def no_more_than_a_step_in_an_interval(self):
        recent = sum(jobs for at, jobs in self.submissions if at > self.now - self.one.limits.interval)
        assert recent <= self.one.limits.step


TestScaling = Scaling.TestCase
