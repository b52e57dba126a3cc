"""Lines that strangers cause: bounded, told how many are missing, harmless to a terminal."""

import logging

from hypothesis import given
from hypothesis import strategies as st

from vpn.gateway.strangers import BURST, EVERY, KINDS, Filter, Flood, printable


def test_a_burst_is_written_then_few_and_the_next_says_how_many_are_missing():
    flood = Flood()
    answers = [flood.admit(f"worker[user{number}]: failed for 'user{number}'", 0.0) for number in range(BURST + 7)]
    assert answers == [0] * BURST + [None] * 7
    assert flood.admit("worker[x]: failed for 'y'", EVERY) == 7
    assert flood.admit("worker[x]: failed for 'y'", EVERY) is None


def test_one_kind_does_not_hide_another():
    flood = Flood()
    for _ in range(BURST + 1):
        flood.admit("rejected connection from banned IP: 192.0.2.1", 0.0)
    assert flood.admit("rejected connection from banned IP: 192.0.2.2", 0.0) is None
    assert flood.admit("initialized ocserv", 0.0) == 0


@given(st.lists(st.text(max_size=20), max_size=300))
def test_whatever_is_made_up_kinds_stay_few(texts):
    flood = Flood()
    for text in texts:
        flood.admit(text, 0.0)
    assert len(flood._kinds) <= KINDS + 1


@given(st.lists(st.tuples(st.sampled_from(["a", "b 1", "b 2"]), st.floats(0, 100)), max_size=500))
def test_every_line_is_written_or_counted(steps):
    flood, now, written = Flood(), 0.0, 0
    for text, pause in steps:
        now += pause
        missing = flood.admit(text, now)
        written += 0 if missing is None else 1 + missing
    assert written + sum(missing for _, _, missing in flood._kinds.values()) == len(steps)


def test_what_is_logged_cannot_command_a_terminal_or_make_up_a_line(caplog):
    log = logging.getLogger("test of strangers")
    log.addFilter(Filter(lambda: 0.0))
    with caplog.at_level(logging.INFO):
        log.info("%s: %s", "ocserv", "user '\x1b]0;title\x07\n2026 ERROR made up'")
    (record,) = caplog.records
    assert record.getMessage().count("\N{REPLACEMENT CHARACTER}") == 3
    assert record.getMessage().isprintable()
    assert printable("plain äöü 'text'") == "plain äöü 'text'"
