"""Real queues and pilots on loopback; every test ends with a look for processes and directories left behind."""

import signal
from pathlib import Path

import pytest
from running import Pilot, Place, eventually, ready

import hpcq
from hpcq.pilot.scratch import scratch_directory


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    yield place
    eventually(lambda: not place.processes(), "no process of the test is left")
    with scratch_directory(place.scratch):
        pass  # as the next pilot does: removes what killed ones could not
    eventually(place.nothing_left, "nothing of the test is left")


@pytest.fixture
def open_queue(place):
    """Makes queues that are closed at the end."""
    queues = []

    def make(name="q", **options):
        queues.append(hpcq.Queue(name, address="127.0.0.1", **options))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


@pytest.fixture
def queue(open_queue):
    return open_queue()


@pytest.fixture
def start_pilot(place, tmp_path, open_queue):
    """Starts pilots of a queue; those that live at the end are told to stop, and must."""
    pilots = []

    def start(queue=None, *arguments, cores=1, connection=None, manager_timeout=5.0):
        file = connection or place.state / "hpcq" / queue.name / "connection.json"
        log = tmp_path / f"pilot-{len(pilots)}.log"
        options = ["--cores", str(cores), "--manager-timeout", str(manager_timeout), *arguments]
        pilots.append(Pilot(file, log, *options))
        return pilots[-1]

    yield start
    for pilot in pilots:
        if pilot.process.poll() is None:
            pilot.process.send_signal(signal.SIGTERM)
            pilot.process.send_signal(signal.SIGCONT)
    for pilot in pilots:
        if pilot.process.poll() is None:
            pilot.wait()


@pytest.fixture
def pilot(queue, start_pilot):
    """One pilot with one core, ready."""
    pilot = start_pilot(queue)
    ready(queue, 1)
    return pilot


@pytest.fixture(autouse=True)
def no_descriptor_is_left():
    """A closed queue leaves no open descriptor in the user's program."""
    before = descriptors()
    yield
    eventually(lambda: descriptors() <= before, "descriptors are closed")


@pytest.fixture
def marks(tmp_path):
    """Where `note_and_wait` leaves its marks."""
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"
