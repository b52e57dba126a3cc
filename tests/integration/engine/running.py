"""Pilots as processes, the place where a test has them, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import cloudpickle
import psutil
import pytest

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DEADLINE = 90.0
"""Of every wait, in seconds: for a machine that is busy with other things. It costs nothing where all is well."""
MARK = "HPCQ_TEST_MARK"


def eventually(condition, what, deadline=DEADLINE):
    """The first true value of ``condition()``; fails after ``deadline`` seconds, saying what was awaited."""
    end = time.monotonic() + deadline
    pause = 0.005
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"not within {deadline:g} s: {what}")
        time.sleep(pause)
        pause = min(0.1, pause * 1.3)
    return value


def gone(pid):
    """Whether no such process runs (a zombie has ended)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Place:
    """Where a test's queues and pilots live, and what of them is there."""

    def __init__(self, directory: Path) -> None:
        self.mark = uuid.uuid4().hex
        self.state = directory / "state"
        self.scratch = directory / "scratch"
        self.scratch.mkdir()
        self.environment = {MARK: self.mark, "XDG_STATE_HOME": str(self.state), "TMPDIR": str(self.scratch)}

    def processes(self) -> list[str]:
        """Living processes started below this test, however far."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(f"{process.pid} {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    def nothing_left(self) -> bool:
        return not self.processes() and not list(self.scratch.glob("hpcq-pilot-*"))


class Pilot:
    """One ``python -m hpcq.pilot``, its output in a file."""

    def __init__(self, connection: Path, log: Path, *arguments: str) -> None:
        self.log = log
        argv = [sys.executable, "-m", "hpcq.pilot", "--connection", str(connection), *arguments]
        with log.open("wb") as output:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, deadline: float = DEADLINE) -> int:
        """Its exit status."""
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the pilot did not end within {deadline:g} s:\n{self.said()}")


def ready(queue, count):
    """Wait until so many pilots are ready; their views."""

    def look():
        views = [view for view in queue.pilots() if view.state == "ready"]
        return views if len(views) >= count else None

    return eventually(look, f"{count} pilots of {queue.name} are ready")


def wait(queue, deadline=DEADLINE):
    """The next finished task."""
    task = queue.wait(deadline)
    assert task is not None, f"no task finished within {deadline:g} s: {queue.stats}"
    return task


def run(queue, task, deadline=DEADLINE):
    """Submit one task and wait for it."""
    number = queue.submit(task)
    done = queue.wait_for_id(number, deadline)
    assert done is task, f"{task} did not finish within {deadline:g} s: {queue.stats}"
    return task


def appears(path, deadline=DEADLINE):
    """Wait for a file with something in it; its text."""
    return eventually(lambda: path.exists() and path.read_text(), f"{path.name} appears", deadline)


def call(function, *args, **kwargs):
    return hpcq.PythonTask(function, *args, **kwargs)


def note_and_wait(directory, until):
    """Leave a mark that we ran, then wait for a file."""
    import tempfile  # noqa: PLC0415
    import time  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    descriptor, _ = tempfile.mkstemp(dir=directory)
    os.write(descriptor, str(os.getpid()).encode())
    while not Path(until).exists():
        time.sleep(0.005)
    return "done"


def begun(marks, count=1):
    return eventually(
        lambda: (found := [p for p in marks.iterdir() if p.read_text()]) and len(found) >= count and found,
        f"{count} attempts have begun",
    )
