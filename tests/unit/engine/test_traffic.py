"""Counting a task's bytes: the kernel's answers, as they are and as they should not be, and whose they are."""

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.pilot.traffic import Account, Flow, Traffic, flows, inodes, open_diagnosis, parse


def answer(inode, sent, received, peer="203.0.113.7", kind=20, number=socket.AF_INET):
    address = socket.inet_pton(socket.AF_INET6 if ":" in peer else socket.AF_INET, peer).ljust(16, b"\0")
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    ends = struct.pack(">HH", 40000, 1094) + bytes(16) + address + bytes(12)
    message = struct.pack("=BBBB", family, 1, 0, 0) + ends + struct.pack("=5I", 0, 0, 0, 0, inode)
    info = bytes(120) + struct.pack("=QQ", sent, received) + bytes(60)
    body = message + struct.pack("=HH", 4 + 3, 8) + b"bic\0" + struct.pack("=HH", 4 + len(info), 2) + info
    return struct.pack("=IHHII", 16 + len(body), kind, 2, number, 0) + body


DONE = struct.pack("=IHHIII", 20, 3, 2, socket.AF_INET, 0, 0)


def test_sockets_with_a_peer_elsewhere_are_counted():
    found = []
    data = answer(7, 101, 2000) + answer(8, 1, 5, "2001:db8::1") + DONE
    assert parse(data, socket.AF_INET, found)
    assert found == [Flow(7, 100, 2000), Flow(8, 0, 5)]


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"])
def test_connections_to_the_node_itself_are_not(peer):
    found = []
    assert not parse(answer(7, 100, 2000, peer), socket.AF_INET, found)
    assert not found


def test_an_answer_to_another_question_is_passed_over():
    found = []
    assert not parse(answer(7, 100, 2000, number=99) + DONE.replace(b"\2\0\0\0\0", b"\x63\0\0\0\0"), 2, found)
    assert not found


def test_a_refusal_of_the_kernel_is_raised():
    refusal = struct.pack("=IHHIIi", 36, 2, 0, socket.AF_INET, 0, -2) + bytes(16)
    with pytest.raises(FileNotFoundError):
        parse(refusal, socket.AF_INET, [])


@given(st.binary(max_size=400))
def test_any_bytes_come_to_an_end(data):
    with contextlib.suppress(OSError):
        parse(data, socket.AF_INET, [])


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_answer_comes_to_an_end(at, byte):
    data = bytearray(answer(7, 100, 2000) + DONE)
    data[at % len(data)] = byte
    with contextlib.suppress(OSError):
        parse(bytes(data), socket.AF_INET, [])


def test_closed_sockets_still_count_and_others_do_not():
    account = Account()
    assert account.look({1, 2}, [Flow(1, 10, 100), Flow(3, 5, 5)]) == Traffic(10, 100)
    assert account.look({2}, [Flow(2, 1, 1)]) == Traffic(11, 101)


def test_a_connection_that_is_kept_counts_for_the_next_task_from_there_on():
    account = Account()
    account.look({1}, [Flow(1, 10, 100)])
    account.begin()
    assert account.look({1}, [Flow(1, 10, 100)]) == Traffic(0, 0)
    assert account.look({1}, [Flow(1, 15, 300)]) == Traffic(5, 200)


def test_a_number_that_is_used_again_is_another_socket():
    account = Account()
    account.look({1}, [Flow(1, 10, 100)])
    account.begin()
    assert account.look({1}, [Flow(1, 2, 3)]) == Traffic(2, 3)


def test_the_kernel_answers_and_our_own_sockets_are_found():
    with open_diagnosis() as diagnosis:
        assert isinstance(flows(diagnosis), list)
        assert os.fstat(diagnosis.fileno()).st_ino in inodes([os.getpid()])
