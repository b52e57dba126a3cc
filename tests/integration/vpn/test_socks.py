"""Mode socks: real programs, and every way a program can connect, through a real SOCKS5 server on the login node."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHIMS

LOGIN, NODE, WAN = "192.0.2.1", "192.0.2.11", "203.0.113.1"
TELLER = Path(__file__).with_name("told_socks.py")


@pytest.fixture
def microsocks(site, needs):
    """A SOCKS5 server on the login node."""
    needs("microsocks")
    with site.start("login", "microsocks", "-i", LOGIN, "-p", "1080", stderr=subprocess.DEVNULL) as process:
        answered(site, f"{LOGIN}:1080")
        yield f"{LOGIN}:1080"
        for pid in site.find("microsocks"):
            os.kill(pid, signal.SIGKILL)
        process.wait(90)


@pytest.fixture
def echo(site):
    """A server outside that takes a length (8 bytes), that many bytes, and answers with their digest, for ever."""
    server = """
import hashlib, socket, threading
def serve(c):
    with c, c.makefile("rwb") as f:
        while head := f.read(8):
            digest, left = hashlib.sha256(), int.from_bytes(head, "big")
            while left:
                data = f.read(min(left, 1 << 18)); digest.update(data); left -= len(data)
            f.write(digest.digest()); f.flush()
with socket.create_server(("203.0.113.1", 8124), backlog=1024) as s:
    print("up", flush=True)
    while True:
        threading.Thread(target=serve, args=(s.accept()[0],)).start()
"""
    with site.start("wan", sys.executable, "-W", "ignore", "-c", server, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        yield
        for pid in site.find("8124"):
            os.kill(pid, signal.SIGKILL)


def answered(site, server):
    """Wait until it accepts connections: connecting is the only event there is."""
    script = """
import socket, sys, time
end = time.monotonic() + 90
while socket.socket().connect_ex((sys.argv[1], int(sys.argv[2]))):
    assert time.monotonic() < end
"""
    site.check("node", sys.executable, "-c", script, *server.split(":"))


def run(site, server, *argv, options=(), **more):
    return site.vpn("node", "run", "--mode", "socks", "--socks", server, *options, "--", *argv, **more)


def script(site, server, text, *arguments, options=(), **more):
    """Run a Python program in the session; it prints ok."""
    done = run(site, server, sys.executable, "-W", "ignore", "-c", PRELUDE + text, *arguments, options=options, **more)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stdout + done.stderr
    return done


PRELUDE = """
import errno, hashlib, os, select, signal, socket, struct, subprocess, sys, threading, time
WEB = ("203.0.113.1", 80)
def get(s):
    s.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
    data = b""
    while part := s.recv(65536):
        data += part
    assert data.endswith(b"hello\\n"), data
ECHO = ("203.0.113.1", 8124)
def ask(s, data=b"?" * 1000):
    s.sendall(len(data).to_bytes(8, "big") + data)
    assert s.recv(32, socket.MSG_WAITALL) == hashlib.sha256(data).digest()
def refused(call, *codes):
    try:
        call()
    except OSError as error:
        assert error.errno in codes, error
    else:
        raise AssertionError("it was not refused")
def order(text):
    print(text, flush=True)
    assert sys.stdin.readline() == "done\\n"
"""


def test_nothing_is_reached_without_it(site):
    done = site.run("node", "curl", "-sS", "--max-time", "60", f"http://{WAN}/")
    assert done.returncode == 7, done.stderr


def test_curl_by_name_and_address(site, microsocks):
    for url in ("http://web.example.org/", f"http://{WAN}/"):
        done = run(site, microsocks, "curl", "-sS", url)
        assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr
    done = run(site, microsocks, "curl", "-sS", f"http://{WAN}:81/")
    assert done.returncode == 7
    assert "Connection refused" in done.stderr or "Couldn't connect" in done.stderr
    site.wait_gone(site.find("vpn.shim.forwarder"))


def test_required_targets_are_asked_through_it(site, microsocks):
    require = ("-v", "--require", "http://web.example.org/", "--require", f"http://{WAN}/")
    done = run(site, microsocks, "true", options=require)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": 200") == 2


def test_ways_to_connect(site, microsocks):
    script(
        site,
        microsocks,
        """
with socket.create_connection(WEB, 90) as s:
    assert s.getpeername() == WEB, s.getpeername()
    get(s)
