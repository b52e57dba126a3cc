"""The outer link can be slowed down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from simulated_site import plan
from simulated_site.client import Site

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_a_shaped_link_has_the_round_trip_asked_for(site: Site) -> None:
    command = [sys.executable, "-m", "simulated_site", "run", "--no-slurm", "--shape=100:40", "--"]
    ping = ["ping", "-c5", "-i0.2", plan.WAN_ADDRESS]
    environment = dict(os.environ) | {"PYTHONPATH": str(SCRIPTS)}
    answer = subprocess.run([*command, *ping], env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = re.search(r"= ([\d.]+)/", answer.stdout)
    assert found, answer.stdout
    assert 39 < float(found[1]) < 60
