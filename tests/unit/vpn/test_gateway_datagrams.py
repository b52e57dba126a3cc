"""What the gateway makes of packets that are not TCP: fragments, new targets, ping; pure."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.gateway import fragments, openings
from vpn.gateway.fragments import Fragments
from vpn.gateway.openings import Openings
from vpn.gateway.policy import Policy
from vpn.relay import packets
from vpn.relay.packets import Endpoint

A, B = (Endpoint(ipaddress.ip_address(text).packed, port) for text, port in (("198.18.0.2", 4000), ("8.8.8.8", 53)))


def cut(packet, size):
    """Its fragments, as the kernel makes them (RFC 791, section 3.2)."""
    body, step = packet[20:], size // 8 * 8
    for start in range(0, len(body), step):
        part = body[start : start + step]
        flags = (start + step < len(body)) << 13 | start // 8
        yield packet[:2] + struct.pack(">H2sH", len(part) + 20, packet[4:6], flags) + packet[8:20] + part


@given(st.lists(st.tuples(st.binary(max_size=4000), st.integers(8, 1500)), min_size=1, max_size=5), st.randoms())
def test_fragments_of_several_datagrams_are_put_together_each_in_its_order(sent, chance):
    waiting = [list(cut(packets.build(A, B, data, number), size)) for number, (data, size) in enumerate(sent)]
    machine, whole = Fragments(), []
    while any(waiting):
        parts = chance.choice([parts for parts in waiting if parts])
        if (done := machine.add(parts.pop(0))) is not None:
            whole.append(packets.parse(done))
    assert sorted(packet.data for packet in whole) == sorted(data for data, _ in sent)
    assert {(packet.source, packet.target) for packet in whole} == {(A, B)}
    assert len(machine) == 0


@given(st.lists(st.binary(max_size=80) | st.builds(lambda more: b"\x45" + more, st.binary(min_size=19, max_size=80))))
def test_nothing_that_comes_breaks_it_and_little_is_kept(garbage):
    machine = Fragments()
    for raw in garbage:
        done = machine.add(raw)
        assert done is None or packets.parse(done) is None or len(done) >= 20
    assert len(machine) <= fragments.PENDING


def test_datagrams_without_an_end_are_forgotten_and_none_grows_beyond_a_packet():
    machine = Fragments()
    for number in range(10_000):
        first, *_ = cut(packets.build(A, B, bytes(100), number), 64)
        assert machine.add(first) is None
    assert len(machine) == fragments.PENDING
    data = bytes(65_504)
    head = packets.build(A, B, b"", 1)[:20]
    for offset, length in ((0, 65_504), (65_504, 1400)):
        packet = head[:2] + struct.pack(">H2sH", length + 20, head[4:6], 0x2000 | offset // 8) + head[8:20]
        assert machine.add(packet + data[:length]) is None
    assert all(len(part) <= fragments.LONGEST for part in machine._parts.values())


def test_a_fragment_that_was_lost_takes_its_datagram_with_it():
    parts = list(cut(packets.build(A, B, bytes(range(200)), 7), 48))
    machine = Fragments()
    assert [machine.add(part) for number, part in enumerate(parts) if number != 1] == [None] * (len(parts) - 1)
    assert len(machine) == 0


def test_many_targets_are_tried_at_once_and_then_so_many_a_second():
    machine = Openings()
    verdicts = [machine.admit(number, 100.0) for number in range(10_000)]
    assert verdicts.count("try") == openings.BURST
    assert set(verdicts[openings.BURST :]) == {"lose"}
    assert machine.lost == 10_000 - openings.BURST
    later = [machine.admit(number, 102.0) for number in range(10_000)]
    assert later.count("try") == 2 * openings.PER_SECOND


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10)), max_size=200))
def test_what_was_refused_is_refused_without_asking_for_a_while(asked):
    machine, now, refused = Openings(), 0.0, {}
    for target, step in asked:
        now += step
        verdict = machine.admit(target, now)
        assert (verdict == "refuse") == (refused.get(target, -1e9) + openings.REFUSED_FOR > now)
        if verdict == "try":
            machine.refused(target, now)
            refused[target] = now


def test_refusals_that_are_remembered_are_bounded():
    machine = Openings()
    for target in range(5000):
        machine.refused(target, 0.0)
    assert machine.admit(4999, 1.0) == "refuse"
    assert machine.admit(0, 1.0) == "try"
    assert machine.admit(4999, openings.REFUSED_FOR) == "try"
    assert not machine._refused


@given(st.binary(min_size=2, max_size=2000), st.integers(0, 65535), st.integers(0, 65535))
def test_an_echo_request_is_taken_as_it_is_built(rest, identifier, number):
    source, target = Endpoint(A.address, identifier), Endpoint(B.address, 0)
    packet = packets.parse(packets.build_echo(source, target, rest, number, reply=False))
    assert packets.take_echo(packet) == (identifier, rest)
    assert packets.checksum(packet.raw[20:]) == packets.checksum(packet.raw[:20]) == 0
    answer = packets.build_echo(target, source, rest, number)
    assert packets.take_echo(packets.parse(answer)) is None
    assert (answer[20], answer[24:26], answer[26:]) == (0, packet.raw[24:26], rest)


def summed(data):
    """RFC 1071, as it is written."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0")) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@given(st.binary(max_size=200) | st.builds(bytes, st.integers(0, 9)) | st.integers(0, 9).map(lambda n: b"\xff" * n))
def test_checksums_are_those_of_the_rfc(data):
    assert packets.checksum(data) == summed(data)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_an_echo_request_that_is_cut_short_is_none(size):
    whole = packets.build_echo(A, B, bytes(2), 1, reply=False)
    packet = whole[:2] + struct.pack(">H", 20 + size) + whole[4 : 20 + size]
    assert packets.take_echo(packets.parse(packet)) is None


def test_only_numbered_packets_may_be_fragmented():
    assert packets.build(A, B, b"x")[4:8] == bytes.fromhex("00004000")
    assert packets.build(A, B, b"x", 0x1234)[4:8] == bytes.fromhex("12340000")


@pytest.mark.parametrize(("options", "code"), [({}, 3), ({"host": True}, 1), ({"host": True, "denied": True}, 13)])
def test_refusals_say_what_cannot_be_reached(options, code):
    message = packets.unreachable(packets.build(A, B, b"x"), **options)
    assert (message[12:16], message[16:20], message[20], message[21]) == (B.address, A.address, 3, code)


@pytest.mark.parametrize(
    ("rules", "address", "allowed"),
    [
        ((), "8.8.8.8", True),
        ((), "10.1.2.3", False),
        ((), "192.0.2.1", False),
        (("8.8.8.8:53",), "8.8.8.8", True),
        (("8.8.8.8:53",), "9.9.9.9", False),
        (("10.1.0.0/16:88",), "10.1.2.3", True),
        (("*.example.org:80",), "8.8.8.8", False),
    ],
)
def test_ping_goes_where_any_port_is_open(rules, address, allowed):
    verdict = Policy(rules, ["192.0.2.1"]).decide(ipaddress.ip_address(address), None)
    assert verdict.allowed == allowed
    assert "port" not in verdict.reason
    assert "None" not in verdict.reason


def test_a_host_that_a_rule_names_may_be_pinged():
    assert Policy(["*.example.org:80"]).decide(ipaddress.ip_address("8.8.8.8"), None, {"a.example.org"}).allowed