with socket.create_connection(WEB) as s:  # blocking from the first
    get(s)
s = socket.socket(); s.setblocking(False)
assert s.connect_ex(WEB) == errno.EINPROGRESS
poll = select.poll(); poll.register(s, select.POLLOUT); assert poll.poll(90000)
assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
assert s.connect_ex(WEB) in (0, errno.EISCONN) and s.connect_ex(WEB) == errno.EISCONN
s.setblocking(True); get(s)
s = socket.socket(); s.setblocking(False)
epoll = select.epoll(); epoll.register(s, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET); epoll.poll(0)
copy = os.dup(s.fileno())
assert s.connect_ex(WEB) == errno.EINPROGRESS
while not any(mask & select.EPOLLOUT for _, mask in epoll.poll(90)): pass
other = socket.socket(fileno=copy); assert other.getpeername() == WEB
other.setblocking(True); get(other)
s = socket.socket()
assert s.sendto(b"GET / HTTP/1.0\\r\\n\\r\\n", socket.MSG_FASTOPEN, WEB) == 18
assert s.recv(9) == b"HTTP/1.0 "
s = socket.socket()
s.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
s.connect(WEB); get(s)
s = socket.socket(); s.sendmsg([b"GET / ", b"HTTP/1.0\\r\\n\\r\\n"], [], socket.MSG_FASTOPEN, WEB)
assert s.recv(9) == b"HTTP/1.0 "
s = socket.socket(); s.bind(("", 0)); s.connect(WEB); get(s)
s = socket.socket(socket.AF_INET6); s.connect(("::ffff:203.0.113.1", 80))
assert s.getpeername()[:2] == ("::ffff:203.0.113.1", 80), s.getpeername(); get(s)
refused(lambda: socket.socket(socket.AF_INET6).sendmsg([b""], [], 0, ("2001:db8::1", 80)), errno.EPIPE, errno.ENOTCONN)
print("ok")
""",
    )


def test_refusals_have_their_errno(site, microsocks):
    script(
        site,
        microsocks,
        """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
CLOSED = ("203.0.113.1", 81)
for _ in range(200):
    refused(lambda: socket.socket().connect(CLOSED), errno.ECONNREFUSED)
s = socket.socket()
refused(lambda: s.connect(CLOSED), errno.ECONNREFUSED)
s.connect(WEB); get(s)  # the same socket
for _ in range(200):
    s = socket.socket(); s.setblocking(False); assert s.connect_ex(CLOSED) == errno.EINPROGRESS
    assert select.select([], [s], [], 90)[1]
    assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
for _ in range(50):
    s = socket.socket(); s.setblocking(False); assert s.connect_ex(CLOSED) == errno.EINPROGRESS
    select.select([], [s], [], 90)
    assert s.connect_ex(CLOSED) == errno.ECONNREFUSED
u = socket.socket(type=socket.SOCK_DGRAM)
far = ("203.0.113.1", 53)
for call in (lambda: u.connect(far), lambda: u.sendto(b"", far), lambda: u.sendmsg([b""], [], 0, far)):
    refused(call, errno.ENETUNREACH)
refused(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(("2001:db8::1", 53)), errno.ENETUNREACH)
print("ok")
""",
    )


def test_what_is_near_is_left_alone(site, microsocks):
    script(
        site,
        microsocks,
        """
for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, NODE)):
    with socket.create_server((address, 0), family=family) as server:
        with socket.create_connection(server.getsockname()[:2], 90) as s:
            assert s.getpeername() == server.getsockname()
            assert server.accept()[1] == s.getsockname()
    with socket.socket(family, socket.SOCK_DGRAM) as a, socket.socket(family, socket.SOCK_DGRAM) as b:
        a.bind((address, 0)); b.sendto(b"x", a.getsockname()); b.connect(a.getsockname()); b.send(b"y")
        assert a.recv(9) + a.recv(9) == b"xy"
