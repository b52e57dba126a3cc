"""Packets for the tests of vpn/preload/tun_*, and the C of it made a library or a program."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import vpn

PRELOAD = Path(vpn.__file__).parent / "preload"
HEADER = 10  # struct virtio_net_hdr
FIN, SYN, PSH, ACK, URG, ECE, CWR = 1, 2, 8, 16, 32, 64, 128


def build(directory: Path, source: str, *options: str) -> Path:
    """Compile a C source that includes what is in vpn/preload."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (directory / "t.c").write_text(source)
    flags = ["-std=gnu11", "-O2", "-D_FORTIFY_SOURCE=0", "-Wall", "-Werror", "-Wno-unused-function", f"-I{PRELOAD}"]
    command = [*compiler.split(), *flags, *options, "-o", directory / "t", directory / "t.c", "-ldl"]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    return directory / "t"


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(
    payload, *, six=False, port=80, sequence=0, acknowledged=7, flags=ACK, number=0, options=b"", window=512,
    urgent=0, fragment=0x4000, extra=b"",
):  # fmt: skip
    """A whole packet with right checksums. ``extra``: IP options, or a whole IPv6 extension header."""
    offset = (5 + len(options) // 4) << 4
    tcp = struct.pack(">HHIIBBHHH", port, 4000, sequence & 0xFFFFFFFF, acknowledged, offset, flags, window, 0, urgent)
    tcp += options + payload
    addresses = (b"\x20\x01" + bytes(13) + b"\1" + b"\x20\x01" + bytes(13) + b"\2") if six else b"\xc0\0\2\1\xc0\0\2\2"
    right = checksum(addresses + struct.pack(">HH", 6, len(tcp)) + tcp)
    tcp = tcp[:16] + struct.pack(">H", right) + tcp[18:]
    if six:
        return struct.pack(">IHBB", 6 << 28, len(extra + tcp), 60 if extra else 6, 64) + addresses + extra + tcp
    first, whole = 0x45 + len(extra) // 4, 20 + len(extra + tcp)
    ip = struct.pack(">BBHHHBBH", first, 0, whole, number & 0xFFFF, fragment, 64, 6, 0) + addresses + extra
    return ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:] + tcp
