"""The rule of nat made by each program that can, in a namespace of an ordinary user's, as where netlink is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

INSIDE = """
import json, os, socket, sys
from vpn import holder, netlink, redirect
from vpn.errors import TunnelError
from vpn.relay.plane import original_destination

wanted, six, real, made = sys.argv[1], sys.argv[2] == "6", redirect.commands, netlink.perform

def perform(protocol, messages):
    if protocol == netlink.NETFILTER:
        raise OSError(int(sys.argv[3]), os.strerror(int(sys.argv[3])))
    made(protocol, messages)

def redirected():
    family, own, far = (socket.AF_INET6, "::1", "::1") if six else (socket.AF_INET, "127.0.0.1", "127.0.0.9")
    with socket.create_server((own, 0), family=family) as server, socket.socket(family) as client:
        redirect.redirect("lo", server.getsockname()[1], six=six)
        client.settimeout(60)
        client.connect((far, 7000))
        with server.accept()[0] as accepted:
            return [*original_destination(accepted), os.listdir("/run") != []]

netlink.perform = perform
redirect.commands = lambda *args, **more: [argv for argv in real(*args, **more) if wanted in (argv[0], "all")]
before = os.listdir("/run") != []
holder.enter("user", "own")
pid = os.fork()
if not pid:
    holder.furnish("own")
    try:
        print(json.dumps(redirected()))
    except TunnelError as error:
        print(json.dumps(str(error)))
    sys.stdout.flush()
    os._exit(0)
os.waitpid(pid, 0)
"""


def redirected(program, six=False, code=errno.EOPNOTSUPP, **options):
    """Where a redirected connection said that it was going to, and whether /run is still what it was; or the error."""
    argv = [sys.executable, "-c", INSIDE, program, "6" if six else "4", str(code)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=90, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("prerequisites")
@pytest.mark.parametrize("six", [False, True])
@pytest.mark.parametrize("program", ["nft", "iptables", "iptables-legacy"])
def test_each_program_can_redirect(needs, program, six):
    name = program.replace("ip", "ip6", 1) if six else program
    needs(name)
    assert redirected(name, six) == ["::1" if six else "127.0.0.9", 7000, True]


@pytest.mark.usefixtures("prerequisites")
def test_where_nothing_can_each_says_why(tmp_path):
    complaining = tmp_path / "nft"
    complaining.write_text("#!/bin/sh\necho 'Error: it is refused' >&2; echo more >&2; exit 1\n")
    complaining.chmod(0o755)
    code = errno.EPERM
    text = redirected("nft", code=code, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)})
    assert text.startswith("tunnel: this node's kernel refuses to redirect IPv4 connections (Operation not permitted)")
    assert text.endswith("(nft: Error: it is refused)")
