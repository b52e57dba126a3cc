"""Managers with several addresses, of which not all are theirs from where a pilot is. Loopback has many addresses."""

import asyncio
import contextlib
import socket
import ssl
import threading

import msgspec
import pytest
from running import call, ready, run

from hpcq import connection as conn
from hpcq.client import ask_at
from hpcq.errors import AuthenticationError, QueueNotFoundError
from hpcq.identity import make_identity
from hpcq.reach import reach

NOBODY = "127.0.0.9"


@contextlib.contextmanager
def silent(address, port):
    """Listens and takes no connection: its queue of them is full, so packets are swallowed."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, port), backlog=0))
        for _ in range(2):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield


@contextlib.contextmanager
def stranger(address, port):
    """Answers with a certificate of another queue."""
    identity = make_identity("another")
    tls = conn.manager_tls(identity)
    with socket.create_server((address, port)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with contextlib.suppress(ssl.SSLError, OSError), tls.wrap_socket(sock, server_side=True):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def told(queue, *addresses):
    """The connection file tells these addresses before the right one."""
    info = msgspec.structs.replace(queue.connection, addresses=[*addresses, "127.0.0.1"])
    conn.write(info)
    return info


def test_a_pilot_finds_its_manager_behind_addresses_that_swallow_refuse_or_are_somebody_else_s(queue, start_pilot):
    port = queue.connection.port
    with silent("127.0.0.2", port), stranger("127.0.0.3", port):
        told(queue, "127.0.0.2", NOBODY, "127.0.0.3", "no.such.host.invalid")
        start_pilot(queue, manager_timeout=1.0)
        ready(queue, 1)
        assert run(queue, call(int, "3")).output == 3


def test_when_only_strangers_answer_it_is_said(queue):
    info = msgspec.structs.replace(queue.connection, addresses=[NOBODY, "127.0.0.3"])
    with (
        stranger("127.0.0.3", info.port),
        pytest.raises(AuthenticationError, match=r"127\.0\.0\.3:\d+ is not the manager"),
    ):
        ask_at(info, "status")


def test_when_nobody_answers_each_address_is_named_with_its_reason(queue):
    info = msgspec.structs.replace(queue.connection, addresses=[NOBODY, "127.0.0.8"])
    with pytest.raises(QueueNotFoundError, match=r"127\.0\.0\.9: Connection refused; 127\.0\.0\.8: Connection refused"):
        ask_at(info, "status")


def test_attempts_that_are_not_needed_leave_no_socket_open():
    async def first():
        async with reach(["127.0.0.2", "127.0.0.1", "127.0.0.3"], port, 5.0) as reached:
            async for address, found in reached:
                found.close()
                return address
        pytest.fail("nothing was reached")

    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        assert asyncio.run(first()) == "127.0.0.2"
