"""Whose bytes: the kernel's answers, as they are and as they should not be, and what each task is told."""

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.pilot.account import FORGOTTEN, TRIES, Account, Span, Table, Traffic, alone
from hpcq.pilot.sockdiag import Flow, owners, parse

ESTABLISHED, CLOSED = 1, 7


def answer(
    inode=7, sent=1, received=0, peer="203.0.113.7", own=None, *, port=1094, state=ESTABLISHED, waiting=0, kind=20,
    number=5,
):  # fmt: skip
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    own = own or ("2001:db8::9" if ":" in peer else "192.0.2.9")
    ends = [socket.inet_pton(family, address).ljust(16, b"\0") for address in (own, peer)]
    ports = struct.pack(">HH", 40000, port)
    message = (
        struct.pack("=BBBB", family, state, 0, 0) + ports + b"".join(ends) + bytes(4) + struct.pack("=Q", 1000 + inode)
    )
    message += struct.pack("=5I", 0, 0, waiting, 0, inode)
    info = bytes(120) + struct.pack("=QQ", sent, received) + bytes(60)
    body = message + struct.pack("=HH", 4 + 3, 8) + b"bic\0" + struct.pack("=HH", 4 + len(info), 2) + info
    return struct.pack("=IHHII", 16 + len(body), kind, 2, number, 0) + body


DONE = struct.pack("=IHHIII", 20, 3, 2, 5, 0, 0)


def test_what_opens_a_connection_is_no_byte_of_it_and_what_waits_to_be_acknowledged_is():
    data = answer(7, 101, 2000) + answer(8, 1, 5, "2001:db8::1") + answer(9, 1, 0, waiting=50) + DONE
    assert parse(data, 5) == ([Flow(1007, 7, 100, 2000), Flow(1008, 8, 0, 5), Flow(1009, 9, 50, 0)], True)


def test_what_a_connection_could_not_send_before_it_was_reset_is_not_sent():
    assert parse(answer(0, 11, 3, state=CLOSED, waiting=1, number=0), 0) == ([Flow(1000, 0, 10, 3)], False)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_connections_of_the_loopback_are_left_out(peer):
    assert parse(answer(peer=peer), 5) == ([], False)
    other = "2001:db8::1" if ":" in peer else "198.18.0.1"
    assert parse(answer(peer=other, own=peer), 5) == ([], False)


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_where_there_are_gates_connections_to_these_count_alone(peer):
    data = answer(7, 101, 2000, peer, peer, port=5555) + answer(8, peer=peer, own=peer, port=5556)
    data += answer(9, peer="198.18.0.1", port=5555)
    assert parse(data + DONE, 5, {5555, 6666}) == ([Flow(1007, 7, 100, 2000)], True)


def test_connections_with_itself_are_left_out():
    assert parse(answer(peer="198.18.0.1", own="198.18.0.1"), 5) == ([], False)


def test_an_answer_to_another_question_is_passed_over():
    assert parse(answer(number=99) + answer(number=5), 5)[0] == [Flow(1007, 7, 0, 0)]
    assert parse(answer(number=99) + DONE, 99)[1] is False


def test_a_kernel_without_counters_tells_nothing():
    data = answer()
    short = struct.pack("=I", 16 + 72) + data[4 : 16 + 72]
    assert parse(short, 5) == ([], False)


def test_a_refusal_of_the_kernel_is_raised():
    refusal = struct.pack("=IHHIIi", 36, 2, 0, 5, 0, -2) + bytes(16)
    with pytest.raises(FileNotFoundError):
        parse(refusal, 5)


@given(st.binary(max_size=400), st.integers(0, 5))
def test_any_bytes_come_to_an_end(data, number):
    with contextlib.suppress(OSError):
        parse(data, number)


