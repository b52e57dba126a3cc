"""The packets of a tun device, joined and cut again (preload/tun_gro.h, preload/tun_gso.h)."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vpn

PRELOAD = Path(vpn.__file__).parent / "preload"
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
HEADER = 10  # struct virtio_net_hdr
FIN, SYN, PSH, ACK = 1, 2, 8, 16


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("packets")
    (directory / "t.c").write_text(SOURCE)
    flags = ["-std=gnu11", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unused-function", f"-I{PRELOAD}"]
    subprocess.run([*compiler.split(), *flags, "-o", directory / "t.so", directory / "t.c"], check=True)
    found = ctypes.CDLL(str(directory / "t.so"))
    found.t_take.restype = found.t_give.restype = ctypes.c_size_t
    return found


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(payload, *, six=False, port=80, sequence=0, acknowledged=7, flags=ACK, number=0, options=b"", window=512):
    """A whole packet with right checksums."""
    tcp = struct.pack(
        ">HHIIBBHHH", port, 4000, sequence & 0xFFFFFFFF, acknowledged, (5 + len(options) // 4) << 4, flags, window, 0, 0
    )
    tcp += options + payload
    addresses = (b"\x20\x01" + bytes(13) + b"\1" + b"\x20\x01" + bytes(13) + b"\2") if six else b"\xc0\0\2\1\xc0\0\2\2"
    right = checksum(addresses + struct.pack(">HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack(">H", right) + tcp[18:]
    if six:
        return struct.pack(">IHBB", 6 << 28, len(tcp), 6, 64) + addresses + tcp
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), number & 0xFFFF, 0x4000, 64, 6, 0) + addresses
    return ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:] + tcp


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
        kind = dice.choice(["data"] * 12 + ["short", "push", "end", "nothing", "repeated", "broken", "cut"])
        payload = b"" if kind == "nothing" else dice.randbytes(size if kind != "short" else max(1, size // 2))
        flags = ACK | (PSH if kind == "push" else FIN if kind == "end" else 0)
        packet = segment(
            payload, six=six, port=port, sequence=places[port], flags=flags, number=numbers[port], options=options
        )
        if kind != "repeated":
            places[port] += len(payload)
        numbers[port] += 1
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


def test_what_may_not_be_joined_is_not(library):
    first = segment(b"a" * 100)
    for other in (
        segment(b"b" * 100, sequence=101),
        segment(b"b" * 101, sequence=100),
        segment(b"b" * 100, sequence=100, acknowledged=8),
        segment(b"b" * 100, sequence=100, window=513),
        segment(b"b" * 100, sequence=100, options=b"\1\1\1\1"),
        segment(b"b" * 100, sequence=100, port=81),
        segment(b"b" * 100, sequence=100, flags=ACK | SYN),
        segment(b"b" * 100, sequence=100, six=True),
    ):
        assert written(library, [first, other]) == [bytes(HEADER) + first, bytes(HEADER) + other]


@given(data=st.binary(max_size=200))
def test_anything_the_device_says_is_survived(library, data):
    for packet in cut(library, data):
        assert len(packet) <= len(data)


def test_a_checksum_left_to_us_is_completed(library):
    whole = segment(b"hello")
    pseudo = ~checksum(whole[12:20] + struct.pack(">HH", 6, len(whole) - 20)) & 0xFFFF
    partial = whole[:36] + struct.pack(">H", pseudo) + whole[38:]
    assert cut(library, struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 16) + partial) == [whole]
