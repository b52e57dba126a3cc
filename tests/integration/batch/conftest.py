"""A Slurm made of small programs on PATH, scripted by each test, that talks between a site's banners.

``fake_slurm`` puts ``sbatch``, ``squeue``, ``sacct`` and ``scancel`` before everything else on PATH. They keep their
jobs in ``jobs.json`` (id → "STATE|hosts|reason") and ``accounts.json`` (id → what sacct prints; without the file there
is no accounting), note every call in ``calls``, and do as ``behaviour.json``
says (``{"sbatch": {"status": 1, "stderr": "…"}}``, ``{"squeue": {"hang": true}}``). A queue asks while a test changes
what there is: both take the ``lock``.
"""

import contextlib
import fcntl
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

HANDLER = """#!{python} -I
import fcntl, json, os, re, signal, sys, time
from pathlib import Path

home = Path({home!r})
name, argv = Path(sys.argv[0]).name, sys.argv[1:]
lock = open(home / "lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(home / "calls", "a") as calls:
    calls.write(json.dumps({{"argv": [name, *argv], "pid": os.getpid(), "environment": dict(os.environ)}}) + "\\n")
behaviour = json.loads((home / "behaviour.json").read_text()).get(name, {{}})
jobs = json.loads((home / "jobs.json").read_text())
if behaviour.keys() & {{"flood", "helper", "hang"}}:
    lock.close()
if behaviour.get("flood"):
    while True:
        sys.stdout.write("x" * 65536)
if behaviour.get("helper"):
    if os.fork() == 0:
        os.setsid()
        (home / "helper").write_text(str(os.getpid()))
        signal.pause()
if behaviour.get("hang"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()
print("*** Welcome to Site. Maintenance on 2031-01-01: 4711 nodes will be down ***")
sys.stderr.write("Warning: your home is 99% full\\n" + behaviour.get("stderr", ""))
if behaviour.get("status"):
    sys.exit(behaviour["status"])
if name == "sbatch":
    script = Path(argv[-1]).read_text()
    (home / "submitted.sh").write_text(script)
    array = next((a for a in argv if a.startswith("--array=0-")), None)
    ids = ["4711"] if array is None else ["4711_%d" % k for k in range(int(array[10:]) + 1)]
    jobs.update({{i: "PENDING||Priority" for i in ids}})
    print(behaviour.get("stdout", "4711"))
elif name == "squeue":
    asked = next(a for a in argv if a.startswith("--jobs="))[7:].split(",")
    listed = {{i: s for i, s in jobs.items() if i.split("_")[0] in asked}}
    if not listed:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    for i, s in listed.items():
        print("hpcq|%s|%s" % (i, s))
elif name == "sacct":
    if not (home / "accounts.json").exists():
        sys.exit("Slurm accounting storage is disabled")
    asked = next(a for a in argv if a.startswith("--jobs="))[7:].split(",")
    for i, s in json.loads((home / "accounts.json").read_text()).items():
        if i.split("_")[0] in asked:
            print("%s|%s" % (i, s))
elif name == "scancel":
    for argument in argv:
        base, _, rest = argument.partition("_")
        for i in list(jobs):
            if base == i.split("_")[0]:
                jobs[i] = behaviour.get("becomes", "CANCELLED||None")
if name in ("sbatch", "scancel"):
    (home / "jobs.json").write_text(json.dumps(jobs))
print("Bye.")
"""


@contextlib.contextmanager
def locked(home: Path):
    """No program of the fake's is at work meanwhile, but those that hang."""
    with (home / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_calls(home: Path) -> list[dict]:
    with locked(home), contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (home / "calls").read_text().splitlines()]
    return []


class FakeSlurm:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "squeue", "sacct", "scancel"):
            path = self.bin / name
            path.write_text(HANDLER.format(python=sys.executable, home=str(home)))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.set_jobs({})
        self.behave({})

    def set_jobs(self, jobs: dict[str, str]) -> None:
        self._write("jobs.json", jobs)

    def set_accounts(self, accounts: dict[str, str]) -> None:
        self._write("accounts.json", accounts)

    def behave(self, behaviour: dict[str, object]) -> None:
        self._write("behaviour.json", behaviour)

    def _write(self, name: str, content: object) -> None:
        with locked(self.home):
            (self.home / name).write_text(json.dumps(content))

    def calls(self, name: str) -> list[dict]:
        return [call for call in read_calls(self.home) if call["argv"][0] == name]

    def submitted(self) -> str:
        return (self.home / "submitted.sh").read_text()


class FakePbs:
    """See ``fake_pbs``: an OpenPBS server of small programs on PATH, whose clock the test moves."""

    def __init__(self, home: Path, monkeypatch) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        program = Path(__file__).with_name("fake_pbs.py").read_text()
        for name in ("qsub", "qstat", "qdel", "qrerun"):
            path = self.bin / name
            path.write_text(f"#!{sys.executable} -I\n{program}")
            path.chmod(0o755)
        (home / "state.json").write_text("{}")
        monkeypatch.setenv("FAKE_PBS", str(home))
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")

    def set(self, **settings: object) -> None:
        """Change the server's state: ``now``, ``slots``, ``down`` …"""
        with locked(self.home):
            known = json.loads((self.home / "state.json").read_text())
            (self.home / "state.json").write_text(json.dumps({**known, **settings}))

    def now(self) -> float:
        with locked(self.home):
            return json.loads((self.home / "state.json").read_text()).get("now", 0)

    def later(self, seconds: float) -> None:
        """Let time pass."""
        self.set(now=self.now() + seconds)

    def calls(self, name: str) -> list[list[str]]:
        return [call["argv"] for call in read_calls(self.home) if call["argv"][0] == name]

    def environment(self) -> dict[str, str]:
        """What the last command saw."""
        return read_calls(self.home)[-1]["environment"]


@pytest.fixture
def fake_pbs(tmp_path, monkeypatch):
    return FakePbs(tmp_path / "pbs", monkeypatch)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A state directory of the test's own; returns where queues are."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "hpcq"


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    yield fake
    helper = fake.home / "helper"
    if helper.exists():
        os.kill(int(helper.read_text()), signal.SIGKILL)
