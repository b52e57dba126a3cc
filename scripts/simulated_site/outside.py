"""The servers of host `wan` that are not XRootD: a name server and a web server, in one process.

Run as `python -m simulated_site.outside DIRECTORY [UID GID]`: binds ports 53 and 80, then gives up root.
"""

from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from typing import Any

from dnslib import AAAA, PTR, QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import DNSLogger, DNSServer

from simulated_site import plan

TTL = 5


class Zone:
    """Answers for `plan.ZONE` and its addresses, and says NXDOMAIN to everything else at once."""

    def resolve(self, request: DNSRecord, _handler: Any) -> DNSRecord:
        reply = request.reply()
        name, kind = str(request.q.qname).rstrip(".").lower(), QTYPE[request.q.qtype]
        records = zone_records(name, kind)
        if records is None:
            reply.header.rcode = RCODE.NXDOMAIN
        for data in records or ():
            reply.add_answer(RR(request.q.qname, request.q.qtype, rdata=data, ttl=TTL))
        return reply


def zone_records(name: str, kind: str) -> list[A | AAAA | PTR] | None:
    """The records of a name; None when there is no such name."""
    if name in plan.ZONE:
        return [A(plan.ZONE[name])] if kind == "A" else []
    if name == reverse_name(plan.WAN_ADDRESS):
        return [PTR(plan.XROOTD_NAME)] if kind == "PTR" else []
    return None


def reverse_name(address: str) -> str:
    return ".".join(reversed(address.split("."))) + ".in-addr.arpa"


def main(directory: str, uid: str = "", gid: str = "") -> None:
    """Serve until killed."""
    quiet = DNSLogger("request,error", prefix=False)
    servers = [DNSServer(Zone(), address=plan.WAN_ADDRESS, tcp=tcp, logger=quiet) for tcp in (False, True)]
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=directory)
    web = http.server.ThreadingHTTPServer((plan.WAN_ADDRESS, 80), handler)
    if uid:
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    for server in servers:
        threading.Thread(target=server.server.serve_forever, daemon=True).start()
    web.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
