"""openconnect at an ocserv that is not ours: run by root, routing packets itself."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import subprocess
import sys

import pytest
from conftest import SHIMS
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vpn.gateway.certificate import make_certificate, pin_of
from vpn.gateway.passwords import file_text, hash_password

WAN, WAN6 = "203.0.113.1", "2001:db8:1::1"
PORT = 4443
PASSWORD = "correct horse"
GET = "import sys, urllib.request; print(len(urllib.request.urlopen(sys.argv[1], timeout=90).read()))"
CONFIGURATION = """\
auth = "plain[passwd={room}/passwd]"
enable-auth = "certificate"
tcp-port = {port}
udp-port = {port}
run-as-user = root
run-as-group = root
socket-file = {room}/ocserv
pid-file = {room}/pid
server-cert = {room}/cert.pem
server-key = {room}/key.pem
ca-cert = {room}/ca.pem
cert-user-oid = 2.5.4.3
isolate-workers = false
sec-mod-scale = 1
max-clients = 16
max-same-clients = 4
rate-limit-ms = 0
try-mtu-discovery = true
auth-timeout = 30
log-level = 2
cookie-timeout = 300
device = vpns
ipv4-network = 198.51.100.0
ipv4-netmask = 255.255.255.0
ping-leases = false
dns = {dns}
dtls-psk = true
cisco-client-compat = true
{more}
"""
NAT = 'table ip any { chain out { type nat hook postrouting priority 100; oifname "to-wan" masquerade; }; }'


class Server:
    """A plain ocserv on the login node."""

    def __init__(self, site, more=""):
        self.site = site
        self.room = site.directory / "ocserv"
        self.room.mkdir()
        key, certificate = make_certificate("any")
        self.pin = pin_of(certificate)
        authority = self._certify()
        config = CONFIGURATION.format(room=self.room, port=PORT, dns=WAN, more=more)
        hashed = hash_password(PASSWORD)
        for name, text in {
            "key.pem": key.decode(), "cert.pem": certificate.decode(), "ca.pem": authority,
            "passwd": file_text([("alice", hashed)]), "ocserv.conf": config,
        }.items():  # fmt: skip
            (self.room / name).write_text(text)
        site.check("login", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        site.check("login", "nft", "-f", "-", input=NAT)
        self.process = subprocess.Popen(
            [*site.enter("login"), "ocserv", "--foreground", "--config", str(self.room / "ocserv.conf")],
            env={**os.environ, "LD_PRELOAD": str(SHIMS / "one_id.so"), "PATH": "/usr/sbin:/usr/bin"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
        )  # fmt: skip
        said = []
        for line in self.process.stdout:
            said.append(line)
            if "initialized ocserv" in line:
                return
        self.close()
        raise AssertionError("".join(said))

    def _certify(self):
        """A client's certificate, bob's; the authority's."""
        issuer = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        now = datetime.datetime.now(datetime.UTC)
        own = ec.generate_private_key(ec.SECP256R1())

        def certificate(subject, public, *, authority):
            return (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(name)
                .public_key(public)
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - datetime.timedelta(days=1))
                .not_valid_after(now + datetime.timedelta(days=1))
                .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
                .sign(issuer, hashes.SHA256())
                .public_bytes(serialization.Encoding.PEM)
                .decode()
            )

        bob = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bob")])
        (self.room / "bob.pem").write_text(certificate(bob, own.public_key(), authority=False))
        (self.room / "bob.key").write_bytes(
            own.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate(name, issuer.public_key(), authority=True)

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def run(self, *options, argv=("true",), **more):
        server = ["--server", f"192.0.2.1:{PORT}", "--servercert", self.pin]
        return self.site.vpn("node", "run", "-v", *server, *options, "--", *argv, **more)


@contextlib.contextmanager
def serving(site, more=""):
    server = Server(site, more)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(site):
    with serving(site) as server:
        yield server


def mtu(done):
    return int(re.search(r"MTU (\d+)", done.stderr)[1])


def get(size=1_000_000):
    return (sys.executable, "-c", GET, f"http://{WAN}/{size}")


def test_by_password_and_dtls(server):
    done = server.run("--user", "alice", "--dtls", argv=get(), input=PASSWORD + "\n")
    assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
    assert ": DTLS (" in done.stderr
    assert 1300 < mtu(done) < 1500


def test_a_server_that_is_near_is_asked_for_tls_and_large_packets(site):
    with serving(site, "mtu = 16000") as server:
        done = server.run("--user", "alice", argv=get(), input=PASSWORD + "\n")
        assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
        assert ": TLS (" in done.stderr
        assert mtu(done) > 15000


def test_ipv6_where_the_server_has_it(site):
    site.check("login", "ip", "addr", "add", "2001:db8:1::2/64", "dev", "to-wan", "nodad")
    site.check("login", "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
    site.check("wan", "ip", "addr", "add", f"{WAN6}/64", "dev", "eth0", "nodad")
    site.check("wan", "ip", "route", "add", "fd00:6::/64", "via", "2001:db8:1::2")
    script = f"""
import socket
with socket.create_server(("{WAN6}", 8080), family=socket.AF_INET6) as s:
    print("up", flush=True)
    connection, peer = s.accept()
    connection.sendall(peer[0].encode())
    connection.close()
"""
    fetch = f"""
import socket
with socket.create_connection(("{WAN6}", 8080), 60) as s:
    print(s.recv(100).decode(), s.getsockname()[0])
"""
    more = "ipv6-network = fd00:6::/64\nipv6-subnet-prefix = 128\nroute = default"
    argv = (sys.executable, "-c", script)
    with serving(site, more) as server, site.start("wan", *argv, stdout=subprocess.PIPE, text=True) as far:
        assert far.stdout.readline() == "up\n"
        done = server.run("--user", "alice", argv=(sys.executable, "-c", fetch), input=PASSWORD + "\n")
        assert done.returncode == 0, done.stderr
        seen, own = done.stdout.split()
        assert seen == own
        assert seen.startswith("fd00:6::")
        assert far.wait(90) == 0


def test_a_wrong_password(server):
    done = server.run("--user", "alice", input="wrong\n")
    assert done.returncode == 5
    assert "refused the user or password" in done.stderr


def test_by_certificate(server):
    room = server.room
    done = server.run("--certificate", str(room / "bob.pem"), "--sslkey", str(room / "bob.key"), argv=get())
    assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
    stranger, certificate = make_certificate("mallory")
    (room / "mallory.pem").write_bytes(stranger + certificate)
    done = server.run("--certificate", str(room / "mallory.pem"))
    assert done.returncode == 5
    assert "refused the client's certificate" in done.stderr


def test_by_cookie(server):
    argv = ["openconnect", "--protocol=anyconnect", "--authenticate", "--non-inter", "--passwd-on-stdin"]
    where = [f"--servercert={server.pin}", "--user=alice", f"https://192.0.2.1:{PORT}/"]
    said = server.site.check("node", *argv, *where, input=PASSWORD + "\n")
    cookie = re.search(r"^COOKIE='(.*)'$", said, re.MULTILINE)[1]
    done = server.run("--cookie-on-stdin", argv=get(), input=cookie + "\n")
    assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
    assert cookie not in done.stderr
    done = server.run("--cookie-on-stdin", input="nonsense\n")
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1


def test_the_mtu_is_the_paths_not_the_links(server):
    """Large packets vanish on the way without a word: only trying shows it."""
    rules = (
        "table ip f { chain c { type filter hook prerouting priority -300; iifname to-node udp length > 1200 drop; }; }"
    )
    server.site.check("login", "nft", "-f", "-", input=rules)
    done = server.run("--user", "alice", "--dtls", argv=get(), input=PASSWORD + "\n")
    assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
    assert ": DTLS (" in done.stderr


def test_where_udp_is_blocked_it_goes_without(server):
    rules = "table ip f { chain c { type filter hook output priority 0; udp dport != 53 drop; }; }"
    server.site.check("node", "nft", "-f", "-", input=rules)
    done = server.run("--user", "alice", "--dtls", argv=get(), input=PASSWORD + "\n")
    assert (done.returncode, done.stdout) == (0, "1000000\n"), done.stderr
    assert ": TLS (" in done.stderr


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--cookie-on-stdin", "--user", "alice"], "--cookie-on-stdin"),
        (["--sslkey", "/dev/null"], "--sslkey"),
        ([], "--user"),
        (["--certificate", "/no/such"], "does not exist"),
    ],
)
def test_logins_that_are_none(site, options, word):
    server = ["--server", "192.0.2.1:1", "--servercert", "pin-sha256:" + "A" * 43 + "="]
    done = site.vpn("node", "run", *server, *options, "--", "true", input="")
    assert done.returncode == 2
    assert word in done.stderr


