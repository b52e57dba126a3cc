"""The library: sessions, processes, probes, as a pilot uses them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

WAN = "203.0.113.1"
PRELUDE = """
import asyncio, json, os, signal, sys, threading
from pathlib import Path
from vpn import *
def config(path=None):
    if path is None:
        return TunnelConfig("none")
    return TunnelConfig("openconnect", Credential.from_bytes(Path(path).read_bytes()))
"""

SPAWN = """
async def main():
    async with open_session(config(*sys.argv[1:2])) as session:
        r, w = os.pipe(); os.set_blocking(r, True)
        big = {"BIG": "x" * 100_000, "BYTES": "\\udcff"}
        script = f'printf "%s %s %s" $PPID "${{#BIG}}" "$(pwd)" >/proc/self/fd/{w}; exit 3'
        p = await session.spawn(["sh", "-c", script], env={**os.environ, **big}, cwd="/", pass_fds=(w,))
        os.close(w)
        assert await p.wait() == 3 == p.returncode
        text = os.read(r, 100).decode(); os.close(r)
        assert text.split()[1:] == ["100000", "/"], text
        assert p.max_rss > 100_000
        p = await session.spawn(["sleep", "1000"])
        assert Path(f"/proc/{p.pid}/comm").read_text() == "sleep\\n"
        assert os.getpgid(p.pid) == p.pid
        os.killpg(p.pid, signal.SIGTERM)
        assert await p.wait() == -signal.SIGTERM
        p.send_signal(signal.SIGTERM)
        for wrong in (["/no/such"], ["/etc/passwd"]):
            try:
                await session.spawn(wrong)
            except OSError as error:
                assert wrong[0] in str(error)
            else:
                raise AssertionError
        many = await asyncio.gather(*(session.spawn(["sh", "-c", f"exit {n}"]) for n in range(50)))
        assert [await p.wait() for p in many] == list(range(50))
        left = await session.spawn(["sleep", "1000"])
        assert not session.lost.done()
        print(json.dumps([session.info.mode, session.info.kind]))
    assert left.returncode == -signal.SIGKILL
    try:
        await session.spawn(["true"])
    except TunnelError:
        pass
    else:
        raise AssertionError
asyncio.run(main())
"""


def run_script(site, script, *arguments):
    return site.run("node", sys.executable, "-c", PRELUDE + script, *arguments)


def test_spawn_in_mode_none(site):
    done = run_script(site, SPAWN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["none", ""]
    site.wait_empty()


def test_spawn_in_a_tunnel(gateway, credential):
    done = run_script(gateway, SPAWN, credential())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["openconnect", "TLS"]


def test_no_descriptor_is_left_open(gateway, credential):
    script = """
async def once(path):
    async with open_session(config(path)) as session:
        await session.probe(["dns:web.example.org"])
        p = await session.spawn(["true"]); await p.wait()
async def main():
    await once(sys.argv[1])
    before = sorted(os.listdir("/proc/self/fd"))
    for path in sys.argv[2:]:
        await once(path)
    assert sorted(os.listdir("/proc/self/fd")) == before
asyncio.run(main())
"""
    done = run_script(gateway, script, *(credential(f"c{n}") for n in range(3)))
    assert done.returncode == 0, done.stderr


def test_lost_is_an_event(gateway, credential):
    script = """
async def main():
    async with open_session(config(sys.argv[1])) as session:
        print("up", flush=True)
        error = await session.lost
        assert isinstance(error, TunnelError)
        print(error.layer, flush=True)
asyncio.run(main())
"""
    command = [sys.executable, "-c", PRELUDE + script, credential()]
    with gateway.start("node", *command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        os.kill(gateway.find("openconnect --protocol")[0], signal.SIGKILL)
        assert process.stdout.readline() == b"openconnect\n"
        assert process.wait(90) == 0


def test_a_session_in_a_thread_beside_others(gateway, credential):
    script = """
async def main():
    async with open_session(config(sys.argv[1])) as session:
        p = await session.spawn(["true"])
        print(await p.wait())
