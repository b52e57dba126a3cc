"""CVMFS with the real client: ``pytest tests/integration/vpn/real_cvmfs.py``, a cvmfs2 on PATH and no /cvmfs.

Not among the tests that CI runs: Debian has no package of the client, and it is not to be built there. What it was seen
to do here is what the recorded client in ``test_vpn_cvmfs`` does.

Nothing here needs root. The repositories are made by ``cvmfs_repository`` and served on loopback.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import WAN, environment
from cvmfs_repository import Repository, Server

from vpn.cvmfs.cache import trim

CMS, LHCB = "cms.hpcq.test", "lhcb.hpcq.test"
DEADLINE = 120
VERSION = {"sw/version": b"CMSSW_1\n"}


@pytest.fixture
def client():
    assert shutil.which("cvmfs2"), "put a cvmfs2 on PATH"
    assert not Path("/cvmfs").exists(), "this host has a /cvmfs of its own"


@pytest.fixture
def server(client, tmp_path):
    (tmp_path / "srv").mkdir()
    started = Server(tmp_path / "srv")
    yield started
    started.stop()


@pytest.fixture
def cms(server):
    repository = Repository(server.directory, CMS)
    repository.publish(VERSION)
    return repository


def options(server, *repositories, key=None):
    keys = [key] if key else [repository.key for repository in repositories]
    names = ",".join(repository.name for repository in repositories)
    return ["--cvmfs", names, "--cvmfs-server", server.url, *(word for path in keys for word in ("--cvmfs-key", path))]


def surroundings(tmp_path):
    return environment(tmp_path, TMPDIR=str(tmp_path))


def argv_of(*arguments):
    return [sys.executable, "-m", "vpn", "run", "--mode", "none", *map(str, arguments)]


def vpn_run(tmp_path, *arguments):
    done = subprocess.run(
        argv_of(*arguments), env=surroundings(tmp_path), cwd=tmp_path, text=True, capture_output=True, check=False,
        timeout=DEADLINE,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="")
    return done


class Session:
    """A shell inside a session, told what to run line by line."""

    def __init__(self, tmp_path, *arguments) -> None:
        self.process = subprocess.Popen(
            argv_of(*arguments, "--", "sh"), env=surroundings(tmp_path), cwd=tmp_path, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, command):
        """Output (both streams) and status of a command."""
        self.process.stdin.write(f"{{ {command}\n}} 2>&1; printf '\\n=%d\\n' $?\n")
        self.process.stdin.flush()
        lines = []
        while not (line := self.process.stdout.readline()).startswith("="):
            assert line, self.process.stderr.read()
            lines.append(line)
        return "".join(lines)[:-1], int(line[1:])

    def end(self):
        """What the session had to say."""
        return self.process.communicate("exit 0\n", timeout=DEADLINE)[1]

    def __enter__(self):
        assert self.run("true") == ("", 0)
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.end()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.stderr.close()


def clients():
    """Every cvmfs2 on this host."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith("cvmfs2"):
                found.add(int(path.parent.name))
    return found


