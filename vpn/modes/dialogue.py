"""What openconnect says, in its output and to its script: parsed, pure.

Sources: openconnect(8), the comment at the head of the vpnc-script, and the texts of openconnect 8.20 to
9.12. A line not listed here means nothing; an unknown wording costs detail, never the tunnel.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from vpn.errors import Layer, TunnelError

END = "VPN_SCRIPT_END"


def script_command(fd: int) -> str:
    """The ``--script``: tell its environment, NUL-separated, and nothing else. ``fd`` has one digit (POSIX
    sh).
    """
    return f"{{ env -0; printf '{END}=\\0'; }} >&{fd}"


@dataclass(frozen=True)
class NetworkSettings:
    """The ``connect`` or ``reconnect`` of the script: address (with prefix), MTU in bytes (0: unsaid),
    routes, DNS; ``address6`` and ``routes6`` where the server gives IPv6 as well.
    """

    address: str
    mtu: int
    routes: tuple[str, ...]
    dns: tuple[str, ...]
    search: tuple[str, ...]
    address6: str = ""
    routes6: tuple[str, ...] = ()


class ScriptReader:
    """Bytes of the script's pipe in, one environment a call of the script out."""

    def __init__(self) -> None:
        self._rest = b""
        self._current: dict[str, str] = {}

    def feed(self, data: bytes) -> Iterator[dict[str, str]]:
        """Environments that are complete now."""
        *whole, self._rest = (self._rest + data).split(b"\0")
        for entry in whole:
            name, _, value = entry.decode(errors="replace").partition("=")
            if name == END:
                yield self._current
                self._current = {}
            else:
                self._current[name] = value


def parse_settings(env: Mapping[str, str]) -> NetworkSettings:
    """Addresses and routes of a script's environment; raises TunnelError naming the variable that is no
    address.
    """
    address = _ipv4(env, "INTERNAL_IP4_ADDRESS")
    address6 = _ipv6(env)
    mtu = env.get("INTERNAL_IP4_MTU", "")
    dns = [word for name in ("INTERNAL_IP4_DNS", "INTERNAL_IP6_DNS") for word in env.get(name, "").split()]
    return NetworkSettings(
        address=f"{address}/32",
        mtu=int(mtu) if mtu.isascii() and mtu.isdigit() and 576 <= int(mtu[:9]) <= 65535 else 0,
        routes=tuple(_routes(env, "CISCO_SPLIT_INC", ipaddress.IPv4Network)) or ("default",),
        dns=tuple(word for word in dns if _is_address(word) and (address6 or ":" not in word)),
        search=tuple(re.findall(r"[A-Za-z0-9._-]+", env.get("CISCO_DEF_DOMAIN", ""))),
        address6=address6,
        routes6=(tuple(_routes(env, "CISCO_IPV6_SPLIT_INC", ipaddress.IPv6Network)) or ("::/0",)) if address6 else (),
    )


