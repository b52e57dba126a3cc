"""What the scheduler makes of a tunnel that breaks and comes back, each rule by its example."""

import pytest
from scheduling import assigned, end, finished, ready, start, submit

from hpcq.scheduler import NewTask, PilotTunnel, Scheduler, explain


@pytest.fixture
def scheduler():
    return Scheduler()


def tunnel(scheduler, **options):
    return scheduler.handle([PilotTunnel("p", **options)], 1.0)


def test_a_task_cut_off_by_the_tunnel_runs_again_and_spends_no_retry(scheduler):
    ready(scheduler)
    submit(scheduler, NewTask(1, network="wan", retries=0))
    for _ in range(5):
        start(scheduler, 1)
        assert assigned(end(scheduler, 1, outcome="network")) == {"p": [1]}
    start(scheduler, 1)
    assert finished(end(scheduler, 1)) == {1: "success"}


def test_while_the_tunnel_is_down_only_what_needs_it_waits(scheduler):
    ready(scheduler, cores=2)
    tunnel(scheduler, wan=False)
    assert not assigned(submit(scheduler, NewTask(1, network="wan")))
    assert "no tunnel" in explain(scheduler, 1, 1.0)
    assert assigned(submit(scheduler, NewTask(2))) == {"p": [2]}
    assert assigned(tunnel(scheduler, wan=True)) == {"p": [1]}


def test_a_pilot_in_which_nothing_can_run_gets_nothing(scheduler):
    ready(scheduler)
    tunnel(scheduler, wan=False, usable=False)
    assert not assigned(submit(scheduler, NewTask(1)))
    assert "broken tunnel" in explain(scheduler, 1, 1.0)
    assert assigned(tunnel(scheduler, wan=True)) == {"p": [1]}


def test_the_mode_of_the_new_tunnel_is_a_feature(scheduler):
    ready(scheduler, features=frozenset({"tunnel=relay"}))
    submit(scheduler, NewTask(1, features=frozenset({"tunnel=openconnect"})))
    assert assigned(tunnel(scheduler, wan=True, features=frozenset({"tunnel=openconnect"}))) == {"p": [1]}
