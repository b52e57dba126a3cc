"""What goes wrong with files: each ends as an outcome that names the file, and leaves nothing half done."""

import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

import hpcq
from hpcq.files import wire


def is_running(process):
    return process.poll() is None


def test_a_missing_output_fails_the_task_by_name_and_stores_none(one):
    (one.data / "there").write_text("old")
    task = hpcq.Task("echo new > made", outputs={"made": one.data / "there", "not made": one.data / "n"})
    one.run(task)
    assert task.outcome == "files"
    assert task.message == "output 'not made' is missing: the task did not write it; its sandbox has 'made'"
    assert task.exit_code == 0
    assert (one.data / "there").read_text() == "old"


def test_the_outputs_of_a_task_that_fails_are_left_alone(one):
    (one.data / "o").write_text("old")
    assert one.run(hpcq.Task("echo new > o; exit 1", outputs={"o": one.data / "o"})).outcome == "exit_code"
    assert (one.data / "o").read_text() == "old"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("ln -s /etc/passwd o", "leads out of the sandbox, to /etc/passwd"),
        ("ln -s ../.. o", "leads out of the sandbox"),
        ("mkdir o; ln -s /etc o/x", "outside the directory"),
        ("mkfifo o", "neither a file nor a directory"),
        ("mkdir o; mkfifo o/p", "neither a file nor a directory"),
        ("ln -s o o", "Too many levels"),
    ],
)
def test_outputs_that_lead_outside_or_are_no_files(one, command, why):
    task = one.run(hpcq.Task(command, outputs={"o": one.data / "o"}))
    assert task.outcome == "files"
    assert "output 'o'" in task.message
    assert why in task.message
    assert not (one.data / "o").exists()


def test_inputs_that_cannot_be_read(site):
    os.mkfifo(site.data / "pipe")
    (site.data / "loop").symlink_to("loop")
    (site.data / "dir").mkdir()
    (site.data / "dir" / "bad").symlink_to("/etc")
    for name, why in {
        "nothing": "No such file",
        "pipe": "neither a file",
        "loop": "Too many levels",
        "dir": "bad is a link",
    }.items():
        task = site.run(hpcq.Task("true", inputs={"i": site.data / name}))
        assert task.outcome == "files"
        assert task.message.startswith("input 'i' cannot be read")
        assert str(site.data / name) in task.message
        assert why in task.message


def test_a_file_that_changes_between_submit_and_sending(site):
    place = site.data / "f"
    place.write_text("before")
    task = hpcq.Task("cat f", inputs={"f": place})
    number = site.queue.submit(task)
    wait_until(lambda: site.queue.stats["tasks"]["waiting"] == 1 and prepared(site))
    place.write_text("after!")
    os.utime(place, (0, 0))  # of a file system whose clock ticks slowly it would have the time that it had
    site.pilot()
    site.queue.wait_for_id(number, 90)
    assert task.outcome == "files"
    assert f"input 'f' ({place}) cannot be had: {place} was changed after the task was submitted" in task.message


def prepared(site):
    return site.queue._manager.call(lambda: site.queue._manager.files.held_count) == 0


def wait_until(condition):
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_destination_that_cannot_be_written(one):
    (one.data / "file").write_text("")
    task = one.run(hpcq.Task("echo x > o", outputs={"o": one.data / "file" / "below"}))
    assert task.outcome == "files"
    assert "output 'o' could not be stored" in task.message
    assert "Not a directory" in task.message or "File exists" in task.message
    (one.data / "d").mkdir()
    task = one.run(hpcq.Task("echo x > o", outputs={"o": one.data / "d"}))
    assert "is a directory, and the output a file" in task.message


