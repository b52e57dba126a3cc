"""Settings of all tests, and what makes them alike wherever they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
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


@pytest.fixture(scope="module")
def module_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state directory that the tests of a module share."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="module")
def by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Functions of the test's module travel by value: pilots cannot import them."""
    import cloudpickle  # noqa: PLC0415 - few tests need it

    module = sys.modules[request.module.__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)
