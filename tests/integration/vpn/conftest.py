"""A site of namespaces for the tunnel tests, built by whoever runs them, root or not.

``unshare`` makes a user namespace; three network namespaces in it are ``login``, ``node`` (reaches only
``login``) and ``wan`` (reached only from ``login``). Everything in it belongs to one pid namespace, so what a
test left behind can be listed exactly, and dies with the fixture.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

import vpn

VPN = Path(vpn.__file__).resolve().parent  # installed, or the checkout's
SHIMS = VPN / "preload"
LOGIN, NODE, WAN = "192.0.2.1", "192.0.2.11", "203.0.113.1"
DEADLINE = 90.0


def need(condition: bool, what: str) -> None:
    """Skip when a prerequisite is missing; fail where everything must be there."""
    if condition:
        return
    if os.environ.get("HPCQ_TESTS_MUST_RUN") == "1":
        pytest.fail(f"HPCQ_TESTS_MUST_RUN is set, but {what} is missing")
    pytest.skip(f"needs {what}")


def has(program: str) -> bool:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is not None


def environment(home, **more):
    """Of programs that are to keep their files in ``home``."""
    return {
        **os.environ,
        "HOME": str(home),
        "XDG_STATE_HOME": str(home),
        "PYTHONPATH": str(VPN.parent),
        "PYTHONWARNINGS": "error",
        **more,
    }


class Site:
    """Three hosts; ``run`` and ``start`` execute on one of them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mark = uuid.uuid4().hex
        (directory / "home").mkdir()
        self.holder = self._hold(
            [
                "unshare",
                "--user",
                "--map-root-user",
                "--net",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                "ip link set lo up; echo ready; exec cat",
            ]
        )
        self.pid = self._child(self.holder.pid)
        self.hosts = {"login": self.pid}
        self.children = [self.holder]
        for host in ("node", "wan"):
            process = self._hold(
                [
                    *self.enter("login"),
                    "unshare",
                    "--net",
                    "sh",
                    "-c",
                    "ip link set lo up; echo ready; exec cat",
                ]
            )
            self.children.append(process)
            self.hosts[host] = self._child(process.pid)
        self._wire("node", LOGIN, NODE)
        self._wire("wan", "203.0.113.2", WAN)
        (directory / "resolv.conf").write_text(f"nameserver {WAN}\n")
        self.check("login", "mount", "--bind", str(directory / "resolv.conf"), os.path.realpath("/etc/resolv.conf"))
        self.services = self._hold(
            [*self.enter("wan"), sys.executable, str(Path(__file__).with_name("services.py")), WAN]
        )
        self.children.append(self.services)
        self.hosts["services"] = self._child(self.services.pid)
        self.known = self.processes()

    @staticmethod
    def _child(pid):
        """unshare and nsenter fork to enter a pid namespace: the host is their child."""
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _hold(self, argv):
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n", f"{argv} did not start"
        return process

    def _wire(self, host, near, far):
        inner = self.inner_pid(self.hosts[host])
        self.check(
            "login",
            "ip",
            "link",
            "add",
            f"to-{host}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(inner),
        )
        for where, device, address in (("login", f"to-{host}", near), (host, "eth0", far)):
            self.check(where, "ip", "addr", "add", f"{address}/24", "dev", device)
            self.check(where, "ip", "link", "set", device, "up")

    @staticmethod
    def inner_pid(pid):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
        raise AssertionError("no NSpid")

    def enter(self, host):
        pid = self.pid
        argv = ["nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-m", "-n", "-p"]
        if host != "login":
            argv += ["nsenter", "-t", str(self.inner_pid(self.hosts[host])), "-n"]
        return argv

    def env(self):
        return environment(self.directory / "home", PYTHONDONTWRITEBYTECODE="1")

    def start(self, host, *argv, **options):
        return subprocess.Popen([*self.enter(host), *argv], env=self.env(), cwd=self.directory, **options)

    def run(self, host, *argv, **options):
        return subprocess.run(
            [*self.enter(host), *argv],
            env=self.env(),
            cwd=self.directory,
            text=True,
            capture_output=True,
            check=False,
            timeout=DEADLINE,
            **options,
        )

    def check(self, host, *argv, **options):
        done = self.run(host, *argv, **options)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def vpn(self, host, *argv, **options):
        return self.run(host, sys.executable, "-m", "vpn", *argv, **options)

    def start_vpn(self, host, *argv, **options):
        return self.start(host, sys.executable, "-m", "vpn", *argv, **options)

    def processes(self):
        """Every process of the site's pid namespace, pid → command line."""
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (path / "status").read_text()
                nspid = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
                chain = self._is_inside(int(path.name), namespace, len(nspid))
                if chain and "\nState:\tZ" not in status:
                    found[int(path.name)] = (
                        (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
        return found

    def _is_inside(self, pid, namespace, _depth):
        seen = pid
        while seen > 1:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{seen}/ns/pid").readlink() == namespace:
                    return True
            try:
                seen = int(Path(f"/proc/{seen}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return False
        return False

    def start_gateway(self, *options):
        """Run a gateway on the login node, the default one."""
        done = self.vpn("login", "gateway", "start", "--json", *options)
        assert done.returncode == 0, done.stderr

    def credential(self, name, gateway="default"):
        """A credential file that a node can use."""
        file = str(self.directory / name)
        done = self.vpn("login", "gateway", "credential", "--name", gateway, "--label", name, "--output", file)
        assert done.returncode == 0, done.stderr
        return file

    def extra(self):
        """Processes that were not there when the site was built."""
        return {pid: line for pid, line in self.processes().items() if pid not in self.known}

    def find(self, text):
        """Pids of extra processes whose command line has this text."""
        return [pid for pid, line in self.extra().items() if text in line]

    def find_vpn(self, command):
        """The pid of the ``python -m vpn COMMAND`` itself, not of the nsenter before it."""
        pids = [pid for pid, line in self.extra().items() if "nsenter" not in line and f"-m vpn {command} " in line]
        assert len(pids) == 1, self.extra()
        return pids[0]

    def wait_gone(self, pids, deadline=DEADLINE):
        """Wait until these processes ended, each by its pidfd."""
        end = time.monotonic() + deadline
        for pid in pids:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                assert poll.poll(max(0, end - time.monotonic()) * 1000), f"still there: {pid} {self.extra().get(pid)}"
            finally:
                os.close(fd)

    def wait_for_line(self, path, text, count=1):
        """Follow a log until it has ``count`` lines with ``text``, which are returned."""
        argv = ["tail", "-n", "+1", "-F", str(path)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as tail:
            lines = list(itertools.islice((line for line in tail.stdout if text in line), count))
            tail.kill()
        return lines

    def wait_empty(self):
        """Wait until only the site itself is left."""
        end = time.monotonic() + DEADLINE
        while extra := self.extra():  # one may have started another when we looked
            assert time.monotonic() < end, extra
            self.wait_gone(extra, end - time.monotonic())

    def close(self):
        for process in reversed(self.children):
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def needed():
    """``need``, for a test that finds out by itself."""
    return need


@pytest.fixture(scope="session")
def prerequisites():
    for program in ("openconnect", "ocserv", "slirp4netns", "nft", "ip", "unshare", "nsenter"):
        need(has(program), program)
    need(Path("/dev/net/tun").exists(), "/dev/net/tun")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "--mount", "true"], capture_output=True, check=False
    )
    need(done.returncode == 0, "user namespaces")
    sources = list(SHIMS.glob("*.c")) or list((Path(__file__).resolve().parents[3] / "vpn" / "preload").glob("*.c"))
    missing = [source.stem for source in sources if not (SHIMS / f"{source.stem}.so").exists()]
    need(not missing, f"compiled shims (in the checkout: python hatch_build.py): {', '.join(missing)}")


@pytest.fixture
def needs():
    """The path of a program that only some tests need."""

    def find(program):
        need(has(program), program)
        return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")

    return find


@pytest.fixture
def site(prerequisites, tmp_path):
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.close()


@pytest.fixture
def gateway(site):
    """A site whose login node runs the default gateway."""
    site.start_gateway()
    return site


@pytest.fixture(scope="module")
def shared_gateway(prerequisites, tmp_path_factory):
    """The same, one for all tests of a module: for those that leave it as it was."""
    site = Site(tmp_path_factory.mktemp("shared"))
    try:
        site.start_gateway()
        yield site
    finally:
        site.close()


@pytest.fixture
def credential(gateway):
    """Makes credential files a node can use."""

    def make(name="credential.json"):
        return gateway.credential(name)

    return make
