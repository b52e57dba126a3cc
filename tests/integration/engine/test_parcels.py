"""Arguments and results too large for messages: what arrives, what happens when something breaks on the way."""

import os
import pickle
import resource
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import cloudpickle
import pytest
from running import DEADLINE, appears, begun, call, eventually, note_and_wait, ready, run, wait

import hpcq
from hpcq import connection
from hpcq import messages as m
from hpcq.errors import ProtocolError
from hpcq.files import haul
from hpcq.files.wire import DataError
from hpcq.parcels import Parcel
from hpcq.serialize import LARGE

cloudpickle.register_pickle_by_value(sys.modules[__name__])

MB = 1 << 20


class Block:
    """As arrays do: its data is left out of the pickle."""

    def __init__(self, data):
        self.data = data

    def __reduce_ex__(self, protocol):
        return Block, (pickle.PickleBuffer(self.data),)

    def __eq__(self, other):
        return type(other).__name__ == "Block" and bytes(self.data) == bytes(other.data)

    __hash__ = None


def same(*args, **kwargs):
    return args, kwargs


def sizes(value):
    return [len(item) for item in value]


class Gate:
    """Holds a method up in the middle of a parcel, in this process: the manager's side."""

    def __init__(self, monkeypatch, method):
        self.reached, self.open = threading.Event(), threading.Event()
        original = getattr(haul.Haul, method)

        def held_up(on, *args):
            self.reached.set()
            assert self.open.wait(DEADLINE)
            return original(on, *args)

        monkeypatch.setattr(haul.Haul, method, held_up)

    def wait(self):
        assert self.reached.wait(DEADLINE), "no parcel has come by"


@pytest.mark.parametrize("isolation", ["warm", "fork", "fresh"])
def test_anything_large_goes_there_and_back(queue, pilot, isolation):
    block = Block(bytearray(os.urandom(3 * MB)))
    for value in (os.urandom(2 * MB), "é" * MB, ["text"] * MB, list(range(MB)), block, [block, {"again": block}, 1]):
        task = run(queue, call(same, value, [1], named=value).set(isolation=isolation))
        assert task.outcome == "success", task.message
        assert task.output == ((value, [1]), {"named": value})


@pytest.mark.parametrize("size", [LARGE - 100, LARGE - 1, LARGE, LARGE + 1, 2 * LARGE + 63])
def test_around_the_size_from_which_they_travel_apart(queue, pilot, size):
    for value in (bytes(size), Block(bytearray(size))):
        assert run(queue, call(same, value)).output == ((value,), {})


def spoil(block):
    block.data[:3] = b"new"
    return block


def test_arguments_and_results_are_writable_and_everybodys_own(queue, pilot):
    block = Block(bytearray(40 * MB))  # so large that it is mapped on this side too
    first, second = (run(queue, call(spoil, block)).output for _ in range(2))
    assert bytes(block.data[:3]) == bytes(3)
    assert bytes(first.data[:4]) == b"new\0"
    first.data[:3] = b"own"
    assert bytes(second.data[:3]) == b"new"
    fixed = run(queue, call(same, Block(bytes(2 * MB)))).output[0][0]
    assert fixed.data.readonly


def test_arguments_are_as_they_were_at_submit(queue, start_pilot):
    block = Block(bytearray(2 * MB))
    queue.submit(call(same, block))
    block.data[:] = b"x" * len(block.data)
    start_pilot(queue)
    assert wait(queue).output[0][0] == Block(bytes(2 * MB))


def fail_with(size):
    raise ValueError(b"x" * size)


def test_a_large_exception(queue, pilot):
    task = run(queue, call(fail_with, 5 * MB))
    assert task.outcome == "exception"
    assert task.exception.args == (b"x" * 5 * MB,)
    assert "fail_with" in str(task.exception.__cause__)


def test_a_task_that_dies_after_a_large_one_leaves_nothing_to_the_next(queue, pilot):
    for isolation in ("warm", "fork"):
        tasks = [
            call(same, b"a" * LARGE), call(os._exit, 3), call(same, b"b" * LARGE),
        ]  # fmt: skip
        for task in tasks:
            queue.submit(task.set(isolation=isolation, tag=isolation))
        assert {queue.wait_for_tag(isolation, DEADLINE) for _ in tasks} == set(tasks)
        assert [task.outcome for task in tasks] == ["success", "crash", "success"]
        assert tasks[2].output == ((b"b" * LARGE,), {})


