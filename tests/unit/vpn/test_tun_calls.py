"""The calls of a program whose device is handed to it (preload/tun_from_fd.c), with a socket in the device's place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tun_packets import ACK, HEADER, PSH, build, checksum, segment

SOURCE = """
#include "tun_from_fd.c"
static unsigned long asked[2];
static int refuses; /* what is joined */
static ssize_t (*libc_write)(int, const void *, size_t);
static int t_ioctl(int fd, request_type request, ...)
{
    va_list arguments;

    va_start(arguments, request);
    asked[0] = (unsigned)request + 0UL * (unsigned)fd;
    asked[1] = va_arg(arguments, unsigned long);
    va_end(arguments);
    return 0;
}
static ssize_t t_write(int fd, const void *data, size_t length)
{
    if (refuses && fd == duplicate && ((const unsigned char *)data)[1] != 0) {
        errno = EINVAL;
        return -1;
    }
    return libc_write(fd, data, length);
}
int t_begin(int fd, int with_headers, int refuse)
{
    *(void **)&libc_write = resolve("write");
    real_ioctl = t_ioctl;
    real_write = t_write;
    asked[0] = asked[1] = 0;
    injected = fd;
    headers = with_headers;
    refuses = refuse;
    held.length = unwritten = got.at = got.length = 0;
    waits = refused = armed = 0;
    memset(watches, 0, sizeof(watches));
    memset(kinds, 0, sizeof(kinds));
    stream.fd = -1;
    return open("/dev/net/tun", O_RDWR);
}
unsigned long t_asked(int which) { return asked[which]; }
"""
TUNGETIFF, TUNSETIFF, TUNSETOFFLOAD = 0x800454D2, 0x400454CA, 0x400454D0
WAYS = ("select", "poll", "epoll")
SIZE = 1000


class Epoll(ctypes.Structure):
    """struct epoll_event, packed as on x86."""

    _pack_ = 1 if os.uname().machine in {"x86_64", "i686"} else 8
    _layout_ = "ms"
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


class Poll(ctypes.Structure):
    """struct pollfd."""

    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


@dataclass
class Program:
    """One that has opened the device as descriptor ``fd``; what it calls is the shim's."""

    shim: ctypes.CDLL
    fd: int
    kernel: socket.socket
    epoll: int

    def write(self, packet):
        """0, or the error."""
        done = self.shim.write(self.fd, packet, len(packet))
        assert done in {-1, len(packet)}
        return 0 if done != -1 else ctypes.get_errno()

    def read(self, room=65536):
        """A packet, or the error."""
        buffer = ctypes.create_string_buffer(room)
        count = self.shim.read(self.fd, buffer, room)
        return buffer.raw[:count] if count != -1 else ctypes.get_errno()

    def watch(self, events=select.EPOLLIN, operation=3):
        """How epoll watches the device."""
        event = Epoll(events, 0xFEED)
        assert self.shim.epoll_ctl(self.epoll, operation, self.fd, ctypes.byref(event)) == 0

    def wait(self, way, milliseconds=0, *, device=True):
        """Whether the device counts as readable; ``device``: whether that is asked."""
        if way == "select":
            read = bytearray(128)
            if device:
                read[self.fd // 8] |= 1 << self.fd % 8
            sets = (ctypes.c_char * 128).from_buffer(read)
            limit = (ctypes.c_long * 2)(milliseconds // 1000, milliseconds % 1000 * 1000)
            count = self.shim.select(
                self.fd + 1, sets if device else None, None, None, limit if milliseconds >= 0 else None
            )
            assert count == sum(byte.bit_count() for byte in read) or not device
            return bool(count)
        if way == "poll":
            polls = (Poll * 2)(Poll(-1, select.POLLIN, 0), Poll(self.fd, select.POLLIN if device else 0, 0))
            count = self.shim.poll(polls, 2, milliseconds)
            assert polls[0].revents == 0
            assert polls[1].revents in {0, select.POLLIN}
            assert count == (polls[1].revents != 0)
            return bool(count)
        self.watch(select.EPOLLIN if device else 0)
        events = (Epoll * 2)()
        count = self.shim.epoll_wait(self.epoll, events, 2, milliseconds)
        assert count == 0 or (count, events[0].events, events[0].data) == (1, select.EPOLLIN, 0xFEED)
        return bool(count)

    def arrived(self):
        """What the kernel got, without asking for more."""
        packets = []
        while True:
            try:
                packets.append(self.kernel.recv(1 << 17))
            except BlockingIOError:
                return packets

    def fill(self):
        """Leave the device no room; how many packets that took."""
        count = 0
        while True:
            try:
                os.write(self.fd, b"full")
                count += 1
            except BlockingIOError:
                return count


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = ctypes.CDLL(
        str(build(tmp_path_factory.mktemp("calls"), SOURCE, "-fPIC", "-shared", "-Wl,-Bsymbolic")), use_errno=True
    )
    library.t_asked.restype = ctypes.c_ulong
    library.read.restype = library.write.restype = ctypes.c_ssize_t
    library.read.argtypes = library.write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    library.recv.restype = library.send.restype = ctypes.c_ssize_t
    library.recv.argtypes = library.send.argtypes = (*library.read.argtypes, ctypes.c_int)
    return library


@pytest.fixture
def start(shim):
    """Begins a program; ``waited``: that has waited for its device, as openconnect does before anything comes."""
    opened = []

    def begin(*, headers=True, refuses=False, waited=True):
        device, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        kernel.setblocking(False)
        device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        program = Program(shim, shim.t_begin(device.fileno(), headers, refuses), kernel, shim.epoll_create1(0))
        opened.append((device, program))
        program.watch(operation=1)
        assert not waited or not program.wait("epoll")
        return program

    yield begin
    for device, program in opened:
        shim.close(program.fd)
        os.close(program.epoll)
        device.close()
        program.kernel.close()


def stream(count, first=0, **options):
    return [
        segment(bytes([n % 256]) * SIZE, sequence=n * SIZE, number=n, **options) for n in range(first, first + count)
    ]


def whole(count):
    """What the kernel hands over for that many segments, with its header; and those."""
    packet = segment(b"".join(bytes([n]) * SIZE for n in range(count)))
    pseudo = ~checksum(packet[12:20] + struct.pack(">HH", 6, len(packet) - 20)) & 0xFFFF
    packet = packet[:36] + struct.pack(">H", pseudo) + packet[38:]
    return struct.pack("=BBHHHH", 1, 1, 40, SIZE, 20, 16) + packet, stream(count)


def joins(data, count):
    """Whether that is so many segments."""
    return data[1] == 1 and len(data) == HEADER + 40 + count * SIZE


def test_one_that_was_not_seen_to_wait_for_it_gets_packets_one_by_one(start):
    program = start(waited=False)
    packets = stream(3)
    for way in ("select", "poll"):
        program.wait(way, device=False)
    assert [program.write(packet) for packet in packets] == [0, 0, 0]
    assert program.arrived() == [bytes(HEADER) + packet for packet in packets]
    assert program.shim.t_asked(0) == 0


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_held_while_the_program_waits(start, way):
    program = start(waited=False)
    program.wait(way)
    assert (program.shim.t_asked(0), program.shim.t_asked(1)) == (TUNSETOFFLOAD, 1 | 2 | 4)
    for device in (True, False):
        assert [program.write(packet) for packet in stream(3)] == [0, 0, 0]
        assert program.arrived() == []
        program.wait(way, device=device)
        [data] = program.arrived()
        assert joins(data, 3)


def test_nothing_is_held_when_the_program_reads_or_closes(start):
    program = start()
    for end in (program.read, lambda: program.shim.close(program.fd)):
        program.write(stream(1)[0])
        assert program.arrived() == []
        end()
        assert program.arrived() == [bytes(HEADER) + stream(1)[0]]


def test_packets_keep_their_order(start):
    program = start()
    first, second, third = stream(3)
    others = [b"\x45" + bytes(30), segment(b"", sequence=5), segment(b"a", port=81, flags=ACK | PSH), b"\x60"]
    for other in others:
        for packet in (first, second, other, third):
            assert program.write(packet) == 0
        program.wait("poll")
        joined, alone, last = program.arrived()
        assert joins(joined, 2)
        assert alone == bytes(HEADER) + other
        assert last == bytes(HEADER) + third


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_where_the_device_has_no_room(start, way):
    program = start()
    packets = stream(5)
    assert [program.write(packet) for packet in packets[:2]] == [0, 0]
    full = program.fill()
    assert not program.wait(way, -1)  # it does not wait for ever, though nobody else will wake it
    assert program.write(packets[2]) == errno.EAGAIN
    assert program.write(b"\x45 another") == errno.EAGAIN
    assert program.arrived() == [b"full"] * full
    assert [program.write(packet) for packet in packets[2:]] == [0] * 3
    program.wait(way)
    first, second = program.arrived()
    assert joins(first, 2)
    assert joins(second, 3)


def test_a_packet_that_cannot_be_held_is_refused_where_there_is_no_room(start):
    program = start()
    full = program.fill()
    assert program.write(b"\x45 another") == errno.EAGAIN
    assert program.arrived() == [b"full"] * full


def test_what_the_kernel_does_not_take_joined_it_gets_as_it_came(start):
    program = start(refuses=True)
    packets = stream(4)
    for packet in packets[:3]:
        program.write(packet)
    program.wait("epoll")
    assert program.arrived() == [bytes(HEADER) + packet for packet in packets[:3]]
    program.write(packets[3])  # and from then on nothing is held
    assert program.arrived() == [bytes(HEADER) + packets[3]]


@pytest.mark.parametrize("way", WAYS)
def test_the_device_is_readable_while_packets_are_left(start, way):
    program = start()
    data, packets = whole(5)
    program.kernel.send(data)
    assert program.wait(way, -1)
    for packet in packets:
        assert program.wait(way, -1)  # also now that the kernel has nothing left
        assert not program.wait(way, device=False)
        assert program.read() == packet
    assert not program.wait(way)
    assert program.read() == errno.EAGAIN


@pytest.mark.parametrize("way", WAYS)
def test_it_is_readable_once_when_the_kernel_has_more_too(start, way):
    program = start()
    data, packets = whole(2)
    program.kernel.send(data)
    assert program.read() == packets[0]
    program.kernel.send(bytes(HEADER) + b"\x45 another")
    assert program.wait(way, -1)
    assert [program.read(), program.read(), program.read()] == [packets[1], b"\x45 another", errno.EAGAIN]


def test_another_epoll_does_not_tell_of_the_device(start):
    program = start()
    data, _ = whole(2)
    program.kernel.send(data)
    program.read()
    other = program.shim.epoll_create1(0)
    events = (Epoll * 2)()
    assert program.shim.epoll_wait(other, events, 2, 0) == 0
    os.close(other)
    assert program.shim.epoll_ctl(program.epoll, 2, program.fd, None) == 0
    assert program.shim.epoll_wait(program.epoll, events, 2, 0) == 0
    program.watch(operation=1)
    assert program.shim.epoll_wait(program.epoll, events, 2, 0) == 1


def test_what_is_too_long_for_the_program_is_not_its_end(start):
    """A read that gives nothing would be the device's end to it."""
    program = start()
    data, packets = whole(3)
    program.kernel.send(data)
    assert program.read(len(packets[0]) - 1) == errno.EAGAIN
    program.kernel.send(bytes(HEADER) + b"\x45 cut off as by the kernel")
    assert program.read(3) == b"\x45 c"
    for nothing in (b"\1", bytes(HEADER), struct.pack("=BBHHHH", 1, 1, 40, SIZE, 20, 16) + b"\x45 no TCP"):
        program.kernel.send(nothing)
        program.kernel.send(bytes(HEADER) + b"\x45 next")
        assert program.read() == b"\x45 next"


def test_another_file_may_get_the_number(start):
    program = start()
    data, _ = whole(3)
    program.kernel.send(data)
    program.read()
    program.shim.close(program.fd)
    ends = socket.socketpair()
    number = os.dup2(ends[0].fileno(), program.fd)
    assert program.write(b"as it is") == 0
    assert ends[1].recv(100) == b"as it is"
    ends[1].send(b"and back")
    assert program.wait("poll", -1)
    assert program.read() == b"and back"
    assert not program.wait("poll")
    assert not program.wait("select")
    for end in ends:
        end.close()
    assert number == program.fd


def test_a_device_without_headers_is_left_alone(start):
    program = start(headers=False, waited=False)
    for way in WAYS:
        program.wait(way)
    assert program.shim.t_asked(0) == 0
    packets = stream(2)
    assert [program.write(packet) for packet in packets] == [0, 0]
    assert program.arrived() == packets
    program.kernel.send(packets[0])
    assert program.read() == packets[0]


def test_it_is_told_the_name_of_the_device(start):
    program = start(waited=False)
    assert program.shim.ioctl(program.fd, ctypes.c_ulong(TUNSETIFF), ctypes.c_ulong(9)) == 0
    assert (program.shim.t_asked(0), program.shim.t_asked(1)) == (TUNGETIFF, 9)
    assert program.shim.open(b"/dev/vhost-net", os.O_RDWR) == -1
    assert ctypes.get_errno() == errno.ENOENT


# --- its connection to the server ----------------------------------------------------------------------------------


class Connection:
    """A stream whose one end the program has; what it calls is the shim's."""

    def __init__(self, program, *, blocking=False):
        self.program, self.shim = program, program.shim
        self.mine, self.server = socket.socketpair()
        self.mine.setblocking(blocking)
        self.server.setblocking(False)
        self.fd = self.mine.fileno()

    def send(self, data, call="send"):
        """How many bytes were taken, or the negative error."""
        done = self.shim.write(self.fd, data, len(data)) if call == "write" else self._send(data)
        return done if done != -1 else -ctypes.get_errno()

    def _send(self, data):
        return self.shim.send(self.fd, data, len(data), socket.MSG_NOSIGNAL)

    def receive(self, count, flags=0):
        """Bytes, or the error."""
        buffer = ctypes.create_string_buffer(max(count, 1))
        got = self.shim.recv(self.fd, buffer, count, flags)
        return buffer.raw[:got] if got != -1 else ctypes.get_errno()

    def arrived(self):
        """What the server has got."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while part := self.server.recv(1 << 20):
                data += part
        return data

    def wait(self, way, milliseconds=0, *, room=False, input=True):
        """Wait for the device and the connection: whether it counts as readable, and as writable."""
        if way == "select":
            read, write = bytearray(128), bytearray(128)
            for wanted, fds in ((True, read), (input, read), (room, write)):
                fd = self.program.fd if fds is read and wanted is True and not read.strip(b"\0") else self.fd
                if wanted:
                    fds[fd // 8] |= 1 << fd % 8
            sets = [(ctypes.c_char * 128).from_buffer(one) for one in (read, write)]
            limit = (ctypes.c_long * 2)(milliseconds // 1000, milliseconds % 1000 * 1000)
            self.shim.select(1023, sets[0], sets[1] if room else None, None, limit if milliseconds >= 0 else None)
            return tuple(bool(fds[self.fd // 8] & 1 << self.fd % 8) for fds in (read, write))
        if way == "poll":
            wanted = (select.POLLIN if input else 0) | (select.POLLOUT if room else 0)
            polls = (Poll * 2)(Poll(self.program.fd, select.POLLIN, 0), Poll(self.fd, wanted, 0))
            self.shim.poll(polls, 2, milliseconds)
            return tuple(bool(polls[1].revents & one) for one in (select.POLLIN, select.POLLOUT))
        event = Epoll((select.EPOLLIN if input else 0) | (select.EPOLLOUT if room else 0), 0xBEEF)
        known = 3 if self.program.shim.epoll_ctl(self.program.epoll, 1, self.fd, ctypes.byref(event)) else 0
        if known:
            assert self.shim.epoll_ctl(self.program.epoll, known, self.fd, ctypes.byref(event)) == 0
        events = (Epoll * 4)()
        count = self.shim.epoll_wait(self.program.epoll, events, 4, milliseconds)
        found = [one.events for one in events[:count] if one.data == 0xBEEF]
        assert len(found) <= 1
        assert all(one.events for one in events[:count])
        return tuple(bool(found and found[0] & one) for one in (select.EPOLLIN, select.EPOLLOUT))

    def fill(self):
        """Leave the kernel no room; what it took."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += b"f" * self.mine.send(b"f" * 65536)
        return data


@pytest.fixture
def connect(start):
    opened = []

    def begin(*, waited=True, blocking=False):
        connection = Connection(start(waited=waited), blocking=blocking)
        opened.append(connection)
        return connection

    yield begin
    for connection in opened:
        if connection.mine.fileno() != -1:
            connection.shim.close(os.dup(connection.fd))
            connection.mine.close()
        connection.server.close()


RECORD = b"r" * 1400


@pytest.mark.parametrize("way", WAYS)
def test_records_go_together_when_the_program_waits(connect, way):
    connection = connect()
    for number in range(3):
        assert connection.send(RECORD, ("send", "write")[number % 2]) == len(RECORD)
    assert connection.arrived() == b""
    connection.wait(way)
    assert connection.arrived() == 3 * RECORD
    assert connection.wait(way, room=True) == (False, True)


def test_no_more_than_a_segment_offload_is_held_and_large_records_are_not(connect):
    connection = connect()
    sent = b""
    while not (came := connection.arrived()):
        data = bytes([len(sent) % 251]) * 1400
        connection.send(data)
        sent += data
    assert len(sent) - 1400 == len(came) <= 65536
    large = b"L" * 16000
    assert connection.send(large) == 16000
    assert came + connection.arrived() == sent + large


@pytest.mark.parametrize("options", [{"waited": False}, {"blocking": True}])
def test_one_that_did_not_wait_yet_or_a_connection_that_blocks_is_left_alone(connect, options):
    connection = connect(**options)
    connection.send(RECORD)
    assert connection.arrived() == RECORD
    connection.server.send(b"abc")
    assert connection.receive(1) == b"a"
    assert connection.mine.recv(2) == b"bc"


def test_datagrams_and_second_connections_are_left_alone(connect):
    connection = connect()
    connection.send(RECORD)
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        ends = socket.socketpair(type=kind)
        ends[0].setblocking(False)
        assert connection.shim.send(ends[0].fileno(), b"one", 3, 0) == 3
        assert ends[1].recv(10) == b"one"
        connection.shim.close(os.dup(ends[0].fileno()))
        connection.shim.close(ends[0].detach())
        ends[1].close()
    assert connection.arrived() == b""


@pytest.mark.parametrize("way", WAYS)
def test_it_is_readable_while_some_that_came_is_left(connect, way):
    connection = connect()
    connection.server.send(b"head!" + b"b" * 100 + b"next!")
    assert connection.wait(way, -1) == (True, False)
    assert connection.receive(5) == b"head!"
    assert connection.receive(5, socket.MSG_PEEK) == b"b" * 5
    assert connection.receive(100) == b"b" * 100
    assert connection.wait(way, -1) == (True, False)  # the kernel has nothing left
    assert connection.wait(way, input=False) == (False, False)
    assert connection.receive(100) == b"next!"
    assert connection.wait(way) == (False, False)
    assert connection.receive(5) == errno.EAGAIN


def test_large_records_are_received_where_they_go(connect):
    connection = connect()
    connection.server.send(b"12345" + b"x" * 16000 + b"67890")
    assert connection.receive(5) + connection.receive(16000) + connection.receive(5) == (
        b"12345" + b"x" * 16000 + b"67890"
    )
    connection.server.send(b"12345abc")
    assert connection.receive(5) == b"12345"
    assert connection.mine.recv(10) == b"abc"


def test_its_end_is_its_end_and_what_cannot_be_sent_an_error(connect):
    connection = connect()
    connection.server.send(b"last")
    connection.server.close()
    assert (connection.receive(5), connection.receive(5)) == (b"last", b"")
    assert connection.send(RECORD) == len(RECORD)
    connection.wait("poll")
    assert connection.send(RECORD) == -errno.EPIPE
    assert connection.send(RECORD) == -errno.EPIPE


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_lost_where_the_kernel_has_no_room(connect, way):
    connection = connect()
    expected = connection.fill()
    taken = b""
    while connection.send(RECORD) == len(RECORD):
        taken += RECORD
    assert 60000 < len(taken) <= 65536
    assert connection.send(RECORD) == -errno.EAGAIN
    assert connection.wait(way, 1) == (False, False)
    got = b""
    while len(got) < len(expected + taken):  # the program waits for nothing but its device, and is not woken for more
        got += connection.arrived()
        assert connection.wait(way, -1 if way != "poll" and len(got) < len(expected) else 1) == (False, False)
    assert got == expected + taken
    assert connection.send(RECORD) == len(RECORD)
    assert connection.wait(way, -1, room=True) == (False, True)
    assert connection.arrived() == RECORD


def test_what_is_held_goes_before_it_is_closed_and_another_may_get_the_number(connect):
    connection = connect()
    connection.send(RECORD)
    connection.server.send(b"unread")
    assert connection.receive(1) == b"u"
    number = connection.mine.detach()
    connection.shim.close(number)
    assert connection.arrived() == RECORD
    ends = socket.socketpair()
    os.dup2(ends[0].fileno(), number)
    os.set_blocking(number, False)
    connection.fd = number
    assert connection.receive(5) == errno.EAGAIN
    ends[1].send(b"new")
    assert connection.receive(5) == b"new"
    connection.shim.close(number)
    ends[1].close()
    if number != ends[0].fileno():
        ends[0].close()
    else:
        ends[0].detach()
    connection.mine = socket.socket()


def test_a_child_sends_nothing_of_its_parents(connect):
    connection = connect()
    connection.send(RECORD)
    child = os.fork()
    if child == 0:
        connection.shim.close(connection.fd)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert connection.arrived() == b""
    connection.wait("epoll")
    assert connection.arrived() == RECORD


steps = st.one_of(
    st.tuples(st.sampled_from(("send", "come", "receive")), st.integers(1, 9000)),
    st.tuples(st.just("wait"), st.sampled_from(WAYS)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(steps, max_size=60))
def test_every_byte_arrives_once_and_in_order(connect, script):
    connection = connect()
    sent, arrived, came, received = (bytearray() for _ in range(4))
    for what, how in script:
        if what == "wait":
            readable, _ = connection.wait(how)
            assert readable == (len(received) < len(came))
            arrived += connection.arrived()
            assert arrived == sent
        elif what == "receive":
            got = connection.receive(how)
            received += b"" if got == errno.EAGAIN else got
            assert (got == errno.EAGAIN) == (len(received) == len(came) and not isinstance(got, bytes))
        else:
            data = bytes((len(sent) + n) % 251 for n in range(how))
            if what == "send":
                assert connection.send(data) == how
                sent += data
            else:
                came += data[: connection.server.send(data)]
    assert came.startswith(received)