def wait_ended(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            assert select.select([descriptor], [], [], DEADLINE)[0], f"cvmfs2 {pid} is still there"
            os.close(descriptor)


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_repository_is_read_and_nothing_is_left(server, cms, tmp_path):
    big = bytes(range(256)) * 100_000
    cms.publish({**VERSION, "data/big": big, ".hidden": b"x"})
    before = clients()
    look = f"ls -A /cvmfs/{CMS}; cat /cvmfs/{CMS}/sw/version; wc -c < /cvmfs/{CMS}/data/big; exit 7"
    done = vpn_run(tmp_path, *options(server, cms), "--require", f"cvmfs:{CMS}", "-v", "--", "sh", "-c", look)
    assert (done.returncode, done.stdout) == (7, f".hidden\ndata\nsw\nCMSSW_1\n{len(big)}\n")
    assert "can be read" in done.stderr
    wait_ended(clients() - before)
    assert [path.name for path in (tmp_path / f"hpcq-cvmfs-{os.getuid()}").iterdir()] == ["cache"]


def test_two_repositories_by_two_keys(server, cms, tmp_path):
    lhcb = Repository(server.directory, LHCB)
    lhcb.publish({"name": b"lhcb\n"})
    read = f"cat /cvmfs/{CMS}/sw/version /cvmfs/{LHCB}/name; ls /cvmfs"
    done = vpn_run(tmp_path, *options(server, cms, lhcb), "--", "sh", "-c", read)
    assert (done.returncode, done.stdout) == (0, f"CMSSW_1\nlhcb\n{CMS}\n{LHCB}\n")


DEFAULT = """\
readonly CVMFS_MOUNT_DIR=/cvmfs
readonly CVMFS_RELOAD_SOCKETS=/var/run/cvmfs
CVMFS_CACHE_BASE=/var/lib/cvmfs
CVMFS_SHARED_CACHE=yes
CVMFS_QUOTA_LIMIT=4000
CVMFS_KEYS_DIR=/etc/cvmfs/keys
"""
"""What matters of the package's own default.conf."""


def run_in_cvmfsexec(tmp_path, configuration, *arguments):
    """``vpn run`` with a cvmfsexec on PATH that holds the client and these files of /etc/cvmfs."""
    dist = tmp_path / "exec" / "dist"
    (dist / "usr" / "bin").mkdir(parents=True)
    (dist / "usr" / "bin" / "cvmfs2").symlink_to(shutil.which("cvmfs2"))
    (dist.parent / "cvmfsexec").write_text("#!/bin/sh\nexit 99\n")
    (dist.parent / "cvmfsexec").chmod(0o755)
    for name, text in {"default.conf": DEFAULT, **configuration}.items():
        path = dist / "etc" / "cvmfs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    env = surroundings(tmp_path)
    env["PATH"] = f"{dist.parent}:{env['PATH']}"
    return subprocess.run(
        argv_of(*arguments), env=env, cwd=tmp_path, text=True, capture_output=True, check=False, timeout=DEADLINE
    )


def test_the_configuration_of_a_cvmfsexec(server, cms, tmp_path):
    lhcb = Repository(server.directory, LHCB)
    lhcb.publish({"name": b"lhcb\n"})
    configuration = {
        "default.local": 'CVMFS_HTTP_PROXY="auto;DIRECT"\nCVMFS_PAC_URLS="http://127.0.0.1:9/wpad.dat"\n',
        "domain.d/hpcq.test.conf": '. ../servers\nCVMFS_SERVER_URL="$SERVER/@fqrn@"\n'
        "CVMFS_KEYS_DIR=/etc/cvmfs/keys/hpcq.test\n",
        "servers": f"SERVER={server.url}\n",
        f"config.d/{LHCB}.conf": "CVMFS_PUBLIC_KEY=/etc/cvmfs/other.pub\n",
        "keys/hpcq.test/cms.pub": cms.key.read_text(),
        "other.pub": lhcb.key.read_text(),
    }
    read = ("cat", f"/cvmfs/{CMS}/sw/version", f"/cvmfs/{LHCB}/name")
    done = run_in_cvmfsexec(tmp_path, configuration, "--cvmfs", f"{CMS},{LHCB}", "--", *read)
    assert (done.returncode, done.stdout) == (0, "CMSSW_1\nlhcb\n"), done.stderr


def test_a_repository_that_only_the_configuration_repository_knows(server, cms, tmp_path):
    shared = Repository(server.directory, "config.hpcq.example")
    inside = "$CVMFS_MOUNT_DIR/$CVMFS_CONFIG_REPOSITORY/etc/cvmfs/keys"
    shared.publish(
        {
            "etc/cvmfs/default.conf": b"CVMFS_CONFIG_REPO_DEFAULT_ENV=1\n",
            "etc/cvmfs/common.conf": f"SERVER={server.url}\n".encode(),
            "etc/cvmfs/domain.d/hpcq.test.conf": b'. ../common.conf\nCVMFS_SERVER_URL="$SERVER/@fqrn@"\n'
            + f"CVMFS_KEYS_DIR={inside}\n".encode(),
            "etc/cvmfs/keys/hpcq.test.pub": cms.key.read_bytes(),
        }
    )
    configuration = {
        "default.d/50-test.conf": f"CVMFS_CONFIG_REPOSITORY={shared.name}\n",
        f"config.d/{shared.name}.conf": f"CVMFS_SERVER_URL={server.url}/@fqrn@\nCVMFS_HTTP_PROXY=DIRECT\n"
        "CVMFS_PUBLIC_KEY=/etc/cvmfs/keys/config.pub\n",
        "keys/config.pub": shared.key.read_text(),
    }
    read = f"cat /cvmfs/{CMS}/sw/version; ls /cvmfs"
    done = run_in_cvmfsexec(tmp_path, configuration, "--cvmfs", CMS, "--", "sh", "-c", read)
    assert (done.returncode, done.stdout) == (0, f"CMSSW_1\n{CMS}\n{shared.name}\n"), done.stderr


def test_two_sessions_fetch_a_file_once(server, cms, tmp_path):
    stored = cms.publish({**VERSION, "data/big": os.urandom(3_000_000)})["data/big"]
    path = f"/cvmfs/{stored.relative_to(server.directory)}"
    count = f"cksum < /cvmfs/{CMS}/data/big"
    with Session(tmp_path, *options(server, cms)) as one, Session(tmp_path, *options(server, cms)) as other:
        first = one.run(count)
        assert first[1] == 0
        assert other.run(count) == first
    assert server.asked.count(path) == 1


def test_with_a_full_cache_no_server_is_needed(server, cms, tmp_path):
    read = f"cat /cvmfs/{CMS}/sw/version"
    assert vpn_run(tmp_path, *options(server, cms), "--", "sh", "-c", read).returncode == 0
    server.stop()
    done = vpn_run(tmp_path, *options(server, cms), "--", "sh", "-c", read)
    assert (done.returncode, done.stdout) == (0, "CMSSW_1\n")
    offline = "its servers cannot be reached: only what is in the cache can be read"
    assert done.stderr == f"vpn run: cvmfs: {CMS}: {offline}\n"


def test_what_was_trimmed_is_fetched_again(server, cms, tmp_path):
    names = [f"data/{number}" for number in range(20)]
    cms.publish({**VERSION, **{name: os.urandom(1_000_000) for name in names}})
    cache = tmp_path / f"hpcq-cvmfs-{os.getuid()}" / "cache"
    with Session(tmp_path, *options(server, cms)) as session:
        sums = f"cd /cvmfs/{CMS} && cksum data/*"
        first = session.run(sums)
        assert first[1] == 0
        assert trim(str(cache), 10 << 20) >= 10_000_000
        assert session.run(sums) == first
        assert session.run(f"ls /cvmfs/{CMS}/sw") == ("version\n", 0)
    with Session(tmp_path, *options(server, cms)) as session:
        assert session.run(sums) == first


def test_a_low_limit_of_open_files_is_raised(server, cms, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    arguments = argv_of(*options(server, cms), "--", "sh", "-c", "echo up; read line")
    argv = ["sh", "-c", 'ulimit -Sn 256 && exec "$@"', "sh", *arguments]
    before = clients()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(argv, env=surroundings(tmp_path), cwd=tmp_path, text=True, **pipes) as process:
        assert process.stdout.readline() == "up\n"
        limits = {resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] for pid in clients() - before}
        process.communicate("\n", timeout=DEADLINE)
    assert limits == {min(hard, 131072)}


# --- outages -----------------------------------------------------------------------------------------------------


def test_an_outage_of_the_server(server, cms, tmp_path):
    later = f"/cvmfs/{CMS}/sw/x86/later"
    cms.publish({**VERSION, "sw/x86/later": b"later\n"})
    with Session(tmp_path, *options(server, cms)) as session:
        assert session.run(f"cat /cvmfs/{CMS}/sw/version") == ("CMSSW_1\n", 0)
        server.stop()
        assert session.run(f"cat /cvmfs/{CMS}/sw/version") == ("CMSSW_1\n", 0)
        said, status = session.run(f"cat {later}")
        assert (said, status) == (f"cat: {later}: Input/output error\n", 1)
        server.start()
        assert session.run(f"until cat {later} 2>/dev/null; do sleep 1; done") == ("later\n", 0)
        said = session.end()
    why = "host connection problem (no server answers)"
    assert said == f"vpn run: cvmfs: {CMS}: /sw/x86/later could not be fetched: {why}\n"


@pytest.mark.parametrize("which", [max, min], ids=["client", "watchdog"])
def test_a_client_that_is_killed_ends_the_session(server, cms, tmp_path, which):
    before = clients()
    with Session(tmp_path, *options(server, cms)) as session:
        victim = which(clients() - before, key=lambda pid: len(list(Path(f"/proc/{pid}/task").iterdir())))
        os.kill(victim, signal.SIGKILL)
        assert session.process.wait(DEADLINE) == 5
        said = session.process.stderr.read()
    assert said == f"Error: cvmfs: {CMS}: its cvmfs2 has ended, maybe killed for lack of memory\n"
    assert clients() == before


@pytest.mark.parametrize("victim", ["session", "holder"])
def test_killed_it_leaves_no_client(server, cms, tmp_path, victim):
    before = clients()
    session = Session(tmp_path, *options(server, cms))
    with contextlib.suppress(BrokenPipeError), session:
        mine = clients() - before
        assert mine
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in mine} - mine
        for pid in [session.process.pid] if victim == "session" else parents:
            os.kill(pid, signal.SIGKILL)
        wait_ended(mine)
        session.process.wait(DEADLINE)
    assert clients() == before
    assert CMS not in Path("/proc/self/mounts").read_text()


