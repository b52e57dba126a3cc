"""Settings of all tests, and what makes them alike wherever they run."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

from hypothesis import settings

# Machines are shared and noisy: no test is judged by its time. What CI runs is the same each time; people search on.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if {"CI", "HPCQ_TESTS_MUST_RUN"} & os.environ.keys() else "here")

# A shell without job control starts what it puts into the background with Ctrl-C ignored, nohup ignores a hang-up:
# programs that tests start would inherit that, and be deaf to the signals they are sent.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _leave(process: subprocess.Popen[Any], kind: type[BaseException] | None, *rest: Any) -> None:
    """Leave ``with Popen(…)``: when a test has failed nobody tells the process to end: waiting would not end either."""
    if kind is not None:
        process.kill()
    _leave_in_order(process, kind, *rest)


_leave_in_order = subprocess.Popen.__exit__
subprocess.Popen.__exit__ = _leave
