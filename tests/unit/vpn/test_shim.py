"""Mode socks: names, questions, the table, and the judgement of the kernel's answers; mode auto's reasons."""

from __future__ import annotations

import ipaddress
import mmap
import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn.config import Credential, Secret, TunnelConfig
from vpn.modes.auto import refused_by_settings
from vpn.modes.slirp import has_ipv6_route, in_order, search_domains
from vpn.relay import dns
from vpn.shim import requests as q
from vpn.shim.gate import is_waiting
from vpn.shim.names import POOL, BadNameError, NamePool, PoolEmptyError, Seen, plain_name
from vpn.shim.table import (
    DIRECT_LIMIT,
    HEADER_SIZE,
    PENDING,
    SIZE,
    Table,
    TooManyNetworksError,
    pack_address,
    unpack_address,
)
from vpn.surroundings import check_clock_against, check_route

addresses = st.ip_addresses()
ports = st.integers(0, 65535)
LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=5).map(".".join)


@given(st.lists(NAME, max_size=50))
def test_names_and_addresses_stand_for_each_other(names):
    pool = NamePool()
    given_ = {name: pool.address_of(name) for name in names}
    assert len(set(given_.values())) == len(given_)
    for name, address in given_.items():
        assert address in POOL
        assert pool.address_of(name.upper() + ".") == address
        assert pool.name_of(address) == name
        assert pool.name_of(ipaddress.IPv6Address(pack_address(address))) == name


@given(addresses)
def test_an_address_that_was_not_given_has_no_name(address):
    pool = NamePool()
    pool.address_of("a.example")
    if address != ipaddress.ip_address("198.18.0.1"):
        assert pool.name_of(address) is None


def test_the_pool_has_an_end():
    pool = NamePool(capacity=2)
    pool.address_of("a")
    pool.address_of("b")
    assert pool.address_of("a")
    with pytest.raises(PoolEmptyError):
        pool.address_of("c")


@pytest.mark.parametrize("name", ["", ".", "-a", "a-", "a..b", "a b", "x" * 64, ".".join(["abcdefgh"] * 30), "é"])
def test_bad_names(name):
    with pytest.raises(BadNameError):
        plain_name(name)


@given(st.lists(st.tuples(NAME, addresses), max_size=30))
def test_the_last_name_of_an_address_counts_and_the_oldest_are_forgotten(pairs):
    seen = Seen(limit=10)
    for name, address in pairs:
        seen.learn(name, [address])
    last = {address: name for name, address in pairs}
    kept = [address for address in last if seen.name_of(address) is not None]
    assert len(kept) <= 10
    assert all(seen.name_of(address) == last[address] for address in kept)
    if pairs:
        assert seen.name_of(pairs[-1][1]) == pairs[-1][0]


@given(addresses)
def test_addresses_keep_their_meaning(address):
    mapped = address.version == 6 and address.ipv4_mapped
    assert unpack_address(pack_address(address)) == (mapped or address)


@given(st.booleans(), ports, st.integers(0, 2**64 - 1), addresses, ports, addresses)
def test_a_connect_is_read_as_the_library_writes_it(six, port, inode, local, local_port, address):
    packed = struct.pack(
        "=cBH4xQ16s16sH6x", b"C", six, port, inode, pack_address(local), pack_address(address), local_port
    )
    wanted = q.parse(packed)
    assert isinstance(wanted, q.Connect)
    assert (wanted.six, wanted.port, wanted.inode, wanted.local_port) == (six, port, inode, local_port)
    assert pack_address(wanted.address) == pack_address(address)


@given(st.binary(max_size=q.PACKET_LIMIT))
def test_any_packet_is_a_question_or_refused(data):
    try:
        q.parse(data)
    except ValueError:
        return


@given(st.lists(addresses, max_size=40))
def test_answers_hold_what_the_library_takes(found):
    answer = q.name_answer(0, found)
    assert len(answer) == 4 + 16 * min(len(found), q.ADDRESS_LIMIT)


