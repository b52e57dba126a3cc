"""Mode socks through the servers people have: ``ssh -D`` to the login node, and ocproxy over openconnect."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LOGIN, WAN = "192.0.2.1", "203.0.113.1"
TRAFFIC = str(Path(__file__).with_name("traffic.py"))
PROXY, SSHD_PORT = "127.0.0.1:1080", 2222
DEADLINE = 60.0
SSHD = """\
Port {port}
ListenAddress {address}
HostKey {room}/host_key
AuthorizedKeysFile {room}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding local
"""


@contextlib.contextmanager
def running(site, host, *argv, marks=(), **options):
    """A program that is ended, by its own pids, with what it started."""
    with site.start(host, *argv, **options) as process:
        try:
            yield process
        finally:
            for pid in {process.pid, *(pid for mark in marks for pid in site.find(mark))}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(DEADLINE)


def listening(site, host, address, port, process):
    """Wait until somebody accepts connections there: connecting is the only event there is."""
    script = """
import socket, sys, time
end = time.monotonic() + float(sys.argv[3])
while socket.socket().connect_ex((sys.argv[1], int(sys.argv[2]))):
    assert time.monotonic() < end
    time.sleep(0.05)
"""
    asked = subprocess.Popen([*site.enter(host), sys.executable, "-c", script, address, str(port), str(DEADLINE)])
    ended = os.pidfd_open(process.pid)
    try:
        poll, done = select.poll(), os.pidfd_open(asked.pid)
        poll.register(ended, select.POLLIN)
        poll.register(done, select.POLLIN)
        poll.poll()
        os.close(done)
        assert process.poll() is None, "it ended"
        assert asked.wait(DEADLINE) == 0
    finally:
        os.close(ended)
        asked.kill()
        asked.wait()


@pytest.fixture
def ssh(site, needs):
    """``ssh -D`` from the node to a real sshd on the login node."""
    sshd, ssh = needs("sshd"), needs("ssh")
    room = site.directory / "ssh"
    room.mkdir()
    for name in ("host_key", "user_key"):
        site.check("login", "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(room / name))
    config = room / "sshd_config"
    config.write_text(SSHD.format(port=SSHD_PORT, address=LOGIN, room=room))
    # As root it would become the user "sshd", whom a user namespace of one id does not have; another serves himself.
    (room / "host_key").chmod(0o600)
    nobody = ["unshare", "--user", "--map-user=65534", "--map-group=65534"]
    with running(site, "login", *nobody, sshd, "-D", "-e", "-f", str(config), marks=("sshd",)) as server:
        listening(site, "node", LOGIN, SSHD_PORT, server)
        options = ["-F", "none", "-i", str(room / "user_key"), "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes"]
        known = ["-o", f"UserKnownHostsFile={room}/known", "-o", "StrictHostKeyChecking=accept-new"]
        where = ["-N", "-D", PROXY, "-p", str(SSHD_PORT), f"nobody@{LOGIN}"]
        with running(site, "node", ssh, *options, *known, *where, marks=("ssh -F",)) as client:
            listening(site, "node", *PROXY.split(":"), client)
            yield


@pytest.fixture
def ocproxy(gateway, credential, needs):
    """The prototype's way without namespaces: openconnect to our gateway, its packets ended by ocproxy."""
    program, end = needs("openconnect"), needs("ocproxy")
    known = json.loads(Path(credential()).read_text())
    argv = [
        program, "--protocol=anyconnect", "--non-inter", "--no-dtls", "--passwd-on-stdin",
        f"--user={known['username']}", f"--servercert={known['pin']}",
        "--script-tun", f"--script={end} -D {PROXY.partition(':')[2]}",
        f"https://{LOGIN}:{known['port']}/",
    ]  # fmt: skip
    with running(gateway, "node", *argv, marks=("script-tun", "ocproxy -D"), stdin=subprocess.PIPE) as process:
        process.stdin.write(known["password"].encode() + b"\n")
        process.stdin.flush()
        listening(gateway, "node", *PROXY.split(":"), process)
        yield


def run(site, *argv):
    done = site.vpn("node", "run", "--mode", "socks", "--socks", PROXY, "--", *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def traffic(site):
    argv = (sys.executable, TRAFFIC, "serve")
    with running(site, "wan", *argv, marks=("traffic.py serve",), stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield


def carries(site, *what):
    """Programs of one session: names and addresses by curl, and kinds of traffic; prints the status of an upload."""
    sent = site.directory / "sent"
    sent.write_bytes(bytes(20_000_000))
    with traffic(site):
        lines = [
            "curl -sS http://web.example.org/",
            f"curl -sS http://{WAN}/",
            f"curl -sS -T {sent} -w '%{{http_code}}\\n' http://{WAN}/sent",
            *(shlex.join([sys.executable, TRAFFIC, *each]) for each in what),
        ]
        assert run(site, "sh", "-ec", "\n".join(lines)) == "hello\nhello\n204\n"


def test_ssh(site, ssh):
    carries(site, ("up", WAN, "20000000"), ("down", WAN, "20000000"), ("half-close", WAN), ("many", WAN, "50"))


def test_ocproxy(gateway, ocproxy):
    """It takes the end of one direction for that of both: so nothing here ends one first."""
    carries(gateway, ("down", WAN, "20000000"), ("many", WAN, "50"))