def test_with_files_too(queue, pilot, tmp_path):
    def read(data):
        Path("out").write_bytes(Path("in").read_bytes())
        return data

    task = run(
        queue,
        call(read, b"y" * 2 * MB).set(inputs={"in": hpcq.Buffer(b"some")}, outputs={"out": str(tmp_path / "out")}),
    )
    assert (task.outcome, task.output) == ("success", b"y" * 2 * MB)
    assert (tmp_path / "out").read_bytes() == b"some"


def test_through_map_and_executor(queue, pilot):
    assert list(queue.map(sizes, [[bytes(2 * MB)], [bytes(3 * MB)]])) == [[2 * MB], [3 * MB]]
    with hpcq.Executor(queue) as executor:
        assert executor.submit(same, Block(bytes(2 * MB))).result(DEADLINE)[0][0] == Block(bytes(2 * MB))


def test_what_cannot_be_pickled_is_told_by_name(queue, pilot):
    task = run(queue, call(same, bytes(2 * MB), threading.Lock()))
    assert task.outcome == "unserializable"
    assert "argument 2" in task.message


# --- others, meanwhile ---


def test_small_tasks_overtake_parcels(queue, start_pilot, monkeypatch):
    start_pilot(queue, cores=2)
    ready(queue, 1)
    gate = Gate(monkeypatch, "send_parcel")
    large = call(sizes, [bytes(2 * MB)])
    queue.submit(large)
    gate.wait()
    assert [run(queue, call(abs, -number)).output for number in range(20)] == list(range(20))
    gate.open.set()
    assert wait(queue) is large
    assert large.output == [2 * MB]


def test_more_parcels_than_a_pilot_takes_at_a_time(queue, start_pilot):
    for _ in range(3):
        start_pilot(queue, cores=2)
    tasks = [call(same, number.to_bytes(4) * (LARGE // 4)) for number in range(150)]
    for task in tasks:
        queue.submit(task)
    for _ in tasks:
        assert wait(queue).outcome == "success"
    assert [task.output for task in tasks] == [(task.args, {}) for task in tasks]


# --- what breaks ---


def test_a_pilot_killed_while_it_fetches(queue, start_pilot, monkeypatch):
    first = start_pilot(queue)
    ready(queue, 1)
    gate = Gate(monkeypatch, "send_parcel")
    task = call(sizes, [bytes(8 * MB)])
    queue.submit(task)
    gate.wait()
    first.process.kill()
    first.wait()
    gate.open.set()
    start_pilot(queue)
    assert wait(queue) is task
    assert task.output == [8 * MB]


def test_a_pilot_killed_while_it_brings(queue, start_pilot, monkeypatch):
    first = start_pilot(queue)
    ready(queue, 1)
    gate = Gate(monkeypatch, "receive_parcel")
    task = call(bytes, 8 * MB)
    queue.submit(task)
    gate.wait()
    first.process.kill()
    first.wait()
    gate.open.set()
    start_pilot(queue)
    assert wait(queue) is task
    assert (task.outcome, task.attempts, task.output) == ("success", 2, bytes(8 * MB))
    assert not queue._manager.depot._arrived


def test_a_connection_that_breaks_is_made_again(queue, pilot, monkeypatch):
    original = haul.Haul.receive_parcel
    broken = []

    def breaks_once(on, parcel, size):
        if not broken:
            broken.append(on)
            on.hang_up()
        return original(on, parcel, size)

    monkeypatch.setattr(haul.Haul, "receive_parcel", breaks_once)
    task = run(queue, call(bytes, 4 * MB))
    assert broken
    assert (task.outcome, task.attempts, task.output) == ("success", 1, bytes(4 * MB))
    assert "again" in pilot.said()


@pytest.mark.parametrize("method", ["send_parcel", "receive_parcel"])
def test_a_cancel_while_a_parcel_is_under_way(queue, pilot, monkeypatch, method):
    gate = Gate(monkeypatch, method)
    task = call(same, bytes(8 * MB)) if method == "send_parcel" else call(bytes, 8 * MB)
    number = queue.submit(task)
    gate.wait()
    assert queue.cancel(id=number) == 1
    assert wait(queue) is task
    assert task.outcome == "cancelled"
    gate.open.set()
    assert run(queue, call(same, b"z" * 2 * MB)).output == ((b"z" * 2 * MB,), {})
    depot = queue._manager.depot
    assert not depot._outgoing
    assert not depot._reported
    eventually(lambda: queue._manager.call(lambda: not depot._arrived), "what nobody wants any more is not kept")


def test_a_queue_closed_while_parcels_are_under_way(open_queue, start_pilot, monkeypatch):
    queue = open_queue()
    pilot = start_pilot(queue, manager_timeout=0.0)
    ready(queue, 1)
    gate = Gate(monkeypatch, "send_parcel")
    queue.submit(call(same, bytes(8 * MB)))
    gate.wait()
    closing = threading.Thread(target=queue.close)
    closing.start()
    gate.open.set()
    closing.join(DEADLINE)
    assert not closing.is_alive()
    pilot.wait()
    assert "Traceback" not in pilot.said()


def test_a_pilot_told_to_end_brings_what_it_has_first(queue, start_pilot, monkeypatch):
    pilot = start_pilot(queue)
    ready(queue, 1)
    gate = Gate(monkeypatch, "receive_parcel")
    queue.submit(call(bytes, 8 * MB))
    gate.wait()
    pilot.process.terminate()
    eventually(lambda: [view.state for view in queue.pilots()] == ["draining"], "it drains")
    gate.open.set()
    assert wait(queue).output == bytes(8 * MB)
    assert pilot.wait() == 0


def test_nothing_is_left_by_a_program_that_was_killed(place, start_pilot, tmp_path):
    text = """
        import hpcq
        from hpcq.files import haul
        original = haul.Haul.send_parcel
        def send(on, parcel):
            print("sending", flush=True)
            original(on, parcel)
            import time
            time.sleep(600)
        haul.Haul.send_parcel = send
        queue = hpcq.Queue("q", address="127.0.0.1")
        queue._manager.depot.shelf.memory = 0
        queue.submit(hpcq.PythonTask(len, bytes(40 << 20)))
        queue.wait()
    """
    with (tmp_path / "said").open("wb") as said:
        program = subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)], stdout=said, stderr=said)
    try:
        eventually((place.state / "hpcq/q/connection.json").exists, "the queue is there")
        pilot = start_pilot(connection=place.state / "hpcq/q/connection.json", manager_timeout=1.0)
        assert appears(tmp_path / "said") == "sending\n"
    finally:
        program.kill()
        program.wait()
    pilot.wait()
    left = [path for path in place.scratch.rglob("*") if "hpcq-cache" not in str(path)]
    assert not left