a, b = socket.socketpair(); a.sendall(b"x"); assert b.recv(1) == b"x"
assert socket.getaddrinfo("localhost", 1)[0][4][0] in ("::1", "127.0.0.1")
assert socket.getaddrinfo("198.51.100.7", 1)[0][4][0] == "198.51.100.7"
print("ok")
""".replace("NODE", repr(NODE)),
    )


def test_direct_networks_are_reached_from_the_node(site, microsocks):
    listener = (
        "import socket; s = socket.create_server(('192.0.2.1', 8123)); print('up', flush=True); print(s.accept()[1][0])"
    )
    for options, peer in (((), LOGIN), (("--direct", "198.51.100.0/24,192.0.2.0/24"), NODE)):
        with site.start("login", sys.executable, "-c", listener, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "up\n"
            text = "socket.create_connection(('192.0.2.1', 8123), 90); print('ok')"
            script(site, microsocks, text, options=options)
            assert server.stdout.readline() == f"{peer}\n"


def test_names(site, microsocks):
    script(
        site,
        microsocks,
        """
import ctypes
pool = __import__("ipaddress").ip_network("198.18.0.0/15")
flags = socket.AI_CANONNAME | socket.AI_ADDRCONFIG
(info,) = socket.getaddrinfo("web.example.org", 80, type=socket.SOCK_STREAM, flags=flags)
assert info[3] == "web.example.org" and info[4][1] == 80
address = info[4][0]
assert __import__("ipaddress").ip_address(address) in pool
six = socket.getaddrinfo("web.example.org", 80, socket.AF_INET6, socket.SOCK_STREAM)[0]
assert six[4][:2] == (f"::ffff:{address}", 80)
s = socket.socket(socket.AF_INET6); s.connect(six[4]); get(s)
assert socket.gethostbyname("WEB.example.org.") == address
assert socket.gethostbyname_ex("web.example.org") == ("web.example.org", [], [address])
assert socket.gethostbyaddr(address) == ("web.example.org", [], [address])
assert socket.gethostbyaddr(f"::ffff:{address}")[0] == "web.example.org"
assert socket.getnameinfo((address, 80), 0) == ("web.example.org", "http")
assert socket.getnameinfo(("203.0.113.9", 80), 0) == ("203.0.113.9", "http")
refused(lambda: socket.gethostbyaddr("203.0.113.9"), 1)
for wrong in ("no such name", "-x", "a..b", "x" * 64 + ".org", "x" * 300):
    try: socket.getaddrinfo(wrong, 80)
    except (socket.gaierror, UnicodeError): pass
    else: raise AssertionError(wrong)
libc = ctypes.CDLL(None)
libc.gethostbyname.restype = ctypes.POINTER(ctypes.c_char_p)
assert libc.gethostbyname(b"web.example.org")[0] == b"web.example.org"
with socket.create_connection(("web.example.org", 80), 90) as s:
    assert s.getpeername() == (address, 80); get(s)
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, " ".join(map(socket.gethostbyname, ("web.example.org", "b.example.org"))).encode())
    os._exit(0)