# --- refusals ----------------------------------------------------------------------------------------------------


def refused(done, *words):
    assert (done.returncode, done.stdout) == (5, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"Error: cvmfs: {CMS}: cvmfs2 ended with status ")
    for word in words:
        assert word in done.stderr


def test_a_wrong_key(server, cms, tmp_path):
    other = Repository(tmp_path / "other", CMS)
    refused(
        vpn_run(tmp_path, *options(server, cms, key=other.key), "--", "echo", "ran"),
        "the public key is not this repository's",
        "invalid whitelist signature",
    )


def test_a_whitelist_that_has_ended(server, cms, tmp_path):
    cms.write_whitelist(-2)
    refused(
        vpn_run(tmp_path, *options(server, cms), "--", "echo", "ran"), "its whitelist has ended", "expired whitelist"
    )


def test_no_server(server, cms, tmp_path):
    server.stop()
    refused(vpn_run(tmp_path, *options(server, cms), "--", "echo", "ran"), "no server answers")


def test_no_proxy(server, cms, tmp_path):
    proxy = ("--cvmfs-proxy", "http://127.0.0.1:9")
    refused(vpn_run(tmp_path, *options(server, cms), *proxy, "--", "echo", "ran"), "the proxy does not serve it")


def test_a_server_without_this_repository(server, cms, tmp_path):
    cms.top.rename(cms.top.with_name("elsewhere"))
    refused(vpn_run(tmp_path, *options(server, cms), "--", "echo", "ran"), "the server does not have it")


