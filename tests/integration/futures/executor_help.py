"""What the tests of executors share besides fixtures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

MUST_RUN = os.environ.get("HPCQ_TESTS_MUST_RUN") == "1"
DEADLINE = 90.0


def missing(reason: str) -> NoReturn:
    """A prerequisite is not there: skip, or fail where everything must run."""
    if MUST_RUN:
        pytest.fail(f"{reason} (HPCQ_TESTS_MUST_RUN=1)", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what has no event: the state of a task on its pilot."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"not within {DEADLINE:.0f} s: {what}"
        time.sleep(0.01)