PILOT = """
import subprocess, sys, hpcq
from contextlib import suppress
from pathlib import Path
own = ["--server", sys.argv[1], "--user", "alice", "--servercert", sys.argv[2], "--direct", "192.0.2.0/24"]
with hpcq.Queue("own") as queue:
    line = ["submit-pilots", "--name", "own", "--vpn", "openconnect", *own]
    subprocess.run([sys.executable, "-m", "hpcq", *line], input=b"correct horse\\n", check=True, stdout=sys.stderr)
    get = f"{sys.executable} -c '{sys.argv[3]}' http://web.example.org/"
    queue.submit(hpcq.Task(f"{get}; ip -4 -o addr show dev tun0; ip route show dev direct0", network="wan"))
    task = queue.wait(240)
    print(task.outcome, task.output, task.std_error, flush=True)
    for file in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
        with suppress(OSError):
            assert b"correct horse" not in file.read_bytes(), file
    print(*(pilot.tunnel_gateway for pilot in queue.pilots()))
"""


def test_pilots_at_a_server_of_the_users_own(server):
    """Which they log in to with a password that is in one file, 0600, and on no command line and in no environment."""
    program = server.site.directory / "program.py"
    program.write_text(PILOT)
    address = f"192.0.2.1:{PORT}"
    with server.site.start(
        "node", sys.executable, str(program), address, server.pin, GET, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as queue:
        told = queue.communicate(timeout=300)
        assert queue.returncode == 0, told[1].decode()
    outcome, *said = told[0].decode().split()
    assert outcome == "success", told
    assert "198.51.100." in " ".join(said)
    assert "192.0.2.0/24" in said
    assert said[-1] == f"server:alice@{address}"
    private = server.site.directory / "home" / "hpcq" / "own"
    holding = [path for path in private.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
    assert [(path.parent.name, path.stat().st_mode & 0o777) for path in holding] == [("servers", 0o600)]
