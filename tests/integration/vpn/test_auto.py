"""Mode auto: the fastest that comes up, and a line for each that was passed over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

WAN = "203.0.113.1"


def run(site, *options, command=("curl", "-sS", f"http://{WAN}/")):
    return site.vpn("node", "run", "--mode", "auto", "-v", *options, "--", *command)


def passed_over(done):
    lines = [line for line in done.stderr.splitlines() if " passed over: " in line]
    return {line.split()[2]: line.partition(" passed over: ")[2] for line in lines}


def hide(site, program):
    """Make a program one that cannot be executed."""
    (site.directory / "nothing").write_text("")
    path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin")
    if path:
        site.check("login", "mount", "--bind", str(site.directory / "nothing"), os.path.realpath(path))


def test_everything_is_there(gateway, credential):
    done = run(gateway, "--credential", credential())
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert passed_over(done) == {}


def test_no_user_namespaces(gateway, credential):
    file = credential()
    gateway.check("login", "sh", "-c", "echo 0 > /proc/sys/user/max_user_namespaces")
    done = run(gateway, "--credential", file)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    reasons = passed_over(done)
    assert list(reasons) == ["relay", "openconnect"]
    assert all("user.max_user_namespaces is 0" in reason for reason in reasons.values())
    gateway.wait_gone(gateway.find("vpn.shim.forwarder"))


def test_no_gateway_and_no_way_out(site):
    done = run(site)
    assert done.returncode == 5
    assert "no mode comes up here" in done.stderr
    assert "slirp passed over: tunnel: this node has no default route" in done.stderr
    site.wait_empty()


def test_no_gateway_but_a_way_out_of_its_own(site):
    site.check("node", "ip", "route", "add", "default", "via", "192.0.2.1")
    site.check("login", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    site.check("wan", "ip", "route", "add", "192.0.2.0/24", "via", "203.0.113.2")
    done = run(site)
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert list(passed_over(done)) == ["relay", "openconnect", "socks"]
    hide(site, "pasta")
    hide(site, "slirp4netns")
    done = run(site)
    assert done.returncode == 5
    assert "install slirp4netns" in done.stderr


def test_a_mode_that_fails_to_come_up_is_undone_and_the_next_tried(gateway, credential):
    """Nothing says beforehand that the relay's port is closed to this node."""
    file = Path(credential())
    port = json.loads(file.read_text())["relay_port"]
    rules = (
        f"table ip f {{ chain c {{ type filter hook output priority 0; tcp dport {port} reject with tcp reset; }}; }}"
    )
    gateway.check("node", "nft", "-f", "-", input=rules)
    done = run(gateway, "--credential", str(file))
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert list(passed_over(done)) == ["relay"]
    assert "no relay answers" in passed_over(done)["relay"]