# --- where they are ---


def mapped_files(_data):
    maps = Path("/proc/self/maps").read_text()
    return sorted({" ".join(line.split()[5:]) for line in maps.splitlines() if "(deleted)" in line})


@pytest.mark.parametrize(("memory", "where"), [("1000", "memfd:"), ("8", "hpcq-pilot-")])
def test_what_memory_is_not_meant_for_is_on_disk_at_the_pilot(queue, start_pilot, memory, where):
    start_pilot(queue, "--memory", memory)
    ready(queue, 1)
    (there,) = run(queue, call(mapped_files, Block(bytearray(2 * MB)))).output
    assert where in there


def file_of(task):
    return str(Path(f"/proc/self/fd/{task._attempt.load.parcel.descriptor}").readlink())


def test_what_memory_is_not_meant_for_is_on_disk_here(queue, pilot):
    shelf = queue._manager.depot.shelf
    shelf.memory = 50 * MB
    tasks = [call(same, bytes([number]) * 40 * MB) for number in range(3)]
    for task in tasks:
        queue.submit(task)
    ended = [wait(queue) for _ in tasks]
    assert ["memfd" in file_of(task) for task in ended].count(True) == 1
    assert shelf.held <= shelf.memory
    for number, task in enumerate(tasks):
        assert task.output == ((bytes([number]) * 40 * MB,), {})
    tasks.clear()
    ended.clear()
    del task
    eventually(lambda: not shelf.held, "the memory is free")


def test_a_full_disk_here(queue, pilot):
    small = call(bytes, 40 * MB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MB, before[1]))
    try:
        task = run(queue, call(same, bytes(40 * MB)))
        assert task.outcome == "unserializable"
        assert "bytes pickled, cannot be kept: " in task.message
        run(queue, small)
        assert small.outcome == "files"
        assert "its result cannot be kept where the program runs" in small.message
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(queue, call(bytes, 40 * MB)).output == bytes(40 * MB)


# --- strangers and liars ---


def shake_hands(queue, pilot, is_over=lambda: False):
    """A connection for parcels as this pilot opens it."""
    info = queue.connection
    tls = connection.pilot_tls(info)
    return haul.connect(info.addresses, info.port, tls, connection.MANAGER_NAME, pilot, is_over)