os.wait()
assert os.read(read, 99).decode().split() == [address, socket.gethostbyname("b.example.org")]
found = set()
threads = [threading.Thread(target=lambda: found.add(socket.gethostbyname("c.example.org"))) for _ in range(50)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 1
refused(lambda: socket.create_connection(("none.example.org", 80), 90), errno.EHOSTUNREACH)
print("ok")
""",
    )


def test_many_threads_and_processes_at_once(site, microsocks, echo):
    script(
        site,
        microsocks,
        """
problems = []
def work(count):
    try:
        for _ in range(count):
            with socket.create_connection(ECHO, 90) as s:
                assert s.getpeername() == ECHO
                ask(s)
    except Exception as error:
        problems.append(error)
def crowd(size, count):
    threads = [threading.Thread(target=work, args=(count,)) for _ in range(size)]
    [t.start() for t in threads]; [t.join() for t in threads]
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        crowd(25, 3)
        os._exit(1 if problems else 0)
    children.append(pid)
crowd(50, 4)
assert not problems, problems[:3]
assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
socks = [socket.create_connection(ECHO, 90) for _ in range(200)]
if os.fork() == 0:
    for s in socks[:20]: ask(s)
    os._exit(0)
for s in socks[20:]: ask(s)
assert os.wait()[1] == 0
print("ok")
""",
    )


def test_a_large_transfer(site, microsocks, echo):
    script(
        site, microsocks, "s = socket.create_connection(ECHO, 90); ask(s, os.urandom(200 << 20)); ask(s); print('ok')"
    )


# --- a server that answers when it is told to ---


def talk(site, text, *answers):
    """Run a program whose every line is an order for the server; the requests the server saw."""
    teller = site.start(
        "login", sys.executable, str(TELLER), LOGIN, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with teller:
        server = f"{LOGIN}:{teller.stdout.readline().strip()}"
        program = [sys.executable, "-W", "ignore", "-c", PRELUDE + text]
        process = site.start_vpn(
            "node", "run", "--mode", "socks", "--socks", server, "--", *program,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        seen, lines = [], []
        with process:
            for line in process.stdout:
                lines.append(line.strip())
                if line.startswith("seen"):
                    seen.append(teller.stdout.readline().strip())
                elif line.strip() != "ok":
                    teller.stdin.write(line)
                    teller.stdin.flush()
                process.stdin.write("done\n")
                process.stdin.flush()
            assert process.wait(90) == 0, lines
        assert lines[-1:] == ["ok"]
        for pid in site.find("told_socks"):
            os.kill(pid, signal.SIGKILL)
    return seen


def test_a_connect_is_under_way_until_the_tunnel_is_through(site):
    seen = talk(
        site,
        """
s = socket.socket(); s.setblocking(False)
epoll = select.epoll(); epoll.register(s, select.EPOLLOUT | select.EPOLLET)
epoll.poll(0)
assert s.connect_ex(("198.51.100.1", 1)) == errno.EINPROGRESS
order("seen")
assert s.connect_ex(("198.51.100.1", 1)) == errno.EALREADY
assert select.select([s], [s], [], 0) == ([], [], [])
assert epoll.poll(0.1) == []
refused(s.getpeername, errno.ENOTCONN)
refused(lambda: s.send(b"x"), errno.EAGAIN, errno.ENOTCONN, errno.EPIPE)
order("through")
assert epoll.poll(90) == [(s.fileno(), select.EPOLLOUT)]
assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
s.setblocking(True); s.sendall(b"echo"); assert s.recv(9) == b"echo"
s.shutdown(socket.SHUT_WR); assert s.recv(9) == b""
print("ok")
""",
    )
    assert seen == ["198.51.100.1 1"]


def test_every_reply_has_its_errno_and_waits_for_it(site):
    talk(
        site,
        """
for reply, code in ((2, errno.EACCES), (3, errno.ENETUNREACH), (4, errno.EHOSTUNREACH), (5, errno.ECONNREFUSED),
                    (6, errno.ETIMEDOUT), (1, errno.EHOSTUNREACH)):
    for way in ("blocking", "not"):
        s = socket.socket()
        if way == "blocking":
            caught = []
            thread = threading.Thread(target=lambda: caught.append(s.connect_ex(("198.51.100.1", 7))))
            thread.start(); order("seen"); assert thread.is_alive(); order(f"reply {reply}"); thread.join(90)
            assert caught == [code], (reply, caught)
        else:
            s.setblocking(False)
            assert s.connect_ex(("198.51.100.1", 7)) == errno.EINPROGRESS
            order("seen"); order(f"reply {reply}")
            assert select.select([], [s], [], 90)[1]
            assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == code
print("ok")
""",
    )


def test_time_limits_signals_and_programs_that_give_up(site):
    seen = talk(
        site,
        """
FAR = ("198.51.100.1", 7)
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200_000))
assert s.connect_ex(FAR) == errno.EINPROGRESS  # as connect(2) says of SO_SNDTIMEO
order("seen"); s.close(); order("through")
s = socket.socket(); s.settimeout(0.2)
try: s.connect(FAR)
except TimeoutError: pass
else: raise AssertionError
order("seen"); s.close(); order("reply 5")

import ctypes  # Python itself goes on after a signal
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None); signal.siginterrupt(signal.SIGALRM, True)
signal.setitimer(signal.ITIMER_REAL, 2)
s = socket.socket()
address = struct.pack("=H", socket.AF_INET) + struct.pack(">H", 7) + socket.inet_aton(FAR[0]) + bytes(8)
assert libc.connect(s.fileno(), address, 16) == -1 and ctypes.get_errno() == errno.EINTR, ctypes.get_errno()
order("seen"); order("through")
assert select.select([], [s], [], 90)[1] and s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
s.sendall(b"echo"); assert s.recv(9) == b"echo"

