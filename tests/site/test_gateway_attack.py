"""Strangers on a compute node who try passwords at the gateway: slowed, logged, and no harm to others."""

from __future__ import annotations

import json

from cluster import Cluster

GUESS = """
import concurrent.futures, http.client, ssl, sys, time
host, port = sys.argv[1], int(sys.argv[2])
context = ssl._create_unverified_context()
head = {"User-Agent": "AnyConnect", "X-Aggregate-Auth": "1", "X-Transcend-Version": "1",
        "Content-Type": "application/x-www-form-urlencoded"}
form = '<?xml version="1.0"?><config-auth client="vpn" type="{}"><version who="vpn">v9</version>{}</config-auth>'
answers = [form.format("init", "")] + [form.format("auth-reply", f"<auth><{name}>wrong</{name}></auth>")
                                       for name in ("username", "password", "password", "password")]

def guess(number):
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=60)
    said, cookies = 0, {}
    try:
        for answer in answers:
            connection.request("POST", "/auth" if said else "/", answer, head | cookies)
            reply = connection.getresponse()
            assert b"success" not in reply.read()
            said = reply.status
            if cookie := reply.getheader("Set-Cookie"):
                cookies = {"Cookie": cookie.split(";")[0]}
            if said != 200:
                break
    except (OSError, http.client.HTTPException):
        return 0
    return said

end, told = time.monotonic() + 80, []
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    while 0 not in told and time.monotonic() < end:
        told += pool.map(guess, range(4))
print(told.count(0), len(told) - told.count(0))
"""


def test_wrong_passwords_are_slowed_and_logged_and_do_not_keep_others_out(cluster: Cluster, gateway: None) -> None:
    told = json.loads(cluster.hpcq("vpn", "gateway", "status", "--json").stdout)
    where = [cluster.site.hosts["login"]["address"], str(told["port"])]
    python = cluster.site.description["python"]
    refused, answered = map(
        int, cluster.site.run("cn1", [python, "-c", GUESS, *where], check=True, timeout=200).stdout.split()
    )
    assert refused
    assert answered
    log = cluster.site.run("login", ["sh", "-c", "cat ~/.local/state/hpcq-gateway/default/log"], check=True).stdout
    assert "failed authentication for 'wrong'" in log
    assert "to ban list" in log
    for mode in ("openconnect", "relay"):
        cluster.hpcq("vpn", "gateway", "credential", "--output", "one-login")
        honest = ["hpcq", "vpn", "run", "--mode", mode, "--credential", "one-login", "--", "echo", "through"]
        assert cluster.site.run("cn2", honest, check=True, timeout=120).stdout == "through\n"
