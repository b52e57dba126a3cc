"""What stands outside the site, for tests: a name server and a web server.

Prints ``ready`` when both listen.
"""

from __future__ import annotations

import http.server
import socketserver
import sys
import threading

from dnslib import QTYPE, RR, A
from dnslib.server import BaseResolver, DNSServer


class Resolver(BaseResolver):
    def resolve(self, request, handler):
        reply = request.reply()
        if request.q.qtype == QTYPE.A and str(request.q.qname).rstrip(".") == "web.example.org":
            reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(sys.argv[1]), ttl=60))
        elif not str(request.q.qname).rstrip(".").endswith("example.org"):
            reply.header.rcode = 3
        return reply


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        size = int(self.path.strip("/") or 0) if self.path.strip("/").isdigit() else 0
        body = b"x" * size or b"hello\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, 1 << 20)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


def main():
    DNSServer(Resolver(), address=sys.argv[1], port=53).start_thread()
    server = Server((sys.argv[1], 80), Handler)
    threading.Thread(target=server.serve_forever).start()
    print("ready", flush=True)


if __name__ == "__main__":
    main()
