"""The gateway: its life, its credentials, its refusals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WAN = "203.0.113.1"


def state(site, name="default"):
    return site.directory / "home" / "hpcq-gateway" / name


def status(site):
    return json.loads(site.check("login", sys.executable, "-m", "vpn", "gateway", "status", "--json"))


def in_login(site, script):
    return site.run("login", sys.executable, "-c", script)


def test_start_status_stop(site):
    assert site.vpn("login", "gateway", "status").returncode == 5
    first = json.loads(site.vpn("login", "gateway", "start", "--json").stdout)
    again = site.vpn("login", "gateway", "start")
    assert again.returncode == 0
    assert "was running already" in again.stdout
    assert "192.0.2.1" in first["addresses"]
    assert "127.0.0.1" not in first["addresses"]
    assert status(site)["pin"] == first["pin"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in [state(site), *state(site).iterdir()]}
    assert modes.pop("default") == 0o700
    assert set(modes.values()) == {0o600}, modes
    assert site.vpn("login", "gateway", "stop").returncode == 0
    assert not (state(site) / "gateway.json").exists()
    site.wait_empty()
    assert json.loads(site.vpn("login", "gateway", "start", "--json").stdout)["pin"] == first["pin"]


def test_two_gateways_on_one_host(site):
    ports = set()
    for name in ("one", "two"):
        done = site.vpn("login", "gateway", "start", "--name", name, "--json")
        assert done.returncode == 0, done.stderr
        ports.add(json.loads(done.stdout)["port"])
        file = str(site.directory / name)
        site.vpn("login", "gateway", "credential", "--name", name, "--output", file)
        ran = site.vpn("node", "run", "--credential", file, "--require", f"http://{WAN}/", "--", "true")
        assert ran.returncode == 0, ran.stderr
    assert len(ports) == 2


def test_a_taken_port_is_named(gateway):
    port = status(gateway)["port"]
    done = gateway.vpn("login", "gateway", "start", "--name", "other", "--port", str(port))
    assert done.returncode == 5
    assert f"port {port}" in done.stderr
    assert "--port" in done.stderr
    assert not gateway.find('"name":"other"')


def test_foreground(site):
    with site.start_vpn(
        "login",
        "gateway",
        "start",
        "--foreground",
        "--json",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout.readline() == b"{\n"
        os.kill(site.find_vpn("gateway start"), signal.SIGTERM)
        assert process.wait(90) == 0
    site.wait_empty()


def test_a_long_state_path(site):
    home = site.directory / "home" / ("x" * 100)
    home.mkdir()
    more = {**site.env(), "XDG_STATE_HOME": str(home)}
    command = [*site.enter("login"), sys.executable, "-m", "vpn", "gateway"]
    for word in ("start", "status", "stop"):
        done = subprocess.run([*command, word], env=more, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_revoking_ends_the_connection_for_good(gateway, credential):
    file = credential()
    username = json.loads(Path(file).read_text())["username"]
    with gateway.start_vpn(
        "node",
        "run",
        "--credential",
        file,
        "--",
        "sh",
        "-c",
        "echo up; exec sleep 1000",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"up\n"
        script = f"from vpn import GatewayClient; GatewayClient().revoke({username!r})"
        done = in_login(gateway, script)
        assert done.returncode == 0, done.stderr
        assert process.wait(90) == 5
        error = process.stderr.read().decode()
        assert "gateway" in error
    assert username not in [pilot["username"] for pilot in status(gateway)["pilots"]]


def test_an_unused_credential_can_be_revoked(gateway, credential):
    file = credential()
    username = json.loads(Path(file).read_text())["username"]
    assert in_login(gateway, f"from vpn import GatewayClient; GatewayClient().revoke({username!r})").returncode == 0
    assert gateway.vpn("node", "run", "--credential", file, "--", "true").returncode == 5


@pytest.mark.parametrize("break_it", ["openconnect reconnects", "worker killed"])
def test_reconnects_with_its_cookie(gateway, credential, break_it):
    """And goes on with the address it had, without which openconnect ends the session."""
    script = f"print('up', flush=True); input(); from urllib.request import *; urlopen('http://{WAN}/', timeout=60)"
    with gateway.start_vpn(
        "node",
        "run",
        "-v",
        "--credential",
        credential(),
        "--",
        sys.executable,
        "-c",
        script,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"up\n"
        if break_it == "worker killed":
            for victim in gateway.find("ocserv"):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the one of the login may be ending
                    if "worker" in Path(f"/proc/{victim}/comm").read_text():
                        os.kill(victim, signal.SIGKILL)
        else:
            (victim,) = gateway.find("openconnect --protocol")
            os.kill(victim, signal.SIGUSR2)
        gateway.wait_for_line(state(gateway) / "log", " connect ", count=2)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(90) == 0, process.stderr.read()


def test_garbage_on_the_control_socket_and_the_port_is_survived(gateway):
    report = status(gateway)
    script = (
        "import os, socket, sys\n"
        "os.chdir(sys.argv[1])\n"
        "for kind, data in ((socket.SOCK_SEQPACKET, b'garbage'), (socket.SOCK_SEQPACKET, b'')):\n"
        "    s = socket.socket(socket.AF_UNIX, kind); s.connect('control.sock'); s.send(data); s.close()\n"
        "for data in (b'GET / HTTP/1.0\\r\\n\\r\\n', b'\\x16\\x03\\x01' + bytes(500), b''):\n"
        f"    s = socket.create_connection(('192.0.2.1', {report['port']})); s.sendall(data); s.close()\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        f"s.sendto(bytes(100), ('192.0.2.1', {report['port']}))\n"
    )
    done = gateway.run("login", sys.executable, "-c", script, str(state(gateway)))
    assert done.returncode == 0, done.stderr
    assert status(gateway)["port"] == report["port"]


def test_a_record_of_another_host_is_not_taken_for_ours(site):
    state(site).mkdir(parents=True)
    record = {
        "name": "default",
        "host": "login2.example.org",
        "boot": "x",
        "pid": 1,
        "start_time": 1,
        "addresses": ["127.0.0.1"],
        "port": 1,
        "pin": "pin",
        "control": "c",
    }
    (state(site) / "gateway.json").write_text(json.dumps(record))
    done = site.vpn("node", "run", "--", "true")
    assert done.returncode == 5
    assert "login2.example.org" in done.stderr
    assert site.vpn("login", "gateway", "start").returncode == 0  # it does not answer: replaced
    assert json.loads((state(site) / "gateway.json").read_text())["host"] == socket.gethostname()


def test_clients_cannot_reach_each_other_or_the_gateway_itself(gateway, credential):
    with gateway.start_vpn(
        "node",
        "run",
        "--credential",
        credential("a"),
        "--",
        "sh",
        "-c",
        "ip -4 -o addr show tun0; exec python3 -m http.server 8000",
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        address = process.stdout.readline().split()[3].decode().partition("/")[0]
        done = gateway.vpn(
            "node",
            "run",
            "--credential",
            credential("b"),
            "--",
            "sh",
            "-c",
            f"ping -c 1 -W 1 {address}; echo $?; timeout 2 bash -c '</dev/tcp/198.18.0.1/22'; echo $?",
        )
        assert done.stdout.splitlines()[-2:-1] != ["0"], done.stdout
        assert done.stdout.splitlines()[-1] != "0"
        os.kill(gateway.find_vpn("run"), signal.SIGTERM)
