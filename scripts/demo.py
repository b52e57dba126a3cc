"""The demo: its outer half builds a site and checks afterwards that nothing is left of it, its inner half (--inside)
runs the steps there.

Where this machine refuses namespaces there is no site: XRootD and pilots then run on loopback and the tunnel is left
out. A step that fails ends the demo with status 1 and what is known about it; Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from simulated_site import leftovers, plan, storage
from simulated_site.__main__ import REFUSED
from simulated_site.client import Site, kill_group
from simulated_site.errors import SiteError

QUEUE = "dimuon"
PICTURE = "dimuon_mass.png"
FILE = plan.ROOT_FILES[0]
COMMAND_DEADLINE = 240.0
ANALYSIS_DEADLINE = 400.0
END_DEADLINE = 120.0
HURRIED = {"XRD_CONNECTIONWINDOW": "2", "XRD_CONNECTIONRETRY": "0", "XRD_REQUESTTIMEOUT": "5"}
KEPT_OPEN = "queue stays open"


class DemoError(Exception):
    """A step failed; says which and how."""


class Place(Protocol):
    """Where commands run: `Site`, or `Loopback`."""

    @property
    def home(self) -> Path: ...

    def run(self, host: str, argv: Sequence[str], *, timeout: float = ...) -> subprocess.CompletedProcess[str]: ...

    def popen(self, host: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]: ...


def main() -> int:
    """Both halves; the status of the demo."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description="hpcq from end to end on one machine")
    parser.add_argument("--output", type=Path, default=Path(PICTURE), help=f"the plot [{PICTURE}]")
    parser.add_argument("--batch", choices=BATCH, default="slurm", help="pbs: through Slurm's own qsub, qstat, qdel")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        if options.inside:
            return inside(options.output, options.batch)
        return outside(options.output.absolute(), options.batch)
    except (DemoError, SiteError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


BATCH = {"slurm": ("Slurm", "slurm"), "pbs": ("Slurm's own qsub, in Torque's dialect", "torque")}
"""What --batch means: in words, and to hpcq."""

NUMBERS = itertools.count(1)


def heading(text: str) -> None:
    print(f"\n== {text}")


def step(text: str) -> None:
    heading(f"{next(NUMBERS)}. {text}")


# --- outside the site ----------------------------------------------------------------------------------------------


def outside(output: Path, batch: str) -> int:
    """Build a site, run the inner half, look for leftovers."""
    if not output.parent.is_dir():
        raise DemoError(f"--output: there is no directory {output.parent}")
    heading("Building a simulated site: outside, login node, two compute nodes without a way out")
    with tempfile.TemporaryDirectory(prefix="hpcq-demo-") as directory:
        identity = Path(directory) / "identity"
        status = run_site(identity, output, batch)
        if status == REFUSED:
            return without_site(output)
        check_nothing_left(identity)
    return status


def run_site(identity: Path, output: Path, batch: str) -> int:
    """The inner half in a site that dies with us; its status."""
    site = [sys.executable, "-m", "simulated_site", "run", f"--identity={identity}", f"--bind={output.parent}", "--"]
    half = [sys.executable, str(Path(__file__).resolve()), "--inside", f"--output={output}", f"--batch={batch}"]
    process = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *site, *half])
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal told the site too
        return 128 + signal.SIGINT
    except SystemExit:  # nobody else did
        process.terminate()
        raise
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Let the site end by itself, for a while."""
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(END_DEADLINE)
    process.kill()
    process.wait()


def check_nothing_left(identity: Path) -> None:
    """After the site's end, however it came."""
    if not identity.exists() or not identity.read_text():
        return  # it ended before it began
    if left := leftovers.remaining(identity):
        raise DemoError("left behind: " + "; ".join(left))
    print("\nThe site is gone; nothing is left of it: no process, no mount, no control group.")


# --- inside the site -----------------------------------------------------------------------------------------------


