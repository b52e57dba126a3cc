"""However a site ends, nothing of it stays: no process, mount or control group."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from simulated_site.client import Site
from simulated_site.leftovers import remaining

SCRIPTS = Path(__file__).parents[2] / "scripts"
UP_DEADLINE = 180.0
LINGER = "import subprocess as s, time; s.Popen(['setsid', 'sleep', '1000']); print('site-is-up', flush=True)"
COMMAND = (sys.executable, "-c", f"{LINGER}; time.sleep(1000)")  # not a shell: dash may lose a SIGINT before an exec


def site_command(identity: Path, *command: str) -> list[str]:
    return [sys.executable, "-m", "simulated_site", "run", "--identity", str(identity), "--", *command]


def environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(SCRIPTS)}


def wait_for_text(descriptor: int, text: bytes) -> None:
    seen, limit = b"", time.monotonic() + UP_DEADLINE
    while text not in seen:
        assert select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))[0], seen
        seen += os.read(descriptor, 4096) or pytest.fail(f"the site ended: {seen!r}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(site: Site, shared_path: Path, number: signal.Signals) -> None:
    identity = shared_path / "identity"
    command = site_command(identity, *COMMAND)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        wait_for_text(process.stdout.fileno(), b"site-is-up")
        process.send_signal(number)
        assert process.wait(180) != 0
    assert remaining(identity) == []


def test_ctrl_c_on_the_terminal_leaves_nothing(site: Site, shared_path: Path) -> None:
    identity = shared_path / "identity"
    pid, terminal = pty.fork()
    if pid == 0:
        command = site_command(identity, *COMMAND)
        os.execve(command[0], command, environment())
    wait_for_text(terminal, b"site-is-up")
    os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    os.close(terminal)
    assert remaining(identity) == []


@pytest.mark.parametrize("status", [0, 7])
def test_the_status_of_the_command_is_passed_on_and_nothing_stays(site: Site, shared_path: Path, status: int) -> None:
    identity = shared_path / "identity"
    command = site_command(identity, "sh", "-c", f"setsid sleep 1000 & exit {status}")
    assert subprocess.run(command, env=environment(), check=False).returncode == status
    assert remaining(identity) == []