@given(st.integers(0, 1000), st.binary(min_size=1, max_size=8))
def test_a_damaged_answer_comes_to_an_end(at, damage):
    data = bytearray(answer(7, 100, 2000) + answer(8) + DONE)
    data[at % len(data) : at % len(data) + len(damage)] = damage
    with contextlib.suppress(OSError):
        for flow in parse(bytes(data), 5)[0]:
            assert min(flow) >= 0


def test_our_own_sockets_are_found_in_the_first_tree_that_has_them():
    with socket.socket() as one, socket.socket() as other:
        inodes = [os.fstat(sock.fileno()).st_ino for sock in (one, other)]
        assert owners(inodes, [(4, [0]), (5, [os.getpid()]), (6, [os.getpid()])]) == dict.fromkeys(inodes, 5)
        assert owners([*inodes, 1], []) == {}


# --- what each is told ---


class Story:
    """A table, its lanes 1 and 2 with tasks 10 and 20, and what is there at each look."""

    def __init__(self) -> None:
        self.account = Account()
        self.table = Table(self.account)
        self.heads = {1: 10, 2: 20}
        self.spans = [Span(10, 1, 0.0), Span(20, 2, 0.0)]
        self.account.begin([10, 20])

    def look(self, flows=(), ended=(), owners=None, at=1.0):
        self.table.look(flows, [(at, flow) for flow in ended], owners or {}, self.heads, self.spans)


def flow(cookie, sent, received, inode=None):
    return Flow(cookie, cookie + 100 if inode is None else inode, sent, received)


def gone(cookie, sent, received):
    return flow(cookie, sent, received, inode=0)


def test_two_tasks_at_once_are_told_their_own():
    story = Story()
    story.look([flow(1, 10, 100), flow(2, 20, 200)], owners={101: 1, 102: 2})
    assert story.table.wanted([flow(1, 10, 100), flow(3, 0, 0)]) == {103}
    story.look([flow(1, 15, 150)], [gone(2, 21, 201)])
    assert (story.account.take(10), story.account.take(20)) == (Traffic(15, 150), Traffic(21, 201))
    assert (story.account.total, story.account.unattributed) == (Traffic(36, 351), 0)


def test_what_came_and_went_unseen_is_the_only_tasks():
    story = Story()
    story.spans = [Span(10, 1, 0.5)]
    story.look([flow(1, 1, 1)], [gone(7, 3, 30), gone(8, 4, 40)], {101: 1})
    assert story.account.take(10) == Traffic(8, 71)


def test_what_ended_before_it_began_is_not():
    story = Story()
    story.spans = [Span(10, 1, 1.5)]
    story.look(ended=[gone(7, 3, 30)], at=1.0)
    assert story.account.missed == 33


def test_one_task_after_the_other_is_told_what_ended_in_its_time():
    story = Story()
    story.heads = {1: 10}
    story.spans = [Span(10, 1, 0.0), Span(11, 1, 1.0)]
    story.account.begin([11])
    story.look(ended=[gone(7, 3, 30)], at=0.9)
    story.look(ended=[gone(8, 4, 40)], at=1.1)
    assert (story.account.take(10), story.account.take(11)) == (Traffic(3, 30), Traffic(4, 40))


def test_what_may_be_either_tasks_is_missed_and_who_may_be_told_too_little_is_told_nothing():
    story = Story()
    story.look([flow(1, 500, 500)], [gone(7, 30, 300)], {101: 1})
    assert (story.account.missed, story.account.unattributed) == (330, 330)
    assert story.account.take(10) == Traffic(500, 500)
    assert story.account.take(20) is None
    assert story.account.unattributed == 330


def test_what_was_missed_before_a_task_began_is_not_its_affair():
    story = Story()
    story.look(ended=[gone(7, 30, 300)])
    story.account.begin([10, 11])
    assert story.account.take(11) == Traffic(0, 0)
    assert story.account.take(10) is None


def test_a_connection_that_still_closes_is_the_first_tasks_of_its_lane():
    story = Story()
    story.spans = [Span(10, 1, 0.0), Span(11, 1, 1.0)]
    story.look([gone(7, 30, 300)])
    assert story.account.take(10) == Traffic(30, 300)
    story.spans = [Span(11, 1, 1.0), Span(20, 2, 1.0)]
    story.look([gone(8, 1, 2)])
    assert story.account.missed == 3


