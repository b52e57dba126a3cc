"""SOCKS5, DNS and IP packets as bytes: what is given can be taken, however it is cut; nothing else breaks anything."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from dnslib import AAAA, CNAME, QTYPE, RR, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from vpn.relay import dns, packets, socks5
from vpn.relay.packets import Endpoint
from vpn.relay.socks5 import Datagram, Login, Reply, Request, SocksError, Target

names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?", fullmatch=True).filter(lambda name: not is_address(name))
ports = st.integers(0, 65535)
targets = st.builds(Target, st.one_of(names, st.ip_addresses().map(str)), ports)
rests = st.binary(max_size=40)


def is_address(text):
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def taken(take, data, rest):
    """A message is incomplete however it is cut short, and complete with anything behind it."""
    for cut in range(len(data)):
        assert take(data[:cut]) is None
    value, used = take(data + rest)
    assert used == len(data)
    return value


@given(st.lists(st.integers(0, 255), max_size=255), rests)
def test_greeting(methods, rest):
    assert taken(socks5.take_greeting, socks5.give_greeting(*methods), rest) == tuple(methods)


@given(st.integers(0, 255), rests)
def test_method(method, rest):
    assert taken(socks5.take_method, socks5.give_method(method), rest) == method


@given(st.text(max_size=60), st.text(max_size=60), rests)
def test_login(username, password, rest):
    login = taken(socks5.take_login, socks5.give_login(username, password), rest)
    assert login == Login(username.encode(), password.encode())
    assert len(socks5.give_login(username, password)) <= socks5.LONGEST


@given(st.booleans(), rests)
def test_login_answer(accepted, rest):
    assert taken(socks5.take_login_answer, socks5.give_login_answer(accepted=accepted), rest) is accepted


@given(st.integers(0, 255), targets, rests)
def test_request_and_reply(number, target, rest):
    assert taken(socks5.take_request, socks5.give_request(number, target), rest) == Request(number, target)
    assert taken(socks5.take_reply, socks5.give_reply(number, target), rest) == Reply(number, target)


@given(targets, st.binary(max_size=200), st.booleans(), rests)
def test_datagram(target, data, unreachable, rest):
    datagram = Datagram(target, data, unreachable)
    assert taken(socks5.take_datagram, socks5.give_datagram(datagram), rest) == datagram


@given(st.binary(max_size=300), rests)
def test_dns_in_a_stream(message, rest):
    assert taken(socks5.take_message, socks5.give_message(message), rest) == message


TAKERS = [
    socks5.take_greeting, socks5.take_method, socks5.take_login, socks5.take_login_answer, socks5.take_request,
    socks5.take_reply, socks5.take_datagram, socks5.take_message,
]  # fmt: skip


@pytest.mark.parametrize("take", TAKERS)
@given(data=st.binary(max_size=600))
def test_any_bytes_are_a_message_or_incomplete_or_an_error(take, data):
    try:
        found = take(data)
    except SocksError:
        return
    assert found is None or 0 < found[1] <= len(data)
    if take not in (socks5.take_datagram, socks5.take_message) and len(data) > socks5.LONGEST:
        assert found is not None  # no message is longer: nobody can have more and more read


@pytest.mark.parametrize(
    "give",
    [
        lambda: socks5.give_login("x" * 256, ""),
        lambda: socks5.give_request(1, Target("", 1)),
        lambda: socks5.give_request(1, Target("x" * 256, 1)),
        lambda: socks5.give_request(1, Target("bücher.example", 1)),
        lambda: socks5.give_datagram(Datagram(Target("192.0.2.1", 1), bytes(65536))),
    ],
)
def test_what_cannot_be_said_is_an_error(give):
    with pytest.raises(SocksError):
        give()


@pytest.mark.parametrize("name", [b"a b", b"a\0b", b"\xff", b"a\nb"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(SocksError):
        socks5.take_request(b"\5\1\0\3" + bytes([len(name)]) + name + b"\0\1")


def query(name="a.example.org", kind="A"):
    return bytes(DNSRecord.question(name, kind).pack())


def answer(asked, *records):
    reply = DNSRecord.parse(asked).reply()
    for record in records:
        reply.add_answer(record)
    return bytes(reply.pack())


def test_addresses_are_found_through_aliases():
    asked = query("A.example.org")
    said = answer(
        asked,
        RR("a.example.org", QTYPE.CNAME, rdata=CNAME("b.example.org"), ttl=5),
        RR("b.example.org", QTYPE.A, rdata=A("192.0.2.7"), ttl=60),
        RR("b.example.org", QTYPE.AAAA, rdata=AAAA("2001:db8::7"), ttl=30),
        RR("c.example.org", QTYPE.A, rdata=A("192.0.2.8"), ttl=30),
    )
    found = dns.resolved(said)
    assert found.name == "a.example.org"
    assert [str(address) for address in found.addresses] == ["192.0.2.7", "2001:db8::7"]
    assert found.ttl == 30
    assert dns.answers(asked, said)
    assert not dns.answers(query("b.example.org"), said)
    assert not dns.answers(asked, asked)
    assert dns.resolved(asked) is None
    assert dns.resolved(answer(asked)) is None


def test_an_answer_that_is_too_long_says_so():
    asked = query()
    said = answer(asked, *[RR("a.example.org", QTYPE.A, rdata=A(f"192.0.2.{n}")) for n in range(60)])
    short = DNSRecord.parse(dns.truncated(said, dns.udp_limit(asked)))
    assert short.header.tc
    assert not short.rr
    assert str(short.q.qname) == "a.example.org."
    assert dns.truncated(said, len(said)) == said
    large = bytearray(asked)
    large[10:12] = b"\0\1"
    assert dns.udp_limit(bytes(large) + b"\0\0\x29\x10\0\0\0\0\0\0\0") == 4096


def test_a_failure_is_an_answer():
    asked = query()
    failed = DNSRecord.parse(dns.failure(asked))
    assert failed.header.rcode == 2
    assert dns.answers(asked, dns.failure(asked))
    assert dns.id_of(dns.with_id(asked, 7)) == 7


@given(st.binary(min_size=12, max_size=200), st.binary(max_size=400))
def test_any_bytes_survive_as_dns(asked, said):
    dns.resolved(said) if len(said) > 2 else None
    dns.answers(asked, said)
    dns.udp_limit(asked)
    assert len(dns.failure(asked)) <= len(asked) + 12
    if len(said) >= dns.SHORTEST:
        assert len(dns.truncated(said, 512)) <= max(512, 12 + 255 + 5)


@given(st.binary(max_size=40), st.integers(12, 255))
def test_a_pointer_that_loops_is_refused(body, value):
    message = struct.pack(">6H", 1, 0x8180, 1, 1, 0, 0) + bytes([0xC0, value]) + body
    assert dns.resolved(message) is None


addresses = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)


@given(addresses, ports, ports, st.binary(max_size=300))
def test_udp_packets(pair, sport, dport, data):
    source, target = Endpoint(pair[0].packed, sport), Endpoint(pair[1].packed, dport)
    raw = packets.build(source, target, data)
    packet = packets.parse(raw)
    assert (packet.source, packet.target, packet.data, packet.raw) == (source, target, data, raw)
    start = 20 if pair[0].version == 4 else 40
    if start == 20:
        assert packets.checksum(raw[:20]) == 0
    pseudo = source.address + target.address + struct.pack(">IxxxB", len(raw) - start, 17)
    assert packets.checksum(pseudo + raw[start:]) in (0, 0xFFFF)


@given(addresses, ports, st.binary(max_size=2000), st.booleans())
def test_icmp_goes_back_and_quotes(pair, port, data, denied):
    raw = packets.build(Endpoint(pair[0].packed, port), Endpoint(pair[1].packed, port), data)
    message = packets.parse(packets.unreachable(raw, denied=denied))
    assert message.protocol in (packets.ICMP, packets.ICMP6)
    assert (message.source.address, message.target.address) == (pair[1].packed, pair[0].packed)
    start = 20 if pair[0].version == 4 else 40
    assert raw.startswith(message.raw[start + 8 :][: start + 8])
    body = message.raw[start:]
    pseudo = b"" if start == 20 else pair[1].packed + pair[0].packed + struct.pack(">IxxxB", len(body), 58)
    assert packets.checksum(pseudo + body) in (0, 0xFFFF)


@given(st.binary(max_size=200))
def test_any_bytes_survive_as_a_packet(raw):
    packet = packets.parse(raw)
    assert packet is None or raw.startswith(packet.raw)
