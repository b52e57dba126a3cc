"""Mode slirp: over the node's own way out, which the site's node is given here, by pasta and by slirp4netns."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

WAN = "203.0.113.1"
MARKS = {"pasta": "--config-net", "slirp4netns": "--ready-fd=3"}


def hide(site, *programs):
    """Make programs ones that cannot be executed, on this site."""
    (site.directory / "nothing").write_text("")
    for program in programs:
        path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin")
        if path:
            site.check("login", "mount", "--bind", str(site.directory / "nothing"), os.path.realpath(path))


@pytest.fixture
def open_site(site):
    """A site whose node reaches outside."""
    site.check("node", "ip", "route", "add", "default", "via", "192.0.2.1")
    site.check("login", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    site.check("wan", "ip", "route", "add", "192.0.2.0/24", "via", "203.0.113.2")
    return site


@pytest.fixture(params=["pasta", "slirp4netns"])
def stack(request, open_site, needs):
    """The program that carries the packets; the other one is hidden."""
    needs(request.param)
    hide(open_site, *(name for name in MARKS if name != request.param))
    return request.param


def run(site, *argv, options=(), **more):
    return site.vpn("node", "run", "--mode", "slirp", *options, "--", *argv, **more)


def test_tcp_and_names(open_site, stack):
    done = run(open_site, "curl", "-sS", "http://web.example.org/", options=("-v", "--require", f"http://{WAN}/"))
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert f": {stack} " in done.stderr
    open_site.wait_empty()


def test_the_hosts_loopback_is_not_its_own(open_site, stack):
    listener = "import socket; s = socket.create_server(('127.0.0.1', 8123)); print('up', flush=True); input()"
    with open_site.start(
        "node", "python3", "-c", listener, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout.readline() == "up\n"
        for host in ("127.0.0.1", "198.19.0.2"):
            done = run(open_site, "curl", "-sS", "--max-time", "10", f"http://{host}:8123/")
            assert done.returncode in (7, 28, 56), done.stderr
        server.stdin.close()


def test_killed_it_is_started_again_and_the_session_goes_on(open_site, stack):
    script = "echo up; read line; exec curl -sS --retry 20 --retry-all-errors --max-time 60 http://web.example.org/"
    with held(open_site, script) as process:
        (pid,) = open_site.find(MARKS[stack])
        os.kill(pid, signal.SIGKILL)
        open_site.wait_gone([pid])
        output, error = process.communicate("go\n", timeout=90)
        assert (process.returncode, output) == (0, "hello\n"), error
        assert f"{stack} ended (status -9): starting {stack} again" in error
    open_site.wait_empty()


WATCHED = """
import asyncio, sys
from vpn import TunnelConfig, open_session
from vpn.modes import slirp
ask, deadlines = slirp.ask, iter([60, 0.2])
async def asked(sock, server, _):
    deadline = next(deadlines)
    if deadline < 1:
        await asyncio.to_thread(sys.stdin.readline)
    await ask(sock, server, deadline)
    print("up", flush=True)
slirp.ask = asked
async def main():
    async with open_session(TunnelConfig("slirp", probe_interval=1, reconnect_timeout=0)) as session:
        print(await session.lost, flush=True)
asyncio.run(main())
"""


def test_alive_but_carrying_nothing_it_is_lost(open_site, needs):
    needs("slirp4netns")
    hide(open_site, "pasta")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with open_site.start("node", sys.executable, "-c", WATCHED, text=True, **pipes) as process:
        assert process.stdout.readline() == "up\n", process.stderr.read()
        (pid,) = open_site.find(MARKS["slirp4netns"])
        os.kill(pid, signal.SIGSTOP)
        process.stdin.write("go\n")
        process.stdin.flush()
        assert "nothing comes from outside any more" in process.stdout.readline()
        os.kill(pid, signal.SIGCONT)
        assert process.wait(90) == 0, process.stderr.read()
    open_site.wait_empty()


def test_whoever_is_killed_pasta_does_not_stay(open_site, needs):
    needs("pasta")
    hide(open_site, "slirp4netns")  # which goes before an old pasta
    for victim in ("-m vpn run ", "vpn.keeper", "vpn.holder"):
        with held(open_site) as process:
            assert open_site.find(MARKS["pasta"])
            pid = open_site.find_vpn("run") if "run" in victim else min(open_site.find(victim))
            os.kill(pid, signal.SIGKILL)
            process.wait(60)
        open_site.wait_empty()


def held(site, script="echo up; exec sleep 1000"):
    """A session with a command that stays."""
    process = site.start_vpn(
        "node", "run", "--mode", "slirp", "--", "sh", "-c", script,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    return process


PASTA = """#!/bin/sh
if [ "$1" = --version ]; then echo "pasta {version}"; exit; fi
echo cannot work here >&2
exit 1
"""


@pytest.mark.parametrize("version", ["2024_05_23.765eb0b", "0.0~git20230309"])
def test_a_new_pasta_first_and_what_does_not_come_up_is_passed_over(open_site, needs, version):
    path = os.path.realpath(needs("pasta"))
    broken = open_site.directory / "broken"
    broken.write_text(PASTA.format(version=version))
    broken.chmod(0o755)
    open_site.check("login", "mount", "--bind", str(broken), path)
    done = run(open_site, "curl", "-sS", "http://web.example.org/", options=("-v",))
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    assert ": slirp4netns " in done.stderr
    line = "pasta passed over: pasta ended before it was ready: cannot work here"
    assert (line in done.stderr) == version.startswith("2024")


def test_neither_is_there(open_site):
    hide(open_site, *MARKS)
    done = run(open_site, "true")
    assert done.returncode == 5
    assert "install slirp4netns" in done.stderr
    assert "passt" in done.stderr


def test_without_a_way_out_it_comes_up_and_reaches_nothing(site):
    done = run(site, "true", options=("--require", f"http://{WAN}/"))
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("Error: http: "), done.stderr
