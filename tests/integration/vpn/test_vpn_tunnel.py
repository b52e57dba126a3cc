"""openconnect through a rootless gateway, between hosts that are namespaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

WAN = "203.0.113.1"


def run(site, credential, *argv, options=(), **more):
    return site.vpn("node", "run", "--credential", credential, *options, "--", *argv, **more)


def test_reaches_outside_by_tls_with_large_packets(gateway, credential):
    assert gateway.vpn("node", "run", "--mode", "none", "--require", f"http://{WAN}/", "--", "true").returncode == 5
    options = ("-v", "--require", "http://web.example.org/", "--require", "dns:web.example.org")
    done = run(gateway, credential(), "cat", "/etc/resolv.conf", options=options)
    assert done.returncode == 0, done.stderr
    assert ": TLS (" in done.stderr
    assert "MTU 15972" in done.stderr
    assert "web.example.org/: 200" in done.stderr
    assert "nameserver 198.19.0.3" in done.stdout


def test_reaches_outside_by_dtls(gateway, credential):
    done = run(gateway, credential(), "true", options=("-v", "--dtls", "--require", f"http://{WAN}/"))
    assert done.returncode == 0, done.stderr
    assert ": DTLS (" in done.stderr


def test_falls_back_to_tls_when_udp_is_blocked(gateway, credential):
    rules = "table ip f { chain c { type filter hook output priority 0; udp dport != 53 drop; }; }"
    gateway.check("node", "nft", "-f", "-", input=rules)
    done = run(gateway, credential(), "true", options=("-v", "--dtls", "--require", f"http://{WAN}/"))
    assert done.returncode == 0, done.stderr
    assert ": TLS (" in done.stderr


def test_everything_through_slirp4netns(site):
    assert site.vpn("login", "gateway", "start", "--uplink", "slirp4netns").returncode == 0
    file = str(site.directory / "credential")
    assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
    done = run(site, file, "true", options=("-v", "--dtls", "--require", f"http://{WAN}/"))
    assert done.returncode == 0, done.stderr
    assert ": DTLS (" in done.stderr


def test_by_ipv6(site, needed):
    """Both kinds of encrypted packets, TLS and DTLS, between IPv6 addresses."""
    try:
        for host, device, address in (("login", "to-node", "2001:db8::1"), ("node", "eth0", "2001:db8::11")):
            site.check(host, "ip", "addr", "add", f"{address}/64", "dev", device, "nodad")
    except AssertionError as error:
        needed("IPv6" not in str(error) and "not supported" not in str(error), "IPv6")
        raise
    addresses = json.loads(site.vpn("login", "gateway", "start", "--json").stdout)["addresses"]
    assert addresses == ["192.0.2.1", "203.0.113.2", "2001:db8::1"]
    for options, kind in ((("--dtls",), "DTLS"), ((), "TLS")):
        file = str(site.directory / kind)
        assert site.vpn("login", "gateway", "credential", "--output", file).returncode == 0
        file = edited(site, file, addresses=["2001:db8::1"])
        done = run(site, file, "true", options=("-v", *options, "--require", f"http://{WAN}/"))
        assert done.returncode == 0, done.stderr
        assert f": {kind} (" in done.stderr
        assert "to 2001:db8::1" in done.stderr


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_passes_the_status_on(gateway, credential, script, status):
    assert run(gateway, credential(), "sh", "-c", script).returncode == status


def test_command_not_found(gateway, credential):
    done = run(gateway, credential(), "/no/such/program")
    assert done.returncode == 127
    assert "/no/such/program" in done.stderr


def test_stdin_stdout_stderr_are_the_callers(gateway, credential):
    done = run(gateway, credential(), "sh", "-c", "cat; echo err >&2", input="in\n")
    assert (done.stdout, done.stderr) == ("in\n", "err\n")


def test_signal_goes_to_the_command(gateway, credential):
    script = "trap 'echo got; exit 3' TERM; echo up; while :; do sleep 1000 & wait; done"
    process = gateway.start_vpn(
        "node", "run", "--credential", credential(), "--", "sh", "-c", script, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"up\n"
        os.kill(gateway.find_vpn("run"), signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(90) == 3


def test_credential_is_good_for_one_login(gateway, credential):
    file = credential()
    assert run(gateway, file, "true").returncode == 0
    again = run(gateway, file, "true")
    assert again.returncode == 5
    assert "get a fresh one" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    assert run(gateway, credential("other"), "true").returncode == 0


def edited(gateway, file, **changes):
    path = gateway.directory / "edited"
    path.write_text(json.dumps({**json.loads(Path(file).read_text()), **changes}))
    path.chmod(0o600)
    return str(path)


def test_wrong_password(gateway, credential):
    done = run(gateway, edited(gateway, credential(), password="wrong"), "true")
    assert done.returncode == 5
    assert "refused the user or password" in done.stderr
    assert "wrong" not in done.stderr
    assert run(gateway, credential("other"), "true").returncode == 0


def test_wrong_pin(gateway, credential):
    done = run(gateway, edited(gateway, credential(), pin="pin-sha256:" + "A" * 43 + "="), "true")
    assert done.returncode == 5
    assert "is not the pinned one" in done.stderr


def test_password_is_nowhere_to_be_read(gateway, credential):
    file = credential()
    password = json.loads(Path(file).read_text())["password"].encode()
    process = gateway.start_vpn(
        "node",
        "run",
        "--credential",
        file,
        "--",
        "sh",
        "-c",
        "echo up; exec cat",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout.readline() == b"up\n"
        for pid in gateway.extra():
            for what in ("cmdline", "environ"):
                assert password not in Path(f"/proc/{pid}/{what}").read_bytes()
    log = gateway.directory / "home" / "hpcq-gateway" / "default" / "log"
    assert password not in log.read_bytes()


def test_gateway_down(gateway, credential):
    file = credential()
    assert gateway.vpn("login", "gateway", "stop").returncode == 0
    done = run(gateway, file, "true")
    assert done.returncode == 5
    assert "no address of the gateway answers" in done.stderr
    gateway.wait_empty()


def test_any_server_with_password_on_stdin(gateway, credential):
    wire = json.loads(Path(credential()).read_text())
    server = [
        "--server",
        f"192.0.2.1:{wire['port']}",
        "--servercert",
        wire["pin"],
        "--user",
        wire["username"],
    ]
    done = gateway.vpn("node", "run", *server, "--", "cat", input=wire["password"] + "\nrest\n")
    assert (done.returncode, done.stdout) == (0, "rest\n"), done.stderr


def test_two_sessions_on_one_node(gateway, credential):
    files = [credential("a"), credential("b")]
    done = {}

    def one(file):
        done[file] = run(gateway, file, "sh", "-c", "ip -4 -o addr show tun0", options=("--require", f"http://{WAN}/"))

    threads = [threading.Thread(target=one, args=(file,)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done[file].returncode for file in files] == [0, 0]
    assert done[files[0]].stdout != done[files[1]].stdout


def test_required_target_that_does_not_answer(gateway, credential):
    done = run(gateway, credential(), "echo", "ran", options=("--require", f"root://{WAN}:1"))
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("Error: xrootd: ")
    assert run(gateway, credential("b"), "true", options=("--require", "dns:no.example.com")).stderr.startswith(
        "Error: dns: "
    )