def inside(output: Path, batch: str) -> int:
    """The steps, as the ordinary user of the site."""
    site = Site.load()
    for what, reason in site.left_out.items():
        print(f"left out: {what}: {reason}")
    if "xrootd" in site.left_out:
        raise DemoError("there is nothing to read without XRootD")
    step(f"Without a tunnel a compute node cannot read {FILE}")
    show_unreachable(site)
    step("A gateway on the login node, by an ordinary user")
    call(site, ["hpcq", "vpn", "gateway", "start"])
    step("Two pilots" + (f" through {BATCH[batch][0]}" if site.slurm else ", started on the compute nodes by hand"))
    require = f"root://{plan.XROOTD_NAME}:{plan.XROOTD_PORT}"
    for host, arguments in pilot_commands(site, BATCH[batch][1]):
        call(site, submission(*arguments, "--vpn", "openconnect", "--require", require), host)
    step("The analysis (scripts/dimuon_mass.py)")
    analyse(site, [str(plan.SCRIPTS / "dimuon_mass.py"), site.xrootd_url + FILE], output)
    step("The end: gateway stopped")
    call(site, ["hpcq", "vpn", "gateway", "stop"])
    return 0


def submission(*options: str) -> list[str]:
    return ["hpcq", "submit-pilots", "--name", QUEUE, "--create", *options]


def pilot_commands(site: Site, batch: str) -> Iterator[tuple[str, list[str]]]:
    """On which host to submit which pilots: through the batch system from the login node, else on each compute node."""
    if site.slurm:
        yield "login", ["--batch", batch, "-n", "2", "--cores", "2", "--memory", "2GB", "--walltime", "0:10:00"]
        return
    for host in plan.COMPUTE:
        yield host.name, ["--batch", "local", "-n", "1", "--cores", "2"]


def show_unreachable(site: Site) -> None:
    """The file can be read on the login node and cannot on a compute node; anything else fails the demo."""
    copy = ["xrdcp", "--nopbar", "--force", site.xrootd_url + FILE, "/dev/null"]
    if (answer := site.run("login", copy, env=HURRIED)).returncode:
        raise DemoError(f"even the login node cannot read the file: {answer.stderr.strip()}")
    address = site.description["outside_address"]["wan"]
    for url in (site.xrootd_url, site.xrootd_url.replace(plan.XROOTD_NAME, address)):
        fail_to_copy(site, [*copy[:-2], url + FILE, "/dev/null"])
    print("as expected: no way out")


def fail_to_copy(site: Site, copy: list[str]) -> None:
    host, command = ("login", ["srun", "--immediate=30", *copy]) if site.slurm else ("cn1", copy)
    print(f"[{host}]$ {shlex.join(command)}")
    answer = site.run(host, command, env=HURRIED)
    print("\n".join(f"    {line}" for line in (answer.stderr or answer.stdout).strip().splitlines()))
    if answer.returncode == 0:
        raise DemoError("the compute node could read the file without a tunnel: it has a way out")


# --- where there is no site ----------------------------------------------------------------------------------------


