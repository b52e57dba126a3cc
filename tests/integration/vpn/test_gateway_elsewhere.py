"""A gateway of another login node with the same home directory: asked through its relay's port."""

from __future__ import annotations

import functools
import json
import sys

import pytest

LOGIN, NODE, WAN = "192.0.2.1", "192.0.2.11", "203.0.113.1"
RENAMED = 'hostname login2; exec "$@"'


def on_login2(site, *argv):
    """Run ``python -m vpn`` on a host of another name, for which the gateway's control socket is of no use."""
    return site.run("node", "unshare", "--uts", "sh", "-c", RENAMED, "sh", sys.executable, "-m", "vpn", *argv)


@pytest.fixture
def elsewhere(shared_gateway):
    """The same, where the gateway runs that tests share."""
    return functools.partial(on_login2, shared_gateway)


@pytest.fixture
def record(shared_gateway):
    """The gateway's record."""
    return json.loads(home(shared_gateway, "gateway.json").read_text())


def home(site, name):
    return site.directory / "home" / "hpcq-gateway" / "default" / name


def test_it_gives_credentials_and_tells_whom_it_serves(shared_gateway, elsewhere, record):
    file = str(shared_gateway.directory / "from-login2")
    done = elsewhere("gateway", "credential", "--label", "from login2", "--output", file)
    assert done.returncode == 0, done.stderr
    report = json.loads(elsewhere("gateway", "status", "--json").stdout)
    assert (report["pin"], report["relay_port"]) == (record["pin"], record["relay_port"])
    assert "from login2" in [pilot["label"] for pilot in report["pilots"]]
    ran = shared_gateway.vpn("node", "run", "--credential", file, "--require", f"http://{WAN}/", "--", "true")
    assert ran.returncode == 0, ran.stderr


def test_it_is_found_by_its_address(elsewhere, record):
    for port in (record["port"], record["relay_port"]):
        done = elsewhere("run", "--mode", "relay", "--gateway", f"{LOGIN}:{port}", "--", "true")
        assert done.returncode == 0, done.stderr
    done = elsewhere("run", "--mode", "relay", "--gateway", f"{NODE}:{record['port']}", "--", "true")
    assert done.returncode == 5
    assert f"no gateway of yours listens at {NODE}:{record['port']}" in done.stderr


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("control.key", lambda text: text[::-1], "does not take the key"),
        ("gateway.json", lambda text: text.replace("pin-sha256:", "pin-sha256:x"), "has another key than"),
    ],
)
def test_who_has_not_the_key_or_is_not_the_gateway_is_refused(shared_gateway, elsewhere, name, change, words):
    path = home(shared_gateway, name)
    before = path.read_text()
    path.write_text(change(before))
    try:
        done = elsewhere("gateway", "status")
    finally:
        path.write_text(before)
    assert done.returncode == 5
    assert words in done.stderr
    assert elsewhere("gateway", "status").returncode == 0


def test_it_is_stopped_and_what_is_gone_is_told(site):
    site.start_gateway()
    file = home(site, "gateway.json")
    before = file.read_text()
    done = on_login2(site, "gateway", "stop")
    assert done.returncode == 0, done.stderr
    site.wait_empty()
    file.write_text(before)  # as if it had been killed
    done = on_login2(site, "gateway", "status")
    assert done.returncode == 5
    assert "does not answer" in done.stderr
    assert "start it again there" in done.stderr
