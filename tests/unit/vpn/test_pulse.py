"""When a quiet tunnel is asked for a sign of life, and when it counts as lost; by a clock of the test's own."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from vpn.asking import until_silent
from vpn.errors import TunnelError
from vpn.pulse import AGAIN, Pulse

INTERVAL, PATIENCE = 15.0, 10.0


@given(st.lists(st.tuples(st.sampled_from(["answer", "silence", "traffic", "trickle"]), st.floats(0, 20)), max_size=60))
def test_it_is_lost_by_silence_alone_and_in_time(steps):
    """It is lost when it was silent for as long as it may, and never before."""
    pulse, now, received = Pulse(INTERVAL, PATIENCE, now=0.0, answer=100), 0.0, 0
    pulse.on_traffic(received, now)
    silent_since = None
    for what, pause in steps:
        now = max(now, pulse.due) + pause if what in ("answer", "silence") else now + pause
        if what == "silence":
            silent_since = now if silent_since is None else silent_since
            assert pulse.on_silence(now) == (now - silent_since >= PATIENCE)
            assert pulse.due == now + AGAIN
            continue
        due = pulse.due
        if what == "answer":
            pulse.on_answer(now)
        else:
            received += 1000 if what == "traffic" else 100
            pulse.on_traffic(received, now)
        if what == "trickle":
            assert pulse.due == due
        else:
            silent_since = None
            assert pulse.due == now + INTERVAL


def test_what_never_answered_is_not_missed():
    pulse = Pulse(INTERVAL, 0.0, now=0.0, proven=False)
    assert not pulse.on_silence(1.0)
    assert pulse.due == 1.0 + INTERVAL
    pulse.on_answer(20.0)
    assert pulse.on_silence(40.0)


def test_a_counter_that_is_set_back_or_unknown_tells_nothing():
    pulse = Pulse(INTERVAL, PATIENCE, now=0.0)
    for at, received in enumerate((None, 500, None, 400, 10)):
        pulse.on_traffic(received, float(at))
        assert pulse.due == INTERVAL
    pulse.on_traffic(11, 7.0)
    assert pulse.due == 7.0 + INTERVAL


def story(answers, received=lambda: None):
    """The reason of the loss, after these answers: words, or "" for a good one."""
    said = iter(answers)

    async def ask():
        if reason := next(said):
            raise TunnelError("gateway", reason)

    async def main():
        pulse = Pulse(0.001, 0.0, now=asyncio.get_running_loop().time())
        return await asyncio.wait_for(until_silent(pulse, ask, received), 60)

    return str(asyncio.run(main()))


def test_it_is_asked_until_it_is_silent():
    assert story(["", "", "gone"]) == "gateway: gone"


def test_while_anything_comes_it_is_not_asked():
    counts = iter([0, 1, 2, 3])
    assert story(["gone"], lambda: next(counts, 3)) == "gateway: gone"
    assert next(counts, None) is None