stop = threading.Event()
busy = [threading.Thread(target=stop.wait) for _ in range(8)]
worker = threading.Thread(target=lambda: asyncio.run(main()))
for thread in [*busy, worker]:
    thread.start()
worker.join(); stop.set()
"""
    done = run_script(gateway, script, credential())
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_tasks_have_no_rights_over_the_namespace(prerequisites, tmp_path):
    """An ordinary user stays one inside; here without the site, in which everyone is root."""
    nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    script = """
from vpn.process import start_keeper, run
from vpn.namespace import open_namespace
async def main():
    keeper = await start_keeper()
    namespace = await open_namespace(keeper.client)
    status, text = await run(namespace.client, ["sh", "-c", sys.argv[1]], deadline=10)
    await namespace.close(); await keeper.close()
    print(text)
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, "id -u; ip link set lo down; grep CapEff /proc/self/status"],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        cwd="/",
        **nobody,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == str(nobody.get("user", os.geteuid())), done.stderr
    assert "not permitted" in lines[1]
    assert lines[-1].split()[1] == "0" * 16


def test_xrootd(gateway, credential):
    """A real server is proven by its protocol, a web server on that port is not one, and xrdcp copies."""
    program = shutil.which("xrootd")
    if program is None:
        if os.environ.get("HPCQ_TESTS_MUST_RUN") == "1":
            pytest.fail("xrootd is missing")
        pytest.skip("needs xrootd")
    here = gateway.directory / "xrootd"
    (here / "data").mkdir(parents=True)
    (here / "data" / "file").write_bytes(os.urandom(1_000_000))
    (here / "cfg").write_text(
        f"xrd.port 1094\nall.export /\noss.localroot {here}/data\nall.adminpath {here}\nall.pidpath {here}\n"
    )
    argv = [
        "unshare",
        "--user",
        "--map-user=1000",
        "--map-group=1000",
        program,
        "-c",
        f"{here}/cfg",
        "-l",
        f"{here}/log",
    ]
    with gateway.start("wan", *argv) as server:
        wait_for(here / "log", "initialization completed")
        done = gateway.vpn(
            "node",
            "run",
            "-v",
            "--credential",
            credential(),
            "--require",
            f"root://{WAN}",
            "--",
            "xrdcp",
            "--silent",
            f"root://{WAN}//file",
            str(here / "copy"),
        )
        assert done.returncode == 0, done.stderr
        assert "XRootD data server speaking protocol" in done.stderr
        assert (here / "copy").read_bytes() == (here / "data" / "file").read_bytes()
        script = """
async def main():
    async with open_session(config(sys.argv[1])) as session:
        (result,) = await session.probe(["root://203.0.113.1:80"], timeout=5)
        assert not result.ok
        print(result.message)
asyncio.run(main())
"""
        assert "does not answer the XRootD handshake" in run_script(gateway, script, credential("b")).stdout
        for pid in gateway.find("xrootd -c"):
            os.kill(pid, signal.SIGKILL)
        server.wait(90)


