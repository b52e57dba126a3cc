"""Real queues and local pilots with a scratch directory (so a node's cache) each test chooses."""

import os
import subprocess
import sys
import time

import pytest

import hpcq

DEADLINE = 90.0


class Site:
    """One queue, its pilots, and places for data."""

    def __init__(self, directory):
        self.directory = directory
        self.data = directory / "data"
        self.data.mkdir()
        self.queue = hpcq.Queue("q", address="127.0.0.1")
        self.pilots = []

    def pilot(self, *arguments, node="node", cores=2, prefix=()):
        """Start one; pilots with the same ``node`` share a cache."""
        scratch = self.directory / node
        scratch.mkdir(exist_ok=True)
        log = self.directory / f"pilot-{len(self.pilots)}.log"
        connection = self.directory / "state" / "hpcq" / "q" / "connection.json"
        argv = [
            *prefix, sys.executable, "-m", "hpcq.pilot", "--connection", str(connection), "--cores", str(cores),
            "--scratch", str(scratch), "--manager-timeout", "5", *arguments,
        ]  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        self.pilots.append(process)
        return process

    def ready(self, count):
        deadline = time.monotonic() + DEADLINE
        while sum(view.state == "ready" for view in self.queue.pilots()) < count:
            assert time.monotonic() < deadline, "the pilots are not ready in time"
            time.sleep(0.01)

    def run(self, task, timeout=DEADLINE):
        """The task, ended."""
        number = self.queue.submit(task)
        assert self.queue.wait_for_id(number, timeout) is task, f"{task} did not end: {self.logs()}"
        return task

    def logs(self):
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("pilot-*.log")))

    def close(self):
        self.queue.close()
        for process in self.pilots:
            process.wait(DEADLINE)

    def given(self):
        """How often the manager itself gave each content."""
        manager = self.queue._manager
        return manager.call(lambda: dict(manager.files._desk.holders.given))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Site(tmp_path)
    yield made
    made.close()
    assert "Traceback" not in made.logs(), made.logs()
    leftover = [path for path in tmp_path.rglob(".hpcq-*") if path.exists()]
    assert not leftover, "temporaries are left"
    assert not list(tmp_path.glob("node*/hpcq-cache-*/parts/*"))


@pytest.fixture
def one(site):
    """A site with one pilot."""
    site.pilot()
    return site


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)
