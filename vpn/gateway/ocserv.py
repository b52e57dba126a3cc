"""What ocserv is told and what it says: its configuration, its connect script, its events. Pure text.

Every path is in the namespace's private directory, so it is short (ocserv's sockets have 108 bytes for
theirs) and needs no quoting.
"""

from __future__ import annotations

import grp
import pwd
from dataclasses import dataclass

from vpn.gateway.addresses import CLIENTS

EVENT_FD = 9
SOCKETS_FD = 10
MTU = 16000  # bytes: a TLS record holds 16384
PROTOTYPE_MTU = 1472
MAX_CLIENTS = 1024  # processes, those that have not logged in included: a stranger costs one for half a minute
WRONG_LIMIT = 20  # wrong passwords from one address within
WRONG_WITHIN = 10  # seconds are too many: nobody from there is let in for
WRONG_PAUSE = 10  # seconds, again and again while it goes on
COOKIE_LIFETIME = 300  # seconds after a connection's end within which its cookie can connect again

READY = "initialized ocserv"

# A login spends the credential; a later connection of the same user can only be a reconnect by its cookie.
SCRIPT = f"""\
#!/bin/sh
printf '%s %s %s %s\\n' "$REASON" "$USERNAME" "$ID" "$IP_REMOTE" >&{EVENT_FD}
"""


def configuration(room: str, port: int, dns: list[str], listen: str, mtu: int = MTU, *, user: str = "") -> str:
    """ocserv.conf; sources: ocserv(8) and the sample configuration it ships. ``listen`` "" is any address. ``user``:
    whom its workers become, each in its seccomp filter; "": nobody else, they are the namespace's root, the caller.
    """
    network, _, _ = CLIENTS.partition("/")
    settings = {
        "auth": f'"plain[passwd={room}/passwd]"',
        **({"listen-host": listen} if listen else {}),
        "tcp-port": port,
        "udp-port": port,
        "run-as-user": user or "root",
        "run-as-group": grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name if user else "root",
        "socket-file": f"{room}/ocserv",
        "occtl-socket-file": f"{room}/occtl",
        "use-occtl": "true",
        "pid-file": f"{room}/ocserv.pid",
        "server-cert": f"{room}/cert.pem",
        "server-key": f"{room}/key.pem",
        "isolate-workers": "true" if user else "false",  # its filter forbids what one_id.c does not know of
        "sec-mod-scale": 1,  # else one process a core of the login node
        "max-clients": MAX_CLIENTS,
        "max-same-clients": 1,
        "rate-limit-ms": 0,
        # The pilots of a node share its address, so what holds up who guesses there holds up all that log in there: not
        # for long, and not by connections, of which they make many.
        "max-ban-score": WRONG_LIMIT,
        "ban-points-wrong-password": 1,
        "ban-points-connection": 0,
        "ban-points-kkdcp": 1,
        "ban-reset-time": WRONG_WITHIN,
        "min-reauth-time": WRONG_PAUSE,
        "keepalive": 300,
        "dpd": 30,
        "mobile-dpd": 30,
        "switch-to-tcp-timeout": 15,
        "try-mtu-discovery": "false",
        "tls-priorities": (
            '"NORMAL:%SERVER_PRECEDENCE:-VERS-TLS-ALL:+VERS-TLS1.2:+VERS-TLS1.3:+VERS-DTLS1.2'
            ':-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305"'  # the first costs 10 rounds a block, not 14
        ),
        "auth-timeout": 30,
        "cookie-timeout": COOKIE_LIFETIME,
        "deny-roaming": "false",
        "rekey-time": 0,
        "log-level": 2,
        "device": "vpns",
        "predictable-ips": "true",  # openconnect does not go on with another address
        "ipv4-network": network,
        "ipv4-netmask": "255.255.0.0",
        "ping-leases": "false",
        "mtu": mtu,
        "output-buffer": 100,
        "dtls-psk": "true",
        "dtls-legacy": "false",
        "cisco-client-compat": "false",
        "route": "default",
        "connect-script": f"{room}/event",
        "disconnect-script": f"{room}/event",
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    return "\n".join([*lines, *(f"dns = {server}" for server in dns), ""])


@dataclass(frozen=True)
class Event:
    """A client connected, disconnected, or was noticed by ocserv in another way (``reason``)."""

    reason: str
    username: str
    worker: str
    address: str


def parse_event(line: str) -> Event | None:
    """A line of the connect script; None for anything else."""
    words = line.split(" ")
    return Event(*words) if len(words) == 4 and words[0] in ("connect", "disconnect") else None