def test_connections_of_pilots_that_are_not_here_are_refused(queue):
    with pytest.raises(DataError, match="no pilot p is connected"):
        shake_hands(queue, "p")


def test_who_does_not_know_the_key_gets_nothing_in_the_second_handshake_either(queue, pilot):
    (view,) = queue.pilots()
    info = queue.connection
    tls = connection.pilot_tls(info)
    plain = socket.create_connection((info.addresses[0], info.port), DEADLINE)
    first = haul.Haul(tls.wrap_socket(plain, server_hostname=connection.MANAGER_NAME), "it")
    first.send(m.DataHello(m.PROTOCOL_VERSION, view.name, parcels=True))
    assert isinstance(first.receive(m.FirstAnswer), m.Welcome)
    bare = socket.socket(fileno=first._sock.detach())
    bare.settimeout(DEADLINE)
    bare.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with bare:
        answer = b"".join(iter(lambda: _received(bare), b""))
    assert b"HTTP" not in answer
    assert run(queue, call(same, bytes(2 * MB))).outcome == "success"


def _received(sock):
    try:
        return sock.recv(4096)
    except ConnectionResetError:
        return b""


def test_garbage_costs_its_own_connection_only(queue, pilot):
    (view,) = queue.pilots()
    for message in (m.Heartbeat(), haul.Following(3)):
        on = shake_hands(queue, view.name)
        on.send(message)
        with pytest.raises((DataError, ProtocolError)):
            on.receive(haul.Kept)
        on.close()
    on = shake_hands(queue, view.name)
    on.send(haul.Take(99))
    assert "task 99" in on.receive(haul.Refusal).reason
    on.send(haul.Bring(99, 5))
    on.send_parcel(_parcel(b"12345"))
    assert on.receive(haul.Kept) == haul.Kept("")
    on.close()
    assert run(queue, call(same, bytes(2 * MB))).outcome == "success"


def _parcel(data):
    parcel = Parcel(len(data), -1)
    parcel.write(0, data)
    return parcel


def test_an_unused_connection_makes_room_for_others(queue, pilot, monkeypatch):
    monkeypatch.setattr("hpcq.files.depot.THREADS", 2)
    (view,) = queue.pilots()
    idle = [shake_hands(queue, view.name) for _ in range(2)]
    assert run(queue, call(same, bytes(2 * MB))).outcome == "success"
    for on in idle:
        on.close()


def _busy(queue, monkeypatch):
    """The manager's only thread is at a parcel until the gate is opened; the connection, and the pilot's name."""
    monkeypatch.setattr("hpcq.files.depot.THREADS", 1)
    gate = Gate(monkeypatch, "receive_parcel")
    (view,) = queue.pilots()
    first = shake_hands(queue, view.name)
    first.send(haul.Bring(98, 5))
    first.send_parcel(_parcel(b"12345"))
    gate.wait()
    return gate, first, view.name


def test_a_pilot_waits_for_its_turn_however_long_that_takes(queue, pilot, monkeypatch):
    gate, first, name = _busy(queue, monkeypatch)
    looked, looks, turns = threading.Event(), [], []

    def is_over():
        looks.append(1)
        if len(looks) == 3:
            looked.set()
        return False

    monkeypatch.setattr(haul, "LOOK_AGAIN", 0.05)
    coming = threading.Thread(target=lambda: turns.append(shake_hands(queue, name, is_over)))
    coming.start()
    assert looked.wait(DEADLINE)
    gate.open.set()
    coming.join(DEADLINE)
    (second,) = turns
    for on in (first, second):
        on.close()


def test_a_pilot_whose_manager_is_gone_waits_for_its_turn_no_more(queue, pilot, monkeypatch):
    gate, first, name = _busy(queue, monkeypatch)
    with pytest.raises(DataError, match="did not shake hands"):
        shake_hands(queue, name, lambda: True)
    gate.open.set()
    first.close()


def test_retries_get_the_arguments_again(queue, start_pilot, marks, tmp_path):
    def first_waits(data, directory, until):
        return note_and_wait(directory, until), len(data)

    first = start_pilot(queue)
    ready(queue, 1)
    task = call(first_waits, bytes(2 * MB), marks, tmp_path / "go")
    queue.submit(task)
    begun(marks)
    first.process.kill()
    start_pilot(queue)
    begun(marks, 2)
    (tmp_path / "go").touch()
    assert wait(queue) is task
    assert task.output == ("done", 2 * MB)