class Loopback:
    """This machine itself, under the names of a site's hosts. State lives in a directory of the demo's own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def popen(self, host: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start `argv` in a session of its own."""
        tools = Path(sys.executable).parent
        state = {"XDG_STATE_HOME": str(self.home / "state"), "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.Popen(list(argv), env=os.environ | state, cwd=self.home, start_new_session=True, **options)

    def run(
        self, host: str, argv: Sequence[str], timeout: float = COMMAND_DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        """Run `argv` and capture what it prints."""
        with self.popen(host, argv, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err)


def without_site(output: Path) -> int:
    """XRootD and pilots on loopback, no tunnel."""
    print("left out: the simulated site, Slurm and the tunnel, because this machine refuses namespaces (see above)")
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpcq-demo-")))
        place = Loopback(home)
        step("An XRootD server on loopback")
        url = stack.enter_context(loopback_xrootd(place))
        step("Two pilots on this machine, without a tunnel")
        stack.callback(place.run, "login", ["hpcq", "cancel-pilots", "--name", QUEUE])
        call(place, submission("--batch", "local", "-n", "2", "--cores", "2", "--vpn", "none"))
        step("The analysis (scripts/dimuon_mass.py)")
        script = Path(__file__).resolve().parent / "dimuon_mass.py"
        analyse(place, [str(script), url, "--network=any"], output)
    if left := leftovers.processes_naming(str(home)):
        raise DemoError("left behind: " + "; ".join(left))
    print("\nNothing is left: no process of the demo's.")
    return 0


@contextlib.contextmanager
def loopback_xrootd(place: Loopback) -> Iterator[str]:
    """A server for the time of the block; the file's URL. Without the program, the path of the file."""
    if not shutil.which("xrootd"):
        print("left out: XRootD (xrootd not found: install xrootd-server); the file is read from its directory")
        yield str(storage.test_file(FILE))
        return
    store, admin = place.home / "xrootd" / "data" / "store", place.home / "xrootd-admin"
    store.mkdir(parents=True)
    admin.mkdir()
    storage.fill(store)
    port = free_port()
    configuration = storage.configure(store, admin, port)
    with (place.home / "xrootd.log").open("wb") as log:
        command = ["setpriv", "--pdeathsig=KILL", *as_ordinary(place.home), "xrootd", "-c", str(configuration)]
        process = place.popen("wan", command, stdout=log, stderr=log)
    try:
        wait_for_file(place, process, f"root://127.0.0.1:{port}")
        yield f"root://127.0.0.1:{port}//store/{FILE}"
    finally:
        kill_group(process)


def as_ordinary(home: Path) -> list[str]:
    """Xrootd refuses to run as root: become nobody, who then owns what it writes."""
    if os.geteuid() != 0:
        return []
    for path in (home, *home.rglob("*")):
        shutil.chown(path, "nobody")
    return ["--reuid=nobody", "--clear-groups"]


def wait_for_file(place: Loopback, process: subprocess.Popen[Any], server: str) -> None:
    """Ready when a client sees the file."""
    limit = time.monotonic() + COMMAND_DEADLINE
    while place.run("login", ["xrdfs", server, "stat", f"/store/{FILE}"]).returncode:
        if process.poll() is not None or time.monotonic() > limit:
            raise DemoError(f"xrootd does not answer:\n{(place.home / 'xrootd.log').read_text()[-2000:]}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- common --------------------------------------------------------------------------------------------------------


def call(place: Place, argv: Sequence[str], host: str = "login") -> None:
    """Show a command and what it prints; `DemoError` when it fails."""
    print(f"[{host}]$ {shlex.join(argv)}")
    try:
        answer = place.run(host, argv, timeout=COMMAND_DEADLINE)
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{shlex.join(argv)} on {host} takes more than {error.timeout:.0f} s") from None
    print(answer.stdout + answer.stderr, end="")
    if answer.returncode:
        raise DemoError(f"{shlex.join(argv)} on {host} ended with status {answer.returncode}")


def analyse(place: Place, arguments: Sequence[str], output: Path) -> None:
    """Run the analysis; while its queue is open, ask the command line about it; fetch the plot."""
    command = [sys.executable, *arguments, "--name", QUEUE, "--output", PICTURE, "--pilots", "2", "--keep-open"]
    print(f"[login]$ python {shlex.join(command[1:])}")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with place.popen("login", command, **pipes) as program:
        timer = threading.Timer(ANALYSIS_DEADLINE, kill_group, [program])
        timer.start()
        try:
            follow(place, program)
        finally:
            timer.cancel()
            if program.poll() is None:
                kill_group(program)
    shutil.copyfile(place.home / PICTURE, output)
    print(f"plot: {output}")


def follow(place: Place, program: subprocess.Popen[str]) -> None:
    """Pass on what the program prints until its queue is idle; then look at the queue and let the program end."""
    assert program.stdout
    assert program.stdin
    for line in program.stdout:
        if line.strip() == KEPT_OPEN:
            break
        print(line, end="")
    else:
        explain(place)
        raise DemoError(f"the analysis ended with status {program.wait()} (it may take {ANALYSIS_DEADLINE:.0f} s)")
    step("The queue from the command line")
    for subcommand in ("pilots", "status"):
        call(place, ["hpcq", subcommand, "--name", QUEUE])
    program.stdin.close()
    if program.wait(END_DEADLINE):
        raise DemoError(f"the analysis ended with status {program.returncode}")


def explain(place: Place) -> None:
    """The pilots' own words, when the analysis failed."""
    for path in sorted(place.home.rglob("hpcq/*/jobs/**/*")):
        if path.suffix in {".txt", ".log"} and path.stat().st_size:
            print(f"--- the end of {path}:\n{path.read_text(errors='replace')[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