def test_the_table_is_as_the_library_reads_it():
    table = Table(1234, 0, [ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/32")])
    try:
        with mmap.mmap(table.fd, SIZE, prot=mmap.PROT_READ) as view:
            assert struct.unpack_from("=IHHI", view) == (0x314B5356, 1234, 0, 2)
            assert struct.unpack_from("=16sI", view, 12)[1] == 120
            assert struct.unpack_from("=16sI", view, 32)[1] == 32
            address = ipaddress.ip_address("198.51.100.7")
            table.begin(six=True, port=5, inode=77, address=address, remote_port=80)
            at = HEADER_SIZE + (65536 + 5) * 32
            assert struct.unpack_from("=Q16sHHi", view, at) == (77, pack_address(address), 80, 0, PENDING)
            table.end(six=True, port=5, outcome=111)
            assert struct.unpack_from("=i", view, at + 28) == (111,)
        with pytest.raises(PermissionError):
            mmap.mmap(table.fd, SIZE)  # whoever is given it can only read
    finally:
        table.close()


def test_a_table_has_room_for_so_many_networks():
    with pytest.raises(TooManyNetworksError, match="at most 128"):
        Table(1, 0, [ipaddress.ip_network(f"10.0.{n}.0/24") for n in range(DIRECT_LIMIT + 1)])


def diag(state, inode):
    body = struct.pack("=BBBB48xIIIII", 2, state, 0, 0, 0, 0, 0, 0, inode)
    return struct.pack("=IHHII", 16 + len(body), 20, 0, 0, 0) + body


def test_what_the_kernel_says_of_a_socket():
    assert is_waiting(diag(2, 77), 77)
    assert not is_waiting(diag(2, 78), 77)  # another's
    assert not is_waiting(diag(10, 77), 77)  # a listener
    gone = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -2)
    assert not is_waiting(gone, 77)
    assert is_waiting(struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -95), 77)  # a kernel that cannot tell


@given(st.binary(max_size=200))
def test_any_answer_of_the_kernel_is_judged(data):
    assert is_waiting(data, 1) in (True, False)


@given(NAME, st.sampled_from([dns.A, dns.AAAA]))
def test_a_question_is_one(name, kind):
    query = dns.question(name, kind)
    assert dns.failure(query)[12:] == query[12:]
    assert dns.has_failed(dns.failure(query))
    assert struct.unpack(">HH", query[-4:]) == (kind, 1)


def credential(**more):
    return Credential(("192.0.2.1",), 4433, "pin-sha256:" + "A" * 43 + "=", "u", Secret("p"), **more)


def test_what_settings_refuse():
    assert set(refused_by_settings(TunnelConfig("auto"))) == {"relay", "openconnect", "socks"}
    assert set(refused_by_settings(TunnelConfig("auto", socks=("h", 1)))) == {"relay", "openconnect"}
    assert set(refused_by_settings(TunnelConfig("auto", credential()))) == {"relay", "socks"}
    assert refused_by_settings(TunnelConfig("auto", credential(relay_port=1))) == {}


def test_routes_and_search_lists(tmp_path):
    file = tmp_path / "f"
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    file.write_text(head + "eth0\t0202000A\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0\n")
    assert not check_route(file).ok
    file.write_text(head + "eth0\t00000000\t010200C0\t3\t0\t0\t0\t00000000\t0\t0\t0\n")
    assert check_route(file).ok
    assert not check_route(tmp_path / "none").ok
    zero = "0" * 32
    file.write_text(f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo\n")
    assert not has_ipv6_route(file)
    file.write_text(f"{zero} 00 {zero} 00 {zero} 00000400 00000001 00000000 00000003     eth0\n")
    assert has_ipv6_route(file)
    file.write_text("search a.example\nnameserver 192.0.2.1\nsearch b.example c.example\n")
    assert search_domains(file) == ["b.example", "c.example"]
    assert search_domains(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("date", "ok"),
    [("Mon, 01 Jan 2024 00:00:00 GMT", False), (None, False), ("nonsense", False)],
)
def test_clocks(date, ok):
    assert check_clock_against(date, time.time(), "http://x/").ok is ok
    assert check_clock_against("Thu, 01 Jan 1970 00:00:30 GMT", 0, "http://x/").ok


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("pasta 2024_05_23.765eb0b", "pasta"), ("pasta 0^20250121.g4f2c8e7-1.fc41", "pasta"),
        ("pasta 0.0~git20230309.7c7625d-1", "slirp4netns"), ("pasta unknown version", "slirp4netns"),
        ("", "slirp4netns"),
    ],
)  # fmt: skip
def test_an_old_pasta_is_the_last_resort(version, first):
    both = in_order(["pasta", "slirp4netns"], version)
    assert both[0] == first
    assert sorted(both) == ["pasta", "slirp4netns"]
    assert in_order(["pasta"], version) == ["pasta"]
    assert in_order(["slirp4netns"], "") == ["slirp4netns"]