# Somebody listens at the port of a program that gave up: he must not get its connection.
s = socket.socket(); s.setblocking(False); s.connect_ex(FAR); port = s.getsockname()[1]
order("seen"); s.close()
with socket.create_server(("127.0.0.1", port)) as server:
    server.settimeout(0.5)
    order("through")
    try: server.accept()
    except TimeoutError: pass
    else: raise AssertionError("a stranger got it")
print("ok")
""",
    )
    assert len(seen) == 4


def test_ipv6_destinations_and_names_reach_the_server(site):
    seen = talk(
        site,
        """
s = socket.socket(socket.AF_INET6); s.setblocking(False)
assert s.connect_ex(("2001:db8::7", 77)) == errno.EINPROGRESS
order("seen"); order("through")
assert select.select([], [s], [], 90)[1]
assert s.getpeername()[:2] == ("2001:db8::7", 77), s.getpeername()
s = socket.socket(); s.setblocking(False)
assert s.connect_ex((socket.gethostbyname("Some.Where.example"), 78)) == errno.EINPROGRESS
order("seen"); order("through")
assert select.select([], [s], [], 90)[1]
print("ok")
""",
    )
    assert seen == ["2001:db8::7 77", "some.where.example 78"]


# --- programs ---


@pytest.fixture
def xrootd(site, needs):
    """An XRootD server outside with one file; its bytes."""
    program = needs("xrootd")
    here = site.directory / "xrootd"
    (here / "data").mkdir(parents=True)
    data = os.urandom(20_000_000)
    (here / "data" / "file").write_bytes(data)
    (here / "cfg").write_text(
        f"xrd.port 1094\nall.export /\noss.localroot {here}/data\nall.adminpath {here}\nall.pidpath {here}\n"
    )
    ids = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    with site.start("wan", *ids, program, "-c", f"{here}/cfg", "-l", f"{here}/log") as server:
        tail = ["tail", "-n", "+1", "-F", str(here / "log")]
        with subprocess.Popen(tail, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as log:
            assert any("initialization completed" in line for line in log.stdout)
            log.kill()
        yield data
        for pid in site.find("xrootd -c"):
            os.kill(pid, signal.SIGKILL)
        server.wait(90)


def test_xrdcp(site, microsocks, xrootd, needs):
    needs("xrdcp")
    for host in (WAN, "web.example.org"):
        copy = site.directory / f"copy-{host}"
        done = run(site, microsocks, "xrdcp", "--silent", f"root://{host}//file", str(copy))
        assert done.returncode == 0, done.stderr
        assert copy.read_bytes() == xrootd


def test_python_clients(site, microsocks, xrootd):
    for module in ("XRootD", "requests", "uproot", "fsspec_xrootd"):
        pytest.importorskip(module)
    script(
        site,
        microsocks,
        """
import asyncio, hashlib, requests, fsspec
from XRootD import client
assert requests.get("http://web.example.org/", timeout=90).text == "hello\\n"
file = client.File()
status, _ = file.open("root://web.example.org//file", timeout=90)
assert status.ok, status
status, data = file.read(timeout=90)
assert status.ok and hashlib.sha256(data).hexdigest() == sys.argv[1], status
file.close()
with fsspec.open("root://203.0.113.1//file") as f:  # as uproot reads
    assert f.read(1000) == data[:1000]
async def get():
    reader, writer = await asyncio.open_connection("web.example.org", 80)
    writer.write(b"GET / HTTP/1.0\\r\\n\\r\\n")
    assert (await reader.read()).endswith(b"hello\\n")
    try: await asyncio.open_connection("203.0.113.1", 81)
    except ConnectionRefusedError: return
    raise AssertionError
asyncio.run(get())
print("ok", flush=True)
os._exit(0)
""",
        hashlib.sha256(xrootd).hexdigest(),
    )


def test_the_environment_is_kept_across_exec(site, microsocks):
    fetch = f"import urllib.request as u; print(u.urlopen('http://{WAN}/', timeout=90).read().decode().strip())"
    script(
        site,
        microsocks,
        f"""
fetch = {fetch!r}
argv = [sys.executable, "-c", fetch]
for run in (
    lambda: subprocess.run(argv, env={{}}, check=True),
    lambda: subprocess.run(["env", "-i", *argv], check=True),
    lambda: subprocess.run(argv, env={{}}, check=True, preexec_fn=lambda: None),
    lambda: os.waitpid(os.posix_spawn(sys.executable, argv, {{}}), 0),
    lambda: os.waitpid(os.posix_spawnp("env", ["env", "-i", *argv], {{}}), 0),
    lambda: subprocess.run(argv, env={{"LD_PRELOAD": "/no/such.so"}}, check=True, stderr=subprocess.DEVNULL),
    lambda: (os.unsetenv("LD_PRELOAD"), os.unsetenv("VPN_SHIM"), os.system(f"env -i {{argv[0]}} -c \\"{{fetch}}\\"")),
):
    run()
