"""What the sampler reads of a process, and how often it does."""

import os
import subprocess
import sys

import pytest

from hpcq.pilot.sampler import INTERVAL, SELDOM, SHARE, _cpu_seconds, pause_after


@pytest.mark.parametrize(
    ("cost", "pause"), [(0.0, INTERVAL), (INTERVAL / SHARE, INTERVAL), (0.1, 0.1 * SHARE), (60.0, SELDOM)]
)
def test_looks_that_cost_more_are_made_more_seldom_but_always_some_time(cost, pause):
    assert pause_after(cost) == pytest.approx(pause)


def test_the_time_of_children_counts():
    script = "import time\nwhile time.process_time() < 0.2: pass"
    before = _cpu_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", script], check=True)
    assert _cpu_seconds(os.getpid()) - before >= 0.18


def test_a_process_that_is_gone_has_used_nothing():
    child = subprocess.Popen(["true"])
    child.wait()
    assert _cpu_seconds(child.pid) == 0.0
