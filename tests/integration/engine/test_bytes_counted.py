"""Bytes counted for each task, through real tunnels: one with a namespace, one without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from counted import LONG, PUT, SHORT, SMALL

DEADLINE = 300.0


@pytest.fixture
def needs():
    """Skip, or fail where everything must be there."""
    missing = [
        name
        for name in ("ip", "slirp4netns", "unshare")
        if shutil.which(name, path=f"{os.environ['PATH']}:/sbin") is None
    ]
    spaces = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, check=False)
    if not missing and not spaces.returncode and os.access("/dev/net/tun", os.W_OK):
        return
    reason = "needs ip, slirp4netns, /dev/net/tun and user namespaces"
    if os.environ.get("HPCQ_TESTS_MUST_RUN") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("mode", ["slirp", "socks"])
def test_each_task_is_told_its_own(mode, place, needs):
    """To two bytes a connection and direction; what is asked for is a line of at most 20 bytes."""
    program = Path(__file__).with_name("counted.py")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", sys.executable, str(program), mode],
        env={**os.environ, "PYTHONPATH": str(program.parent)},
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    for name, received, sent, connections in (
        ("alone", 22 * SMALL, 0, 21),
        ("long", 2 * LONG, PUT, 1),
        ("short", 4 * SHORT, 0, 2),
    ):
        assert 0 <= told[name][0] - received <= 2 * connections, told
        assert 0 < told[name][1] - sent <= 22 * connections, told
    assert told["outside"] == [None, None]
    assert max(told["pilot"]) < 100, told  # nobody's
