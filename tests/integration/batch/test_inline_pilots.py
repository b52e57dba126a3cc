"""A pilot that gets its connection data with the job: it serves, and nothing of theirs can be seen."""

import contextlib
import json
import shlex
from pathlib import Path

import psutil
import pytest

from hpcq import PythonTask, Queue, state_dir
from hpcq.batch.base import load_jobs
from hpcq.cli.main import run

DEADLINE = 60.0


@pytest.fixture
def hpcq(capsys):
    def typed(line: str) -> str:
        status = run(shlex.split(line))
        output = capsys.readouterr()
        assert status == 0, output.err
        return output.out

    return typed


def seen(pid: int) -> str:
    """What the system tells of a process, to its owner too: arguments, environment, open files."""
    process = psutil.Process(pid)
    files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            files.append(str(link.readlink()))
    return "\n".join([*process.cmdline(), *map(str, process.environ().items()), *files])


def test_a_pilot_that_was_told_inline(hpcq):
    with Queue("ana") as queue:
        file = state_dir.connection_file("ana")
        key = json.loads(file.read_text())["pilot"]["key"].splitlines()[1]
        hpcq("submit-pilots --name ana --connection inline")
        file.rename(file.with_suffix(".hidden"))  # as on a node that does not see it
        [view] = queue.wait_for_pilots(1, DEADLINE)
        queue.submit(PythonTask(sum, [1, 2]))
        assert queue.wait(DEADLINE).output == 3
        [job] = load_jobs("ana")
        told = seen(json.loads((job.directory / "process-0.json").read_text())["pid"])
        assert "--connection\n-\n" in told
        assert key not in told
        assert "hpcq-connection-1" not in told
        file.with_suffix(".hidden").rename(file)
        shown = hpcq(f"pilots show {view.job_id} --name ana")
        assert "hpcq-connection:only-in-what-is-submitted" in shown
        assert "hpcq-connection-1:" not in shown + hpcq(f"pilots show {view.job_id} --name ana --json")
