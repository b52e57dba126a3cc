"""A SOCKS5 server that answers when it is told to: ``HOST`` is its address; prints its port, then one line a request.

On standard input: ``through`` connects the oldest waiting request, ``reply N`` refuses it with that reply. What it
connects is an echo, its own.
"""

import collections
import socket
import sys
import threading

waiting = collections.deque()
ready = threading.Condition()


def receive(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def serve(sock):
    try:
        _, count = receive(sock, 2)
        receive(sock, count)
        sock.sendall(b"\5\0")
        _, _, _, kind = receive(sock, 4)
    except (EOFError, OSError):
        return
    host = receive(sock, {1: 4, 4: 16}.get(kind) or receive(sock, 1)[0])
    port = int.from_bytes(receive(sock, 2), "big")
    text = host.decode() if kind == 3 else socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, host)
    with ready:
        waiting.append(sock)
        ready.notify()
    print(f"{text} {port}", flush=True)


def answer(word):
    with ready:
        ready.wait_for(lambda: waiting)
        sock = waiting.popleft()
    reply = 0 if word == "through" else int(word.split()[1])
    sock.sendall(bytes([5, reply, 0, 1]) + bytes(6))
    if reply:
        sock.close()
        return
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def orders():
    for line in sys.stdin:
        threading.Thread(target=answer, args=(line.strip(),), daemon=True).start()


with socket.create_server((sys.argv[1], 0), backlog=256) as listener:
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=orders, daemon=True).start()
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
