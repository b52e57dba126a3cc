"""What a site can refuse or lack: each gets one line that names the layer and what to do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vpn
from vpn.surroundings import check_servers

WAN = "203.0.113.1"


def one_line(done, layer):
    assert done.returncode == 5, (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"Error: {layer}: "), done.stderr
    return done.stderr


def test_no_user_namespaces_left(gateway, credential):
    file = credential()
    gateway.check("login", "sh", "-c", "echo 0 > /proc/sys/user/max_user_namespaces")
    assert "user.max_user_namespaces is 0" in one_line(
        gateway.vpn("node", "run", "--credential", file, "--", "true"), "user namespaces"
    )
    report = json.loads(gateway.vpn("node", "probe", "--json").stdout)
    assert "user namespaces" in report["uses"]["gateway"]
    assert "user namespaces" in gateway.vpn("node", "probe").stdout


def test_user_namespaces_forbidden(gateway, credential):
    # In a chroot no user namespace may be made: EPERM (user_namespaces(7)).
    script = (
        "import os, sys; os.chroot(sys.argv[1]); os.chdir('/'); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    root = gateway.directory / "root"
    root.mkdir()
    gateway.check("login", "mount", "--rbind", "/", str(root))
    done = gateway.run(
        "node",
        sys.executable,
        "-c",
        script,
        str(root),
        "-m",
        "vpn",
        "run",
        "--credential",
        credential(),
        "--",
        "true",
    )
    assert "EPERM" in one_line(done, "user namespaces")


def test_no_tun(gateway, credential):
    file = credential()
    gateway.check("login", "mount", "-t", "tmpfs", "none", "/dev/net")
    assert "modprobe tun" in one_line(gateway.vpn("node", "run", "--credential", file, "--", "true"), "tun")
    done = gateway.vpn("login", "gateway", "start", "--name", "other")
    assert done.returncode == 0, done.stderr
    assert "openconnect is not offered: tun: " in done.stdout
    assert "modprobe tun" in done.stdout


def test_program_missing(gateway, credential):
    file = credential()
    hide(gateway, "openconnect")
    text = one_line(gateway.vpn("node", "run", "--credential", file, "--", "true"), "program")
    assert "install openconnect (Debian" in text


@pytest.mark.parametrize(
    ("program", "package", "options"),
    [
        ("ocserv", "ocserv", ()),
        ("slirp4netns", "slirp4netns", ("--uplink", "slirp4netns")),
        ("nft", "nftables", ()),
    ],
)
def test_program_missing_at_the_gateway(site, program, package, options):
    hide(site, program)
    done = site.vpn("login", "gateway", "start", *options)
    assert done.returncode == 0, done.stderr
    assert "openconnect is not offered: program: " in done.stdout
    assert f"install {package} (Debian" in done.stdout
    assert site.vpn("login", "gateway", "stop").returncode == 0
    site.wait_empty()


def hide(site, program):
    """Make a program one that cannot be executed."""
    (site.directory / "nothing").write_text("")
    path = os.path.realpath(shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin"))
    site.check("login", "mount", "--bind", str(site.directory / "nothing"), path)


def test_shim_missing(gateway, credential):
    file = credential()
    installed = Path(vpn.__file__).parent  # which need not be the checkout's
    gateway.check("login", "mount", "-t", "tmpfs", "none", f"{installed}/preload")
    assert "install gcc" in one_line(gateway.vpn("node", "run", "--credential", file, "--", "true"), "shim")


def test_name_servers_that_do_not_answer(gateway, credential):
    file = credential()
    os.kill(gateway.hosts["services"], signal.SIGKILL)
    done = gateway.vpn("node", "run", "--credential", file, "--require", "dns:web.example.org", "--", "true")
    assert "do not answer" in one_line(done, "dns")


def test_nobody_at_the_address(site):
    pin = "pin-sha256:" + "A" * 43 + "="
    done = site.vpn(
        "node",
        "run",
        "--server",
        "192.0.2.77:443",
        "--servercert",
        pin,
        "--user",
        "u",
        "--",
        "true",
        input="p\n",
    )
    assert "192.0.2.77 port 443" in one_line(done, "gateway")


def test_a_server_that_never_answers_runs_into_the_bring_up_time(site):
    pin = "pin-sha256:" + "A" * 43 + "="
    script = "import socket; s = socket.create_server(('192.0.2.1', 4433)); print('up', flush=True); input()"
    with site.start("login", sys.executable, "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"up\n"
        done = site.vpn(
            "node",
            "run",
            "--server",
            "192.0.2.1:4433",
            "--servercert",
            pin,
            "--user",
            "u",
            "--timeout",
            "6",
            "--",
            "true",
            input="p\n",
        )
        assert "took more than 6 s" in one_line(done, "openconnect")
        server.stdin.close()
    site.wait_empty()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--mode", "nonsense", "true"],
        ["run", "--server", "h:1", "true"],
        ["run", "--credential", "/no/such", "true"],
        ["run", "--require", "gopher://x", "true"],
        ["gateway", "start", "--name", "../x"],
        ["gateway", "start", "--listen", "::1", "--uplink", "slirp4netns"],
        ["gateway", "start", "--listen", "nowhere"],
    ],
)
def test_usage_errors_end_with_2(site, arguments):
    done = site.vpn("node", *arguments)
    assert done.returncode == 2, done.stderr


def test_a_credential_others_can_read(site):
    file = site.directory / "open"
    file.write_text("{}")
    file.chmod(0o644)
    done = site.vpn("node", "run", "--credential", str(file), "true")
    assert done.returncode == 2
    assert "chmod 600" in done.stderr


def test_a_program_that_cannot_be_executed(gateway, credential):
    broken = gateway.directory / "bin"
    broken.mkdir()
    for name in ("openconnect", "ocserv"):
        (broken / name).write_bytes(b"\x7fELF of another machine")
        (broken / name).chmod(0o755)
    file = credential()
    path = ["env", f"PATH={broken}:{os.environ['PATH']}", sys.executable, "-m", "vpn"]
    one_line(gateway.run("node", *path, "run", "--credential", file, "--", "true"), "openconnect")
    done = gateway.run("login", *path, "gateway", "start", "--name", "other")
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1


def test_a_gateway_is_asked_by_the_first_address_that_answers():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = asyncio.run(check_servers(["127.0.0.9", "127.0.0.1"], port))
    assert found[0].ok, found
    assert found[0].detail.startswith("127.0.0.1 ")
    assert found[1].detail.endswith(" bytes arrive")
    assert found[2].detail.startswith("Connection refused: nothing takes UDP there")
    found = asyncio.run(check_servers(["127.0.0.9", "127.0.0.1"], port))
    assert [check.ok for check in found] == [False]
    assert found[0].detail.startswith("127.0.0.9 ")


def test_the_mtu_of_the_way_to_a_gateway_is_tried(site):
    """Two routers away, behind a link that takes less than the node's own."""
    site.check("login", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; ip link set to-wan mtu 1300")
    site.check("wan", "ip", "route", "add", "192.0.2.0/24", "via", "203.0.113.2")
    site.check("node", "ip", "route", "add", "default", "via", "192.0.2.1")
    report = json.loads(site.check("node", sys.executable, "-m", "vpn", "probe", "--server", f"{WAN}:80", "--json"))
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["gateway mtu"]["detail"] == "1300 bytes arrive"
    assert checks["cvmfsexec"]["ok"] or "github.com/cvmfs/cvmfsexec" in checks["cvmfsexec"]["detail"]


@pytest.mark.parametrize(
    ("refuse", "layer"),
    [
        ("echo 0 > /proc/sys/user/max_user_namespaces", "user namespaces"),
        ("touch /run/none && mount --bind /run/none /dev/net/tun", "tun"),
    ],
)
def test_a_login_node_that_refuses_openconnects_gateway_what_it_needs(site, refuse, layer):
    """The relay goes on without it, although what was begun for openconnect ends."""
    site.check("login", "sh", "-c", refuse)
    started = site.vpn("login", "gateway", "start")
    assert started.returncode == 0, started.stderr
    assert f"openconnect is not offered: {layer}: " in started.stdout
    file = site.credential("c")
    done = site.vpn("node", "run", "--mode", "socks", "--credential", file, "--", "echo", "up")
    assert (done.returncode, done.stdout) == (0, "up\n"), done.stderr
    assert "openconnect is not offered" in site.vpn("login", "gateway", "status").stdout
    assert "did not answer" not in (site.directory / "home/hpcq-gateway/default/log").read_text()
    assert site.vpn("login", "gateway", "stop").returncode == 0
    site.wait_empty()