def test_a_full_disk_where_the_program_runs(one):
    """A limit on the size of files stands for the disk: the same error path, no root needed."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    one.ready(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, before[1]))
    try:
        task = hpcq.Task("head -c 60000000 /dev/zero > o", outputs={"o": one.data / "o"})
        one.run(task)
        assert task.outcome == "files"
        assert "output 'o' could not be stored" in task.message
        assert "File too large" in task.message
        assert not (one.data / "o").exists()
        small = hpcq.Task("echo x > o", outputs={"o": one.data / "o"})
        assert one.run(small).outcome == "success"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.fixture
def small_disk():
    """Puts a command into a user and mount namespace where a directory is a file system of 4 MB."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        if os.environ.get("HPCQ_TESTS_MUST_RUN") == "1":
            pytest.fail("user namespaces are refused here")
        pytest.skip("user namespaces are refused here")

    def prefix(directory):
        mount = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
        return ["unshare", "-rm", "sh", "-c", mount, str(directory)]

    return prefix


def test_a_full_disk_on_the_node(site, small_disk):
    (site.directory / "small").mkdir()
    site.pilot("--cache-size", "100", node="small", prefix=small_disk(site.directory / "small"))
    (site.data / "large").write_bytes(bytes(10 << 20))
    task = site.run(hpcq.Task("true", inputs={"i": site.data / "large"}))
    assert task.outcome == "files"
    assert "input 'i'" in task.message
    assert "No space left on device" in task.message
    assert site.run(hpcq.Task("cat i", inputs={"i": hpcq.Buffer("small")})).result() == "small"


def test_a_pilot_killed_in_the_middle_of_a_transfer(site):
    """SIGKILL while it receives: the task runs elsewhere, the part is removed by the next pilot of the node."""
    first = site.pilot(cores=1)
    site.ready(1)
    with (site.data / "big").open("wb") as file:
        file.truncate(120 << 20)
    task = hpcq.Task("wc -c < i; wc -c < i > o", inputs={"i": site.data / "big"}, outputs={"o": site.data / "o"})
    number = site.queue.submit(task)
    wait_until(lambda: any(p.stat().st_size > 1 << 20 for p in site.directory.glob("node/hpcq-cache-*/parts/*")))
    first.kill()
    site.pilot(cores=1)
    assert site.queue.wait_for_id(number, 90) is task
    assert task.result().strip() == str(120 << 20)
    assert (site.data / "o").read_text().strip() == str(120 << 20)


@pytest.fixture
def held(monkeypatch):
    """Holds up what the program writes of outputs, from the second MB on, until it is let go."""
    go, written, write = threading.Event(), [], wire._write

    def held_up(descriptor, piece, total):
        assert sum(written) <= 1 << 20 or go.wait(90)
        write(descriptor, piece, total)
        written.append(len(piece))

    monkeypatch.setattr(wire, "_write", held_up)
    yield go
    go.set()


def test_a_pilot_killed_while_it_sends_leaves_the_destination_alone(site, held):
    first = site.pilot(cores=1, node="node1")
    (site.data / "o").write_text("old")
    task = hpcq.Task("head -c 150000000 /dev/zero > o", outputs={"o": site.data / "o"})
    number = site.queue.submit(task)
    wait_until(lambda: any(p.stat().st_size > 1 << 20 for p in site.data.glob(".hpcq-*.part")))
    first.kill()
    first.wait()
    held.set()
    assert (site.data / "o").read_text() == "old"
    site.pilot(cores=1, node="node2")
    assert site.queue.wait_for_id(number, 90) is task
    assert task.outcome == "success"
    assert (site.data / "o").stat().st_size == 150_000_000


def test_a_cancel_while_outputs_are_sent(one, held):
    task = hpcq.Task("head -c 150000000 /dev/zero > o", outputs={"o": one.data / "o"})
    number = one.queue.submit(task)
    wait_until(lambda: any(p.stat().st_size > 1 << 20 for p in one.data.glob(".hpcq-*.part")))
    one.queue.cancel(id=number)
    assert one.queue.wait_for_id(number, 90).outcome == "cancelled"
    held.set()  # what is written now goes nowhere
    assert not (one.data / "o").exists()
    wait_until(lambda: not list(one.data.glob(".hpcq-*")))
    assert one.run(hpcq.Task("true")).outcome == "success"