def test_a_server_that_says_something_else(server, cms, tmp_path):
    (cms.top / ".cvmfspublished").write_text("<html>Please log in</html>\n")
    refused(vpn_run(tmp_path, *options(server, cms), "--", "echo", "ran"), "one that is no repository")


def test_a_key_that_cannot_be_read(server, cms, tmp_path):
    refused(
        vpn_run(tmp_path, *options(server, cms, key=tmp_path / "absent"), "--", "echo", "ran"),
        "its public key cannot be read",
    )


@pytest.mark.parametrize("change", ["other", "gone"])
def test_a_file_that_the_server_does_not_serve_as_it_was_published(server, cms, tmp_path, change):
    stored = cms.publish(VERSION)["sw/version"]
    if change == "gone":
        stored.unlink()
    else:
        stored.write_bytes(b"something else")
    done = vpn_run(tmp_path, *options(server, cms), "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"Error: cvmfs: /cvmfs/{CMS}/sw/version: Input/output error")
    assert "(cvmfs2 says: failed to fetch /sw/version " in done.stderr


@pytest.mark.parametrize("name", ["a:b", 'a"b'])
def test_a_cache_of_whose_path_cvmfs2_cannot_be_told(server, cms, tmp_path, name):
    done = vpn_run(tmp_path, *options(server, cms), "--cvmfs-cache", tmp_path / name, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (5, "")
    assert f"cvmfs2 cannot be told of a path with {name[1]} in it" in done.stderr


@pytest.mark.parametrize("name", ["with space", "it's", "a[1]*"])
def test_a_cache_with_any_other_path(server, cms, tmp_path, name):
    cache = ("--cvmfs-cache", tmp_path / name)
    done = vpn_run(tmp_path, *options(server, cms), *cache, "--", "cat", f"/cvmfs/{CMS}/sw/version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "CMSSW_1\n", "")
    assert any((tmp_path / name).rglob("cvmfschecksum.*"))


# --- through a tunnel --------------------------------------------------------------------------------------------


def test_through_a_tunnel(client, gateway):
    (gateway.directory / "cvmfs").mkdir()
    repository = Repository(gateway.directory / "cvmfs", CMS)
    big = os.urandom(5_000_000)
    repository.publish({**VERSION, "data/big": big})
    serve = [sys.executable, "-um", "http.server", "--bind", WAN, "--directory", str(gateway.directory), "8000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    outside = gateway.start("wan", *serve, **pipes)
    gateway.children.append(outside)
    assert outside.stdout.readline().startswith(b"Serving HTTP")
    wanted = ["--cvmfs", CMS, "--cvmfs-server", "http://web.example.org:8000/cvmfs", "--cvmfs-key", str(repository.key)]
    for mode in ("relay", "openconnect"):
        cache = ("--cvmfs-cache", str(gateway.directory / f"{mode}-cache"))
        read = f"cat /cvmfs/{CMS}/sw/version; wc -c < /cvmfs/{CMS}/data/big"
        options = ("--mode", mode, "--credential", gateway.credential(mode), "--require", f"cvmfs:{CMS}")
        done = gateway.vpn("node", "run", *options, *wanted, *cache, "--", "sh", "-c", read)
        assert (done.returncode, done.stdout) == (0, f"CMSSW_1\n{len(big)}\n"), done.stderr
    gateway.wait_gone(pid for pid, line in gateway.extra().items() if "cvmfs2" in line)