def test_a_connection_that_no_task_has_is_nobodys_even_when_one_is_alone():
    story = Story()
    story.spans = [Span(10, 1, 0.0)]
    for _ in range(TRIES):
        story.look([flow(1, 5, 50)])
    story.look(ended=[gone(1, 6, 60)])
    for _ in range(2):
        story.look([flow(2, 5, 50)])
    story.look(ended=[gone(2, 6, 60)])
    assert story.account.take(10) == Traffic(0, 0)
    assert (story.account.total, story.account.unattributed, story.account.missed) == (Traffic(12, 120), 132, 0)


def test_a_connection_that_was_closed_while_its_process_was_looked_for_is_as_one_never_seen():
    story = Story()
    story.spans = [Span(10, 1, 0.0)]
    story.look([flow(1, 5, 50)])
    story.look(ended=[gone(1, 6, 60)])
    assert story.account.take(10) == Traffic(6, 60)
    story.look([flow(2, 5, 50)])
    story.spans = []
    story.look(ended=[gone(2, 6, 60)])
    assert story.account.missed == 66


def test_a_connection_that_is_kept_counts_for_the_next_task_from_there_on():
    story = Story()
    story.look([flow(1, 10, 100)], owners={101: 1})
    assert story.account.take(10) == Traffic(10, 100)
    story.heads = {1: 11}
    story.account.begin([11])
    assert story.table.lanes() == {1}
    story.look([flow(1, 15, 300)])
    assert story.account.take(11) == Traffic(5, 200)


def test_a_connection_that_is_gone_is_waited_for_but_not_for_good():
    story = Story()
    story.look([flow(1, 10, 100)], owners={101: 1})
    story.look()
    assert story.table.awaited() == {1}
    for _ in range(FORGOTTEN):
        story.look()
    assert (story.table.awaited(), story.table.lanes()) == (set(), set())


def test_tasks_that_nobody_asks_for_are_forgotten():
    story = Story()
    story.look([flow(1, 10, 100)], owners={101: 1})
    story.account.keep({20})
    assert story.account.unattributed == 110
    assert not story.account.has_begun(10)


def test_who_was_alone():
    spans = [Span(10, 1, 0.0), Span(11, 1, 1.0), Span(20, 2, 2.0)]
    assert [alone(spans, at) for at in (-0.5, 0.5, 1.5, 2.5)] == [None, spans[0], spans[1], None]
    assert alone([], 1.0) is None


steps = st.lists(
    st.tuples(
        st.dictionaries(
            st.integers(1, 4), st.tuples(st.integers(0, 99), st.integers(0, 99), st.booleans()), max_size=3
        ),
        st.dictionaries(st.integers(1, 6), st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3),
        st.dictionaries(st.integers(101, 104), st.sampled_from([1, 2]), max_size=3),
        st.booleans(),
    ),
    max_size=8,
)


@given(steps)
def test_every_byte_is_counted_once(steps):
    """Whatever is seen, in whatever order: sums never shrink, and are the tasks' and the others'."""
    story = Story()
    before = Traffic()
    for flows, ended, found, both in steps:
        story.spans = story.spans if both else story.spans[:1]
        live = [flow(one, *counts, inode=None if has else 0) for one, (*counts, has) in flows.items()]
        story.look(live, [gone(one, *counts) for one, counts in ended.items()], found)
        account = story.account
        assert account.total >= before
        assert min(account.total.received - before.received, account.unattributed, account.missed) >= 0
        assert account.unattributed + sum(map(sum, account.tasks.values())) == sum(account.total)
        before = account.total
    told = [story.account.take(task) for task in (10, 20)]
    assert sum(sum(one) for one in told if one) + story.account.unattributed == sum(story.account.total)
