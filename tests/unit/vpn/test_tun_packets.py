"""The packets of a tun device, joined and cut again (preload/tun_gro.h, preload/tun_gso.h)."""

from __future__ import annotations

import ctypes
import random
import struct
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tun_packets import ACK, CWR, ECE, FIN, HEADER, PSH, SYN, URG, build, checksum, segment

SOURCE = """
#include <string.h>
#include "tun_gro.h"
#include "tun_gso.h"
static struct batch batch;
static struct super super;
int t_add(const unsigned char *p, size_t n) { return add(&batch, p, n); }
int t_closed(void) { return batch.length != 0 && batch.closed; }
size_t t_take(unsigned char *to)
{
    size_t length = batch.length ? take(&batch) : 0;
    memcpy(to, batch.data, length);
    return length;
}
int t_accept(const unsigned char *p, size_t n) { memcpy(super.data, p, n); return accept_packet(&super, n); }
size_t t_give(unsigned char *to, size_t room) { return super.at == super.length ? 0 : give(&super, to, room); }
"""
WATCHED = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "tun_gro.h"
#include "tun_gso.h"
static struct batch batch;
static struct super super;
int main(void)
{
    unsigned length;

    while (fread(&length, 4, 1, stdin) == 1) {
        unsigned char *data = malloc(length), *packet = malloc(length - HEADER);
        size_t room = length % 3 ? 65536 : length / 2;
        if (fread(data, 1, length, stdin) != length) {
            return 1;
        }
        memcpy(packet, data + HEADER, length - HEADER);
        if (!add(&batch, packet, length - HEADER) && batch.length != 0) {
            take(&batch);
            add(&batch, packet, length - HEADER);
        }
        memcpy(super.data, data, length);
        for (accept_packet(&super, length); super.at < super.length;) {
            unsigned char *to = malloc(room);
            give(&super, to, room);
            free(to);
        }
        free(data);
        free(packet);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    found = ctypes.CDLL(str(build(tmp_path_factory.mktemp("packets"), SOURCE, "-fPIC", "-shared")))
    found.t_take.restype = found.t_give.restype = ctypes.c_size_t
    return found


def written(library, packets):
    """What the shim writes to the device for these, each with its header."""
    buffer = ctypes.create_string_buffer(1 << 17)

    def flush():
        if length := library.t_take(buffer):
            out.append(buffer.raw[:length])

    out: list[bytes] = []
    for packet in packets:
        if not library.t_add(packet, len(packet)):
            flush()
            if not library.t_add(packet, len(packet)):
                out.append(bytes(HEADER) + packet)
                continue
        if library.t_closed():
            flush()
    flush()
    return out


def cut(library, data):
    """The packets the shim gives the program for one of the device's."""
    buffer = ctypes.create_string_buffer(1 << 17)
    out = []
    if library.t_accept(data, len(data)):
        while length := library.t_give(buffer, 65536):
            out.append(buffer.raw[:length])
    return out


KINDS = {
    "push": {"flags": ACK | PSH},
    "end": {"flags": ACK | FIN},
    "urgent": {"flags": ACK | URG, "urgent": 1},
    "stale": {"urgent": 5},
    "congestion": {"flags": ACK | ECE},
    "reduced": {"flags": ACK | CWR},
    "options": {"extra": bytes([1] * 8)},
    "fragment": {"fragment": 0x2000},
}


@st.composite
def streams(draw):
    """Packets of a few connections as they may arrive: some altered, some that end, repeat or carry nothing."""
    dice = random.Random(draw(st.integers(0, 1 << 32)))
    size = draw(st.sampled_from([1, 2, 7, 536, 1447, 1448, 15932]))
    options = draw(st.sampled_from([b"", b"\1\1\x08\x0a" + bytes(8)]))
    six = draw(st.booleans())
    ports = draw(st.sampled_from([[80], [80, 81]]))
    places = {port: draw(st.sampled_from([0, 0xFFFFFFF0, 0x7FFFFFFF])) for port in ports}
    packets, numbers = [], dict.fromkeys(ports, 65530)
    for _ in range(draw(st.integers(1, 60))):
        port = dice.choice(ports) if dice.random() < 0.1 else ports[0]
        kind = dice.choice(["data"] * 16 + list(KINDS) + ["short", "nothing", "repeated", "broken", "altered", "cut"])
        payload = b"" if kind == "nothing" else dice.randbytes(size if kind != "short" else max(1, size // 2))
        packet = segment(
            payload, six=six, port=port, sequence=places[port], number=numbers[port], options=options,
            **KINDS.get(kind, {}),
        )  # fmt: skip
        if kind != "repeated":
            places[port] += len(payload)
        numbers[port] += 1
        if kind == "altered":  # a bit of the headers
            place = dice.randrange(min(len(packet), 72))
            packet = packet[:place] + bytes([packet[place] ^ 1 << dice.randrange(8)]) + packet[place + 1 :]
        if kind == "broken":
            packet = packet[:-1] + bytes([packet[-1] ^ 1])
        packets.append(packet[:-1] if kind == "cut" else packet)
    return packets


@settings(deadline=None)
@given(packets=streams())
@example(packets=[b"", b"\x45", bytes(40), b"\x45" + bytes(39), b"\x60" + bytes(59)])
def test_what_is_joined_is_cut_into_the_same_again(library, packets):
    given_back = [packet for data in written(library, packets) for packet in cut(library, data)]
    assert given_back == [packet for packet in packets if packet]


@pytest.mark.parametrize("six", [False, True])
def test_segments_in_order_become_one_packet(library, six):
    size, count = 1448, 40
    packets = [segment(bytes([n]) * size, six=six, sequence=n * size, number=n) for n in range(count)]
    [data] = written(library, packets)
    flags, kind, head, gso, start, offset = struct.unpack_from("=BBHHHH", data)
    ip = 40 if six else 20
    assert (flags, kind, head, gso, start, offset) == (1, 4 if six else 1, ip + 20, size, ip, 16)
    assert len(data) == HEADER + ip + 20 + size * count
    assert written(library, packets[:1]) == [bytes(HEADER) + packets[0]]  # alone, it goes as it came


@pytest.mark.parametrize(
    "other",
    [
        {"sequence": 101},
        {"payload": b"b" * 101},
        {"acknowledged": 8},
        {"window": 513},
        {"options": b"\1\1\1\1"},
        {"port": 81},
        {"flags": ACK | SYN},
        {"flags": ACK | CWR},
        {"flags": ACK | ECE},
        {"flags": ACK | FIN},
        {"flags": 0},
        {"urgent": 1},
        {"number": 2},
        {"number": 0, "fragment": 0},
        {"fragment": 0},
        {"fragment": 0x6000},
        {"extra": bytes([1] * 4)},
        {"six": True},
        {},
    ],
    ids=str,
)
def test_what_may_not_be_joined_is_not(library, other):
    first = segment(b"a" * 100, fragment=0 if other.get("number") == 0 else 0x4000)
    second = segment(**({"payload": b"b" * 100, "sequence": 100, "number": 1} | other))
    alone = [bytes(HEADER) + first, bytes(HEADER) + second]
    assert (written(library, [first, second]) == alone) == bool(other)  # with nothing other, they are joined


def test_a_wrong_checksum_is_not_made_right(library):
    packets = [segment(bytes([n]) * 100, sequence=n * 100, number=n) for n in range(3)]
    for place in (8, 10, 15, 36, 139):  # of the packet in the middle; the first two are in the IP header
        broken = bytearray(packets[1])
        broken[place] ^= 1
        given_ = [packets[0], bytes(broken), packets[2]]
        assert written(library, given_) == [bytes(HEADER) + packet for packet in given_]


def test_one_identification_for_all_is_not_one_that_counts(library):
    """As some systems give packets that may not be fragmented."""
    packets = [segment(b"a" * 100, sequence=n * 100) for n in range(3)]
    [data] = written(library, packets)
    assert [packet[20:] for packet in cut(library, data)] == [packet[20:] for packet in packets]
    packets[2] = segment(b"a" * 100, sequence=200, number=2)
    assert len(written(library, packets)) == 2


@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("length", [0, 8, 16])
def test_what_the_kernel_hands_over_whole_is_cut(library, six, length):
    """``length``: of IP options, or of an IPv6 extension header. The last segment alone ends, the first alone says
    that the window was reduced.
    """
    extra = (
        b"" if not length else bytes([6, length // 8 - 1, 1, length - 4]) + bytes(length - 4) if six else b"\1" * length
    )
    payload = random.Random(1).randbytes(3500)
    common = {"six": six, "extra": extra, "options": b"\1\1\1\1"}
    whole = segment(payload, flags=ACK | PSH | FIN | CWR | ECE, sequence=0xFFFFFF00, number=65535, **common)
    start = len(whole) - len(payload) - 24
    addresses = whole[8:40] if six else whole[12:20]
    pseudo = ~checksum(addresses + struct.pack(">HH", 6, len(whole) - start)) & 0xFFFF
    whole = whole[: start + 16] + struct.pack(">H", pseudo) + whole[start + 18 :]
    header = struct.pack("=BBHHHH", 1, 4 if six else 1, 0, 1400, start, 16)
    assert cut(library, header + whole) == [
        segment(payload[:1400], flags=ACK | ECE | CWR, sequence=0xFFFFFF00, number=65535, **common),
        segment(payload[1400:2800], flags=ACK | ECE, sequence=0xFFFFFF00 + 1400, number=0, **common),
        segment(payload[2800:], flags=ACK | ECE | PSH | FIN, sequence=0xFFFFFF00 + 2800, number=1, **common),
    ]


def test_no_byte_beyond_a_packet_is_touched(library, tmp_path):
    """The same with a compiler that watches over memory: packets of all kinds, each in a room of its own size."""
    try:
        program = build(tmp_path, WATCHED, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    except subprocess.CalledProcessError:
        pytest.skip("the C compiler has no sanitizers")
    dice, data = random.Random(7), []
    for _ in range(800):
        six, length = dice.random() < 0.5, dice.choice([0, 1, 9, 100, 1448, 30000])
        packet = bytearray(
            segment(
                bytes(length), six=six, options=bytes(4 * dice.randrange(11)),
                extra=b"" if six else bytes(4 * dice.randrange(11)),
            )
        )  # fmt: skip
        start = 40 if six else (packet[0] & 15) * 4
        header = bytearray(struct.pack("=BBHHHH", 1, dice.choice([0, 1, 4]), 54, dice.choice([1, 7, 1448]), start, 16))
        for altered in (header, packet[: start + 20]):
            if dice.random() < 0.7:
                altered[dice.randrange(len(altered))] = dice.randrange(256)
            if altered is not header:
                packet[: len(altered)] = altered
        packet = packet[: dice.randrange(len(packet) + 1)] if dice.random() < 0.1 else packet
        data.append(struct.pack("=I", HEADER + len(packet)) + header + packet)
    done = subprocess.run([program], input=b"".join(data), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@given(data=st.binary(max_size=200))
def test_anything_the_device_says_is_survived(library, data):
    for packet in cut(library, data):
        assert len(packet) <= len(data)


def test_a_checksum_left_to_us_is_completed(library):
    whole = segment(b"hello")
    pseudo = ~checksum(whole[12:20] + struct.pack(">HH", 6, len(whole) - 20)) & 0xFFFF
    partial = whole[:36] + struct.pack(">H", pseudo) + whole[38:]
    assert cut(library, struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 16) + partial) == [whole]
