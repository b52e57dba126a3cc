"""Mode slirp: over the node's own way out, which the site's node is given here."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

WAN = "203.0.113.1"


@pytest.fixture
def open_site(site):
    """A site whose node reaches outside."""
    site.check("node", "ip", "route", "add", "default", "via", "192.0.2.1")
    site.check("login", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    site.check("wan", "ip", "route", "add", "192.0.2.0/24", "via", "203.0.113.2")
    return site


def run(site, *argv, options=(), **more):
    return site.vpn("node", "run", "--mode", "slirp", *options, "--", *argv, **more)


def test_tcp_and_names(open_site):
    done = run(open_site, "curl", "-sS", "http://web.example.org/", options=("-v", "--require", f"http://{WAN}/"))
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert "slirp4netns" in done.stderr
    open_site.wait_empty()


def test_the_hosts_loopback_is_not_its_own(open_site):
    listener = "import socket; s = socket.create_server(('127.0.0.1', 8123)); print('up', flush=True); input()"
    with open_site.start(
        "node", "python3", "-c", listener, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == "up\n"
        for host in ("127.0.0.1", "198.19.0.2"):
            done = run(open_site, "curl", "-sS", "--max-time", "10", f"http://{host}:8123/")
            assert done.returncode in (7, 28), done.stderr
        server.stdin.close()


def test_the_status_is_the_commands(open_site):
    assert run(open_site, "sh", "-c", "exit 7").returncode == 7


def test_slirp4netns_killed_loses_the_tunnel(open_site):
    with open_site.start_vpn(
        "node", "run", "--mode", "slirp", "--", "sh", "-c", "echo up; exec sleep 1000",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "up\n"
        (pid,) = open_site.find("--ready-fd=3")
        os.kill(pid, signal.SIGKILL)
        assert process.wait(90) == 5
        assert "slirp4netns ended" in process.stderr.read()
    open_site.wait_empty()


def test_without_a_way_out_it_comes_up_and_reaches_nothing(site):
    done = run(site, "true", options=("--require", f"http://{WAN}/"))
    assert done.returncode == 5
    assert done.stderr.startswith("Error: http: "), done.stderr