def wait_for(path, text):
    """Follow a file that may not exist yet until a line has this text."""
    tail = ["tail", "-n", "+1", "-F", str(path)]
    with subprocess.Popen(tail, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert any(text in line for line in process.stdout)
        process.kill()


@pytest.mark.parametrize("when", ["bring-up", "running"])
def test_termination_is_passed_on_and_everything_ends(gateway, credential, when):
    options = ["--require", "root://192.0.2.200:1"] if when == "bring-up" else []  # nobody there: the probe waits,
    nobody = ("192.0.2.200", "lladdr", "02:00:00:00:00:01", "dev", "to-node")  # and is not told after three seconds
    gateway.check("login", "ip", "neigh", "add", *nobody)
    before = set(gateway.extra())
    with gateway.start_vpn(
        "node",
        "run",
        "-v",
        "--credential",
        credential(),
        *options,
        "--",
        "sh",
        "-c",
        "echo up >&2; exec sleep 1000",
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if line.startswith("up" if when == "running" else "vpn run: tunnel up"):
                break
        os.kill(gateway.find_vpn("run"), signal.SIGTERM)
        assert process.wait(90) == 143
    gateway.wait_gone(set(gateway.extra()) - before)


def test_no_state_is_left_on_disk_by_a_session(gateway, credential):
    scratch = gateway.directory / "tmp"
    scratch.mkdir()
    done = gateway.run(
        "node",
        "env",
        f"TMPDIR={scratch}",
        sys.executable,
        "-m",
        "vpn",
        "run",
        "--credential",
        credential(),
        "--",
        "true",
    )
    assert done.returncode == 0
    assert not list(Path(scratch).iterdir())


@pytest.mark.parametrize("mode", ["none", "openconnect"])
def test_a_shell_on_a_terminal_has_job_control(gateway, credential, mode):
    options = ["--mode", "none"] if mode == "none" else ["--credential", credential()]
    ours, theirs = os.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    command = ["run", *options, "--", "bash", "--norc", "-i"]
    process = gateway.start_vpn("node", *command, **streams, preexec_fn=lambda: take_terminal(theirs))
    os.close(theirs)
    with process, os.fdopen(ours, "r+b", buffering=0) as terminal:
        text = talk(terminal, b"stty -echo; PS1=; echo rea''dy\n", b"ready")
        text += talk(terminal, b"sleep 1000\n", b"")
        sleeping = wait_for_process(gateway, "sleep 1000")
        terminal.write(b"\x03")
        gateway.wait_gone(sleeping)
        text += talk(terminal, b"echo st''ill; exit 4\n", b"still")
        assert process.wait(90) == 4
    assert b"job control" not in text
    assert b"ioctl" not in text


def take_terminal(fd):
    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


def talk(terminal, line, until):
    terminal.write(line)
    text = b""
    while until not in text:
        text += terminal.read(4096)
    return text


def wait_for_process(site, line):
    """The pids of a command, asked for until there are some."""
    end = time.monotonic() + 90
    while time.monotonic() < end:
        pids = [pid for pid, text in site.extra().items() if text.strip() == line]
        if pids:
            return pids
    raise AssertionError(f"{line} did not start")


def test_a_gateway_that_is_killed_loses_the_tunnel_after_the_reconnect_time(gateway, credential):
    script = """
import dataclasses
async def main():
    settings = dataclasses.replace(config(sys.argv[1]), reconnect_timeout=3)
    async with open_session(settings) as session:
        print("up", flush=True)
        error = await session.lost
        print(error, flush=True)
asyncio.run(main())
"""
    command = [sys.executable, "-c", PRELUDE + script, credential()]
    with gateway.start("node", *command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        os.kill(gateway.find("vpn.gateway.daemon import main")[0], signal.SIGKILL)
        assert process.stdout.readline().startswith("gateway: ")
        assert process.wait(90) == 0


def test_limits_are_the_callers(site):
    done = site.run(
        "node",
        "sh",
        "-c",
        'ulimit -S -n 321; "$@"',
        "-",
        sys.executable,
        "-m",
        "vpn",
        "run",
        "--mode",
        "none",
        "--",
        "sh",
        "-c",
        "ulimit -S -n",
    )
    assert done.stdout == "321\n", done.stderr


SILENCE = """
async def main():
    made = config(sys.argv[1])
    quick = dataclasses.replace(made, reconnect_timeout=2, probe_interval=2)
    async with open_session(quick) as session:
        print("up", flush=True)
        print(await session.lost, flush=True)
        child = await session.spawn(["sh", "-c", "exit 4"])
        assert await child.wait() == 4, "what needs no way out goes on"
asyncio.run(main())
"""


def test_a_gateway_that_falls_silent_loses_the_tunnel(gateway, credential):
    process = gateway.start("node", sys.executable, "-c", "import dataclasses\n" + PRELUDE + SILENCE, credential(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    with process:
        assert process.stdout.readline() == "up\n", process.stderr.read()
        silent = gateway.find("ocserv")
        for pid in silent:
            with contextlib.suppress(ProcessLookupError):  # the worker of the login may be ending
                os.kill(pid, signal.SIGSTOP)
        try:
            assert "no sign of life" in process.stdout.readline()
            assert process.wait(90) == 0, process.stderr.read()
        finally:
            for pid in silent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
