"""Traffic for tunnel tests: a server for outside, and what a program inside does with it.

``traffic.py serve [ADDRESS…]`` prints ``ready`` when it listens (TCP and UDP, port 7000). ``traffic.py WHAT HOST …``
does one thing and prints what it saw; it ends with a status other than 0 when that is not what it should be.

A connection's first line says what the server does: ``up`` reads to the end and answers with count and digest,
``down N`` sends N bytes, ``echo`` sends back what comes and ends when the other side has ended, ``reset`` resets.
"""

from __future__ import annotations

import errno
import hashlib
import random
import selectors
import socket
import struct
import sys
import threading

PORT = 7000
BLOCK = 1 << 20
_SEED = random.Random(7).randbytes(BLOCK)


def blocks(count):
    """A stream that no two blocks of are equal, the same for both sides."""
    number = 0
    while count > 0:
        block = (number.to_bytes(8, "big") + _SEED[8:])[:count]
        yield block
        count -= len(block)
        number += 1


def digest_of(count):
    digest = hashlib.sha256()
    for block in blocks(count):
        digest.update(block)
    return digest.hexdigest()


def read_line(sock):
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line.decode().split()


def digest_to_end(sock):
    digest, count, buffer = hashlib.sha256(), 0, bytearray(BLOCK)
    while got := sock.recv_into(buffer):
        digest.update(memoryview(buffer)[:got])
        count += got
    return f"{count} {digest.hexdigest()}"


def serve_one(sock):
    with sock:
        try:
            match read_line(sock):
                case ["up"]:
                    sock.sendall(digest_to_end(sock).encode())
                case ["down", count]:
                    for block in blocks(int(count)):
                        sock.sendall(block)
                case ["echo"]:
                    while data := sock.recv(65536):
                        sock.sendall(data)
                case ["reset"]:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass


def serve_udp(sock):
    while True:
        data, where = sock.recvfrom(65535)
        sock.sendto(data, where)


def serve(addresses):
    listeners = selectors.DefaultSelector()
    for address in addresses or ["0.0.0.0"]:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, PORT))
        listener.listen(1024)
        listeners.register(listener, selectors.EVENT_READ)
        datagrams = socket.socket(family, socket.SOCK_DGRAM)
        datagrams.bind((address, PORT))
        threading.Thread(target=serve_udp, args=(datagrams,), daemon=True).start()
    print("ready", flush=True)
    while True:
        for key, _ in listeners.select():
            threading.Thread(target=serve_one, args=(key.fileobj.accept()[0],), daemon=True).start()


def connect(host):
    return socket.create_connection((host, PORT), timeout=90)


def up(host, count):
    with connect(host) as sock:
        sock.sendall(b"up\n")
        for block in blocks(int(count)):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        said = b""
        while data := sock.recv(4096):
            said += data
        assert said.decode() == f"{count} {digest_of(int(count))}", said


def down(host, count):
    with connect(host) as sock:
        sock.sendall(f"down {count}\n".encode())
        assert digest_to_end(sock) == f"{count} {digest_of(int(count))}"


def half_close(host):
    """Our end first: everything still comes back after it."""
    with connect(host) as sock:
        sock.sendall(b"echo\nabc")
        assert sock.recv(3, socket.MSG_WAITALL) == b"abc"
        sock.sendall(b"def")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100, socket.MSG_WAITALL) == b"def"


def many(host, count):
    """All connected at once, then all used."""
    sockets = [connect(host) for _ in range(int(count))]
    for number, sock in enumerate(sockets):
        sock.sendall(f"echo\n{number:06}".encode())
    for number, sock in enumerate(sockets):
        assert sock.recv(6, socket.MSG_WAITALL) == f"{number:06}".encode()
    for sock in sockets:
        sock.close()


def udp(host, size):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(90)
        for number in range(5):
            data = bytes([number]) * int(size)
            sock.sendto(data, (host, PORT))
            assert sock.recvfrom(65535) == (data, (host, PORT, 0, 0)[: 2 if family == socket.AF_INET else 4])


def errno_of(host, port):
    """The name of what connecting, or the first byte, fails with."""
    try:
        with socket.create_connection((host, int(port)), timeout=90) as sock:
            sock.sendall(b"echo\nx")
            print("answered" if sock.recv(1) else "ended")
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))


def udp_errno(host, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(90)
        sock.connect((host, int(port)))
        try:
            sock.send(b"x")
            sock.recv(10)
            print("answered")
        except OSError as error:
            print(errno.errorcode.get(error.errno, error))


def dns(name):
    print(*sorted({entry[4][0] for entry in socket.getaddrinfo(name, 80)}))


WHAT = {
    "up": up, "down": down, "half-close": half_close, "many": many, "udp": udp, "errno": errno_of,
    "udp-errno": udp_errno, "dns": dns,
}  # fmt: skip

if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        WHAT[sys.argv[1]](*sys.argv[2:])
