"""A Slurm made of small programs on PATH, scripted by each test, that talks between a site's banners.

``fake_slurm`` puts ``sbatch``, ``squeue``, ``sacct`` and ``scancel`` before everything else on PATH. They keep their
jobs in ``jobs.json`` (id → "STATE|hosts|reason") and ``accounts.json`` (id → what sacct prints; without the file there
is no accounting), note every call in ``calls``, and do as ``behaviour.json``
says (``{"sbatch": {"status": 1, "stderr": "…"}}``, ``{"squeue": {"hang": true}}``).
"""

import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

HANDLER = """#!{python} -I
import json, os, re, signal, sys, time
from pathlib import Path

home = Path({home!r})
name, argv = Path(sys.argv[0]).name, sys.argv[1:]
with open(home / "calls", "a") as calls:
    calls.write(json.dumps({{"argv": [name, *argv], "pid": os.getpid(), "environment": dict(os.environ)}}) + "\\n")
behaviour = json.loads((home / "behaviour.json").read_text()).get(name, {{}})
jobs = json.loads((home / "jobs.json").read_text())
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
(home / "jobs.json").write_text(json.dumps(jobs))
print("Bye.")
"""


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
        (self.home / "jobs.json").write_text(json.dumps(jobs))

    def set_accounts(self, accounts: dict[str, str]) -> None:
        (self.home / "accounts.json").write_text(json.dumps(accounts))

    def behave(self, behaviour: dict[str, object]) -> None:
        (self.home / "behaviour.json").write_text(json.dumps(behaviour))

    def calls(self, name: str) -> list[dict]:
        try:
            lines = (self.home / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [call for call in map(json.loads, lines) if call["argv"][0] == name]

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
        known = json.loads((self.home / "state.json").read_text())
        (self.home / "state.json").write_text(json.dumps({**known, **settings}))

    def now(self) -> float:
        return json.loads((self.home / "state.json").read_text()).get("now", 0)

    def later(self, seconds: float) -> None:
        """Let time pass."""
        self.set(now=self.now() + seconds)

    def calls(self, name: str) -> list[list[str]]:
        try:
            lines = (self.home / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [call["argv"] for call in map(json.loads, lines) if call["argv"][0] == name]

    def environment(self) -> dict[str, str]:
        """What the last command saw."""
        return json.loads((self.home / "calls").read_text().splitlines()[-1])["environment"]


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
