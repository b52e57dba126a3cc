"""What tests do with a cluster of the simulated site, as its ordinary user."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulated_site.client import Site, kill_group

DEADLINE = 180.0  # Slurm frees the nodes of the job before in its own time
LOOK = 0.3

RUNNING: list[subprocess.Popen[str]] = []
"""Programs of the test that must not fail while it waits for something."""
ERRORS: dict[subprocess.Popen[str], Path] = {}
"""Where they write what is no output of theirs: warnings, for one that Slurm was slow to answer."""

WAIT = """
import sys, hpcq
with hpcq.Queue(name=sys.argv[1]) as queue:
    queue.submit(hpcq.Task(sys.argv[2]))
    while not queue.empty():
        task = queue.wait()
        print("done", task.outcome, task.attempts, task.hostname, task.message, flush=True)
"""


def until(
    condition: Callable[[], Any], what: str, deadline: float = DEADLINE, story: Callable[[], str] = lambda: ""
) -> Any:
    """The first true value of ``condition``: Slurm tells nobody when something changes. ``story`` goes with a failure.

    The failure of a program that was started meanwhile is told at once: what it was to do will never come.
    """
    end = time.monotonic() + deadline
    while not (value := condition()):
        for program in [one for one in RUNNING if one.poll()]:
            said = f"{ended(program)}{ERRORS[program].read_text()}"
            raise AssertionError(f"the program ended with {program.returncode} before {what}:\n{said}")
        assert time.monotonic() < end, f"not within {deadline:.0f} s: {what}\n{story()}"
        time.sleep(LOOK)
    return value


class Cluster:
    """What the tests do with a site, as its ordinary user."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.site = site
        self.directory = directory
        self.queue = f"q{uuid.uuid4().hex[:8]}"
        self.environment: dict[str, str] = {}

    def hpcq(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        answer = self.site.run("login", ["hpcq", *arguments], env=self.environment, timeout=DEADLINE)
        assert answer.returncode == status, f"{answer.returncode}: {answer.stdout}{answer.stderr}"
        return answer

    def story(self) -> str:
        """What Slurm says of its jobs and nodes, and what the jobs have printed."""
        told = [self.site.run("login", ["scontrol", "show", what]).stdout for what in ("jobs", "nodes")]
        printed = f"tail -n 30 ~/.local/state/hpcq/{self.queue}/jobs/*/*.txt"
        return "".join(told) + self.site.run("login", ["sh", "-c", printed]).stdout

    def submit(self, *options: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        base = ("--name", self.queue, "--create", "--batch", "slurm", "--cores", "2", "--memory", "1GB")
        return self.hpcq("submit-pilots", *base, *options, status=status)

    def program(self, text: str, *arguments: str) -> subprocess.Popen[str]:
        file = self.directory / "program.py"
        file.write_text(text)
        file.chmod(0o644)
        command = [self.site.description["python"], str(file), self.queue, *arguments]
        errors = self.directory / "program.errors"
        with errors.open("w") as stderr:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
            RUNNING.append(self.site.popen("login", command, env=self.environment, text=True, **pipes))
        ERRORS[RUNNING[-1]] = errors
        return RUNNING[-1]

    def pilots(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.hpcq("pilots", "--name", self.queue, "--json").stdout)
        return rows

    def jobs(self) -> list[str]:
        """Slurm's jobs of the user that are not over."""
        return self.site.run("login", ["squeue", "--me", "-h", "-r", "-o", "%i %T"], check=True).stdout.split("\n")[:-1]

    def start_requeued(self, job: str, when: str) -> bool:
        """Tell Slurm to start a requeued job, which it lets wait two minutes; False while it is too early for that.

        What it told the nodes about the job's first start may come late: the message that ends the job on a node that
        is gone is sent again for ten seconds, and ends the next start (JobLaunchFailure) if that is there by then.
        """
        told = self.site.run("login", ["sdiag"], check=True).stdout
        under_way = re.findall(r"^Agent (?:queue size|count):\s*(\d+)$", told, re.MULTILINE)
        assert len(under_way) == 2, told
        start = ["scontrol", "update", f"JobId={job}", f"StartTime={when}"]
        return under_way == ["0", "0"] and self.site.run("login", start).returncode == 0

    def pid_of_pilot(self, host: str) -> int:
        """The pilot of our queue that runs on ``host``; 0 when there is none."""
        here = Path(f"/proc/{self.site.hosts[host]['pid']}/ns/uts").readlink()
        numbers = sorted(int(one.name) for one in Path("/proc").iterdir() if one.name.isdecimal())
        for number in numbers:  # the pilot comes before what it has forked, which looks like it
            process = Path(f"/proc/{number}")
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if self._is_pilot(process) and (process / "ns/uts").readlink() == here:
                    return number
        return 0

    def _is_pilot(self, process: Path) -> bool:
        words = (process / "cmdline").read_bytes().split(b"\0")
        return b"hpcq.pilot" in words and any(f"/{self.queue}/".encode() in word for word in words)


def ended(program: subprocess.Popen[str], number: int | None = None) -> str:
    """What a program has printed when it has ended, by itself or by this signal."""
    if number is not None and program.poll() is None:
        program.send_signal(number)
    if program in RUNNING:
        RUNNING.remove(program)
    try:
        return program.communicate(timeout=DEADLINE)[0]
    except subprocess.TimeoutExpired:
        kill_group(program)
        said = f"{program.communicate()[0]}{ERRORS[program].read_text()}"
        raise AssertionError(f"the program did not end, and had printed:\n{said}") from None


def finished(program: subprocess.Popen[str]) -> str:
    """What a program has printed when it has ended well."""
    output = ended(program)
    assert program.returncode == 0, f"{output}{ERRORS[program].read_text()}"
    return output


def written(file: Path) -> str:
    """What is in a file; nothing while it is not there: it is made before it is written to."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def descendants(pid: int) -> list[int]:
    """A process and all below it, the parents first; some may have ended since."""
    children: list[int] = []
    gone = contextlib.suppress(FileNotFoundError, ProcessLookupError)
    with gone:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with gone:
                children += map(int, (thread / "children").read_text().split())
    return [pid, *(one for child in children for one in descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wrapping_template(cluster: Cluster, prelude: str) -> str:
    """A template whose pilot starts under another program: what a node forbids can be simulated without root."""
    text = (Path(__file__).parents[2] / "batch_templates" / "slurm.sh.j2").read_text()
    file = cluster.directory / "wrapped.sh.j2"
    file.write_text(text.replace("exec {{ pilot_argv }}", prelude + " {{ pilot_argv }}"))
    file.chmod(0o644)
    return str(file)