if os.fork() == 0:
    os.execle(sys.executable, *argv, {{}})
assert os.wait()[1] == 0
if os.fork() == 0:
    os.execve(os.open(sys.executable, os.O_RDONLY), argv, {{}})
assert os.wait()[1] == 0
print("ok")
""",
    ).stdout.splitlines().count("hello") == 9 or pytest.fail("a program went without")


def test_programs_that_would_go_round_it_are_refused(site, microsocks, needs, tmp_path):
    busybox = needs("busybox")
    done = run(site, microsocks, "busybox", "true")
    assert done.returncode == 126
    assert "statically linked" in done.stderr
    foreign = tmp_path / "foreign"
    data = bytearray(Path("/bin/true").read_bytes())
    data[18] ^= 0xFF
    foreign.write_bytes(data)
    foreign.chmod(0o755)
    (tmp_path / "script").write_text(f"#! {busybox} sh\n")
    (tmp_path / "script").chmod(0o755)
    for path, reason in ((foreign, "another kind of machine"), (tmp_path / "script", "statically linked")):
        done = run(site, microsocks, str(path))
        assert (done.returncode, reason in done.stderr) == (126, True), done.stderr
    text = """
def status(call):
    try: return call()
    except OSError as error: return error.errno
out = []
for path in ("busybox", *sys.argv[1:]):
    full = path if "/" in path else "/bin/busybox"
    for call in (
        lambda: subprocess.run([path, "true"]).returncode,
        lambda: subprocess.run([path, "true"], preexec_fn=lambda: None).returncode,
        lambda: os.posix_spawn(full, [path], {}),
        lambda: os.posix_spawnp(path, [path], {}),
    ):
        assert status(call) == errno.EACCES
    assert os.waitstatus_to_exitcode(os.system(f"{path} true")) == 126
print("ok")
"""
    done = script(site, microsocks, text, str(foreign), str(tmp_path / "script"))
    assert done.stderr.count("would go round the tunnel") >= 15


def test_setuid_and_capable_programs_are_refused(site, microsocks, tmp_path):
    """Only root can make such files: in the site's user namespace a program of its second user would be one."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make files of another user")
    other = tmp_path / "other"
    shutil.copy("/bin/true", other)
    os.chown(other, 12345, 12345)
    other.chmod(0o4755)
    done = run(site, microsocks, str(other))
    assert (done.returncode, "setuid" in done.stderr) == (126, True), done.stderr


def test_the_forwarder_killed(site, microsocks):
    """Programs get an error at once, none goes round, and the run ends as lost."""
    process = site.start_vpn(
        "node", "run", "--mode", "socks", "--socks", microsocks, "--", "sh", "-c", "echo up; exec sleep 1000",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "up\n"
        (pid,) = [pid for pid in site.find("vpn.shim.forwarder") if "sh -c" not in site.extra()[pid]]
        os.kill(pid, signal.SIGKILL)
        assert process.wait(90) == 5
        assert "the forwarder of mode socks ended" in process.stderr.read()


def test_a_session_that_is_gone_lets_nothing_out(site, microsocks):
    env = ["env", f"LD_PRELOAD={SHIMS / 'socks.so'}", "VPN_SHIM=vpn-0123456789abcdef"]
    done = site.run("login", *env, "curl", "-sS", "--max-time", "60", f"http://{WAN}/")
    assert done.returncode == 7
    done = site.run("login", *env, "curl", "-sS", "--max-time", "60", "http://web.example.org/")
    assert done.returncode == 6
    assert site.run("login", "curl", "-sS", f"http://{WAN}/").stdout == "hello\n"


def test_no_server_there(site):
    done = run(site, f"{LOGIN}:9", "true")
    assert done.returncode == 5
    assert done.stderr.startswith("Error: gateway: the SOCKS server 192.0.2.1 port 9"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = run(site, f"{WAN}:80", "true")
    assert done.returncode == 5, done.stderr