def test_a_pilot_that_is_told_to_leave_sends_its_outputs_first(one):
    task = hpcq.Task("head -c 100000000 /dev/zero > o", outputs={"o": one.data / "o"})
    number = one.queue.submit(task)
    wait_until(lambda: list(one.data.glob(".hpcq-*.part")))
    one.pilots[0].send_signal(signal.SIGTERM)
    assert one.queue.wait_for_id(number, 90).outcome == "success"
    assert (one.data / "o").stat().st_size == 100_000_000


def test_nobody_sees_half_an_output(one):
    """A reader that looks all the time sees the old content or the whole new one."""
    place, seen, stop = one.data / "o", set(), threading.Event()
    place.write_bytes(b"old")

    def look():
        while not stop.is_set():
            seen.add(place.stat().st_size)

    reader = threading.Thread(target=look)
    reader.start()
    task = one.run(hpcq.Task("head -c 50000000 /dev/zero > o", outputs={"o": place}))
    stop.set()
    reader.join()
    assert task.outcome == "success"
    assert seen <= {3, 50_000_000}


def test_a_large_file_passes_in_little_memory(one):
    """512 MB in and out again: neither side grows by more than 100 MB."""
    one.ready(1)
    size = 1 << 29
    with (one.data / "big").open("wb") as file:
        file.truncate(size)
    sides = [psutil.Process(), psutil.Process(one.pilots[0].pid)]
    assert one.run(hpcq.Task("cat i > o", inputs={"i": hpcq.Buffer("x")}, outputs={"o": one.data / "w"})).exit_code == 0
    before = [side.memory_info().rss for side in sides]
    peaks, stop = list(before), threading.Event()

    def watch():
        while not stop.wait(0.02):
            for index, side in enumerate(sides):
                peaks[index] = max(peaks[index], side.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    source = hpcq.File(one.data / "big", cache=False)
    task = one.run(hpcq.Task("mv i o", inputs={"i": source}, outputs={"o": one.data / "o"}))
    stop.set()
    watcher.join()
    assert task.outcome == "success"
    assert (one.data / "o").stat().st_size == size
    growth = [(peak - first) >> 20 for peak, first in zip(peaks, before, strict=True)]
    assert max(growth) < 100, growth


def test_a_node_whose_cache_is_taken_by_somebody_else(site):
    (site.directory / "node").mkdir()
    (site.directory / "node" / f"hpcq-cache-{os.getuid()}").symlink_to("/etc")
    site.pilot()
    assert site.run(hpcq.Task("cat i", inputs={"i": hpcq.Buffer("text")})).result() == "text"


def test_strangers_get_nothing(one):
    """A data connection of a pilot that is not connected is refused; names that were not declared are not stored."""
    import asyncio  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    from hpcq import connection as conn  # noqa: PLC0415

    info = one.queue.connection
    one.ready(1)
    name = one.queue.pilots()[0].name
    go = one.data / "go"
    task = hpcq.Task(f"until test -e {go}; do sleep 0.05; done; echo x > o", outputs={"o": one.data / "o"})
    number = one.queue.submit(task)

    async def talk(pilot, request):
        with ThreadPoolExecutor(1) as workers:
            tls = conn.pilot_tls(info)
            channel = await wire.connect(info.addresses, info.port, tls, conn.MANAGER_NAME, pilot, workers)
            try:
                await channel.send(request)
                return await channel.receive(wire.Go | wire.Stored)
            finally:
                channel.close()

    with pytest.raises(wire.DataError, match="no pilot stranger is connected"):
        asyncio.run(talk("stranger", wire.Store(number, "o", "file", False)))
    for wrong in ("../../x", "p", str(Path("/etc/passwd"))):
        answer = asyncio.run(talk(name, wire.Store(number, wrong, "file", False)))
        assert "has no output" in answer.error
    go.touch()
    assert one.queue.wait_for_id(number, 90).outcome == "success"
