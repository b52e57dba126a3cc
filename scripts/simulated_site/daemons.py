"""Starting the site's servers: run in the foreground, log to a file, ready when they answer.

Nobody stops them: they end with the site.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from simulated_site import plan
from simulated_site.client import Site
from simulated_site.errors import SiteError

READY_DEADLINE = 180.0
ASK_INTERVAL = 0.05
PROBE_DEADLINE = 30.0
LOG_TAIL_LINES = 25


class Daemon:
    """One server on one host."""

    def __init__(
        self,
        site: Site,
        host: str,
        name: str,
        argv: Sequence[str],
        *,
        user: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.host = name, host
        self.log = plan.LOGS / f"{name}.log"
        with self.log.open("wb") as log:
            self._process = site.popen(
                host, argv, user=user, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._pidfd = os.pidfd_open(self._process.pid)

    def wait_until(self, answers: Callable[[], bool], deadline: float = READY_DEADLINE) -> None:
        """Ask until `answers()`; `SiteError` with the end of the log when it ends first or takes too long."""
        limit = time.monotonic() + deadline
        while not answers():
            if self._ended_within(ASK_INTERVAL):
                raise SiteError(f"{self.name} on {self.host} ended with status {self._process.wait()}{self._tail()}")
            if time.monotonic() > limit:
                raise SiteError(f"{self.name} on {self.host} does not answer after {deadline:.0f} s{self._tail()}")

    def _ended_within(self, seconds: float) -> bool:
        return bool(select.select([self._pidfd], [], [], seconds)[0])

    def _tail(self) -> str:
        return f"; the end of its log:\n{log_tail(self.log)}"


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def asked(site: Site, host: str, argv: Sequence[str], *, user: bool = False, expect: str = "") -> bool:
    """Whether `argv` on `host` succeeds within PROBE_DEADLINE and prints `expect`."""
    try:
        answer = site.run(host, argv, user=user, timeout=PROBE_DEADLINE)
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0 and expect in answer.stdout