def _routes(
    env: Mapping[str, str], variable: str, kind: type[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> Iterator[str]:
    count = env.get(variable, "")
    for index in range(min(int(count), 10000) if count.isascii() and count.isdigit() and len(count) < 9 else 0):
        name = f"{variable}_{index}_"
        network = f"{env.get(name + 'ADDR', '')}/{env.get(name + 'MASKLEN', '')}"
        try:
            yield str(kind(network, strict=False))
        except ValueError:
            raise TunnelError("openconnect", f"the server sent a route that is none: {network!r}") from None


def _ipv4(env: Mapping[str, str], name: str) -> str:
    try:
        return str(ipaddress.IPv4Address(env.get(name, "")))
    except ValueError:
        raise TunnelError("openconnect", f"the server gave no IPv4 address ({name}={env.get(name, '')!r})") from None


def _ipv6(env: Mapping[str, str]) -> str:
    """ADDRESS/128, or "" when the server gives none that is one: the tunnel does without."""
    text = env.get("INTERNAL_IP6_ADDRESS") or env.get("INTERNAL_IP6_NETMASK", "")
    try:
        return f"{ipaddress.IPv6Address(text.partition('/')[0])}/128"
    except ValueError:
        return ""


def _is_address(word: str) -> bool:
    try:
        ipaddress.ip_address(word)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class TlsUp:
    """The login's connection is encrypted with ``cipher``."""

    cipher: str


@dataclass(frozen=True)
class DtlsUp:
    """Packets go by UDP."""

    cipher: str


@dataclass(frozen=True)
class DtlsDown:
    """Packets go by TLS, for now or for good."""


@dataclass(frozen=True)
class MtuFound:
    """The path carries this many bytes."""

    mtu: int


Said = TlsUp | DtlsUp | DtlsDown | MtuFound

_CIPHER = r"\((?P<cipher>(?:D?TLS|SSL)[^)]*\)(?:-\([^)]*\))*)"
_LINES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Said]], ...] = (
    (
        re.compile(r"Connected to HTTPS on .* with ciphersuite " + _CIPHER),
        lambda match: TlsUp("(" + match["cipher"]),
    ),
    (
        re.compile(r"Established DTLS connection .*Ciphersuite " + _CIPHER),
        lambda match: DtlsUp("(" + match["cipher"]),
    ),
    (
        re.compile(
            r"DTLS handshake (failed|timed out)|DTLS Dead Peer|"
            r"Failed to .*DTLS|Disabling DTLS|allow DTLS|No DTLS"
        ),
        lambda _: DtlsDown(),
    ),
    (re.compile(r"Configured as .*DTLS (disabled|unsuccessful)"), lambda _: DtlsDown()),
    (re.compile(r"Detected MTU of (?P<mtu>\d{3,5}) bytes"), lambda match: MtuFound(int(match["mtu"]))),
)


def parse_line(line: str) -> Said | None:
    """What a line of output means for the tunnel; None for most."""
    for pattern, kind in _LINES:
        match = pattern.search(line)
        if match is None:
            continue
        return kind(match)
    return None


REFUSED = "the server refused the user or password"
TERMINATED = 5.0
"""Seconds in which a gateway that has told its clients that it ends may be there again: one that only starts ocserv
anew is.
"""
_FORGOTTEN = re.compile(r"Cookie (is no longer valid|was rejected)|Reconnect failed")
_TERMINATED = re.compile(r"Session terminated by server")

_REASONS: tuple[tuple[re.Pattern[str], Layer, str], ...] = (
    (
        re.compile(
            r"fingerprint.*(match|mismatch)|certificate does not match|Server SSL certificate didn't match",
            re.IGNORECASE,
        ),
        "openconnect",
        "the server's key is not the pinned one: get a fresh credential from the gateway, "
        "or someone answers in its place",
    ),
    (
        re.compile(
            r"Login failed|Authentication failed|Failed to complete authentication|"
            r"fgets \(stdin\)|User input required"
        ),
        "openconnect",
        f"{REFUSED}: a gateway's credential is good for one login, get a fresh one",
    ),
    (
        re.compile(r"SSL connection failure"),
        "openconnect",
        "the server broke off the TLS handshake: it refused the client's certificate, or is no AnyConnect server",
    ),
    (
        re.compile(r"Failed to (connect to|open HTTPS connection to)|getaddrinfo failed|Connection refused"),
        "gateway",
        "the server could not be reached",
    ),
    (
        re.compile(r"[Ss]ession terminated by server|Cookie (is no longer valid|was rejected)|Reconnect failed"),
        "gateway",
        "the server ended the session: it was stopped, or the credential was revoked",
    ),
)


def login_patience(lines: Iterable[str], patience: float) -> float:
    """Seconds to go on trying to log in again at a gateway, after an openconnect that said this: ``patience`` where the
    gateway was gone without a word, and knows the session no more; 0 where a login is of no use.
    """
    text = "\n".join(lines)
    if _TERMINATED.search(text):
        return min(TERMINATED, patience)
    return patience if _FORGOTTEN.search(text) else 0.0


def explain_exit(status: int, lines: list[str], server: str) -> TunnelError:
    """Why openconnect ended, from its status and last lines; the oldest known reason counts, later lines are
    its effects.
    """
    said = [line.strip() for line in lines if line.strip()]
    how = f"signal {-status}" if status < 0 else f"status {status}"
    for line in said:
        for pattern, layer, advice in _REASONS:
            if pattern.search(line):
                return TunnelError(layer, f"{server}: {advice} (openconnect: {line})")
    last = said[-1] if said else "it said nothing"
    return TunnelError("openconnect", f"{server}: openconnect ended with {how}: {last}")
