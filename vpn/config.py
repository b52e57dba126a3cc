"""Settings of a tunnel: frozen, checked when made; no I/O.

``Credential`` is what a gateway gives one pilot. It crosses the manager's encrypted channel as bytes, and is
the only way a password leaves this process other than openconnect's standard input.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import msgspec

from vpn.cvmfs.settings import Cvmfs
from vpn.errors import UsageError

Mode = Literal["auto", "relay", "openconnect", "socks", "slirp", "prototype", "none"]
MODES: tuple[str, ...] = get_args(Mode)
WITHOUT_CREDENTIAL: tuple[Mode, ...] = ("slirp", "none")
PROBE_INTERVAL = 15.0
"""Seconds without traffic after which a tunnel is asked for a sign of life, by default,"""
PROBE_LEAST, PROBE_MOST = 1.0, 60.0
"""at least, and at most: a gateway takes a session that is silent for twice as long for broken."""
HONOURED: dict[str, tuple[object, tuple[Mode, ...]]] = {
    "dtls": (None, ("openconnect", "auto")),
    "mtu": (0, ("openconnect", "auto")),
    "tls": (True, ("relay", "socks", "auto")),
    "socks": (None, ("socks", "auto")),
    "server": (None, ("openconnect", "prototype", "auto")),
    "gateway": (None, ("relay", "openconnect", "socks", "prototype", "auto")),
    "credential": (None, ("relay", "openconnect", "socks", "prototype", "auto")),
    "probe_interval": (PROBE_INTERVAL, ("relay", "openconnect", "socks", "slirp", "prototype", "auto")),
}
"""Settings that mean something in these modes only, ``auto`` where it chooses one of them; and their defaults."""

_PIN = re.compile(r"pin-sha256:[A-Za-z0-9+/]{43}=")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
_USER = re.compile(r"[^\s\0:][^\0\n\r:]{0,127}")


class Secret:
    """A string that does not show itself: not in repr, str, format or pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The string itself: only where it is handed on."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled; send Credential.to_bytes() over an encrypted channel")

    __copy__ = __deepcopy__ = lambda self, *_: self


class _Wire(msgspec.Struct, omit_defaults=True):
    """A credential as JSON; ``version`` grows when a field changes its meaning, not when one is added."""

    addresses: list[str]
    port: int
    pin: str
    username: str
    password: str
    version: int = 1
    relay_port: int = 0
    mtu: int = 0
    dtls: bool = True
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True)
class Login:
    """How to log in other than by user and password: with a session's ``cookie`` (then it is what ``password`` holds),
    or a client ``certificate`` and its ``key``, PEM files that the host of the tunnel sees; with a user name, by
    password as well.
    """

    cookie: bool = False
    certificate: str = ""
    key: str = ""

    @property
    def needs_user(self) -> bool:
        """Whether there must be a user name."""
        return not (self.cookie or self.certificate)


@dataclass(frozen=True)
class Credential:
    """Who to be at which server: tried address after address, the server's key pinned.

    ``pin`` is ``pin-sha256:`` and the base64 SHA-256 of the server's public key (RFC 7469's form, as
    openconnect takes it). ``port`` is where openconnect is served, ``relay_port`` the relay; 0 where it is not.
    ``mtu`` (bytes; 0: unsaid) and ``dtls`` are what serves openconnect best at this server: one that ends pilots' TCP
    itself is reached fastest by TLS with the largest packets.
    """

    addresses: tuple[str, ...]
    port: int
    pin: str
    username: str
    password: Secret
    relay_port: int = 0
    mtu: int = 0
    dtls: bool = True
    login: Login = Login()

    def __post_init__(self) -> None:
        _require(bool(self.addresses), "a credential needs at least one server address")
        for address in self.addresses:
            _require(_is_host(address), f"{address!r} is not a host name or address")
        for port in filter(None, (self.port, self.relay_port)):
            check_port(port)
        _require(bool(self.port or self.relay_port), "a credential needs a port")
        check_pin(self.pin)
        check_mtu(self.mtu)
        named = bool(self.username) or self.login.needs_user
        _require(not named or _USER.fullmatch(self.username) is not None, f"{self.username!r} cannot be a user name")
        _require(not self.username.startswith("-"), f"{self.username!r} cannot be a user name")
        _require("\n" not in self.password.reveal(), "the password holds a line break")

    def to_bytes(self) -> bytes:
        """JSON with the password in it: for an encrypted channel or a 0600 file only."""
        _require(not self.login.cookie, "a cookie is for this host: it cannot be sent to others")
        wire = _Wire(
            list(self.addresses), self.port, self.pin, self.username, self.password.reveal(),
            relay_port=self.relay_port, mtu=self.mtu, dtls=self.dtls,
            certificate=self.login.certificate, key=self.login.key,
        )  # fmt: skip
        return msgspec.json.encode(wire)

    @classmethod
    def from_bytes(cls, data: bytes) -> Credential:
        """The inverse of ``to_bytes``; raises UsageError without quoting the data."""
        try:
            wire = msgspec.json.decode(data, type=_Wire)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UsageError("not a credential of a gateway (or one of another version)") from None
        return cls(
            tuple(wire.addresses), wire.port, wire.pin, wire.username, Secret(wire.password),
            wire.relay_port, wire.mtu, wire.dtls, Login(False, wire.certificate, wire.key),
        )  # fmt: skip


@dataclass(frozen=True)
class TunnelConfig:
    """How to make a tunnel. Times are in seconds.

    ``bring_up_timeout`` covers everything until commands can run; ``dtls_timeout`` is how long of it may go to waiting
    for DTLS before TLS is settled for (a few seconds at least where ``dtls`` is True); ``reconnect_timeout`` is how
    long a broken connection may take to come back before the tunnel counts as lost; ``probe_interval`` is how often a
    quiet one is asked for a sign of life. ``dtls`` and ``mtu`` are asked of the server (None, 0: what its credential
    says).
    ``direct`` are networks reached from the node itself, as everything is in modes slirp and none. ``socks`` is a
    SOCKS5 server to use instead of a gateway's.
    Without ``tls``, modes relay and socks leave what programs send as it is; who they are is encrypted all the same.
    """

    mode: Mode
    credential: Credential | None = None
    bring_up_timeout: float = 60
    dtls_timeout: float = 1
    reconnect_timeout: int = 60
    probe_interval: float = PROBE_INTERVAL
    dtls: bool | None = None
    mtu: int = 0
    dns: tuple[str, ...] = ()
    socks: tuple[str, int] | None = None
    direct: tuple[str, ...] = ()
    tls: bool = True
    cvmfs: Cvmfs | None = None

    def __post_init__(self) -> None:
        _require(self.mode in MODES, f"unknown tunnel mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.mode in ("relay", "openconnect", "prototype"):
            _require(self.credential is not None, f"mode {self.mode} needs a credential")
        _require(self.bring_up_timeout > 0, "bring_up_timeout must be positive")
        _require(self.dtls_timeout >= 0, "dtls_timeout must not be negative")
        _require(self.reconnect_timeout >= 0, "reconnect_timeout must not be negative")
        check_probe_interval(self.probe_interval)
        check_mtu(self.mtu)
        for server in self.dns:
            check_address(server)
        object.__setattr__(self, "direct", tuple(check_network(network) for network in self.direct))


def as_flag(name: str, value: object) -> str:
    """A setting as it is asked for on a command line."""
    flag = name.replace("_", "-")
    return f"--no-{flag}" if value is False else f"--{flag}"


def check_honoured(mode: str, given: Mapping[str, object], shown: Callable[[str, object], str] = as_flag) -> None:
    """Refuse settings that a mode would have to ignore; raises UsageError, which names the setting, as ``shown``, and
    the mode.
    """
    for name, (default, modes) in HONOURED.items():
        value = given.get(name, default)
        if value != default and mode not in modes:
            *some, last = (other for other in modes if other != "auto")
            others = f"{', '.join(some)} and {last}" if some else last
            raise UsageError(f"{shown(name, value)} means nothing in mode {mode}: it is for {others}")


def server_credential(server: str, pin: str | None, user: str | None, secret: str, login: Login) -> Credential:
    """Who to be at any AnyConnect server, HOST:PORT; raises UsageError for what is missing or cannot be."""
    _require(not login.key or bool(login.certificate), "--sslkey is the key of --certificate, which is missing")
    if pin is None or (user is None and login.needs_user):
        raise UsageError("--server needs --servercert pin-sha256:… and --user, or --cookie-on-stdin or --certificate")
    host, port = parse_server(server)
    return Credential((host,), port, pin, user or "", Secret(secret), login=login)


def read_secret(file: Path) -> bytes:
    """A file that must be nobody else's business; raises UsageError."""
    try:
        mode, data = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    _require(not mode & 0o077, f"{file} can be read by others; make it private: chmod 600 {file}")
    return data


def check_port(port: int) -> int:
    """A TCP or UDP port."""
    _require(0 < port < 65536, f"{port} is not a port (1…65535)")
    return port


def check_mtu(mtu: int) -> int:
    """A tunnel's MTU in bytes; 0: unsaid."""
    _require(mtu == 0 or 576 <= mtu <= 65535, f"mtu {mtu} is outside 576…65535")
    return mtu


def check_probe_interval(seconds: float) -> float:
    """How often a quiet tunnel is asked for a sign of life."""
    _require(
        PROBE_LEAST <= seconds <= PROBE_MOST,
        f"a probe interval of {seconds:g} s is outside {PROBE_LEAST:g}…{PROBE_MOST:g} s",
    )
    return seconds


def check_pin(pin: str) -> str:
    """A server key's pin."""
    _require(_PIN.fullmatch(pin) is not None, f"{pin!r} is not a pin: pin-sha256: and 44 characters of base64")
    return pin


def check_address(text: str) -> str:
    """An IP address."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise UsageError(f"{text!r} is not an IP address") from None


def check_network(text: str) -> str:
    """An IP network: ADDRESS/BITS, or an address alone."""
    try:
        return str(ipaddress.ip_network(text, strict=False))
    except ValueError:
        raise UsageError(f"{text!r} is not a network (192.0.2.0/24, 2001:db8::/32)") from None


def split_networks(texts: Iterable[str]) -> tuple[str, ...]:
    """Networks of lists ``NETWORK,…``."""
    return tuple(check_network(network.strip()) for text in texts for network in text.split(","))


def parse_server(text: str, default_port: int = 443) -> tuple[str, int]:
    """HOST:PORT, [IPv6]:PORT or HOST (its default port)."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:]+))(?::(?P<port>\d{1,5}))?", text)
    if match is None:
        raise UsageError(f"{text!r} is not HOST:PORT")
    return match["six"] or match["host"], check_port(int(match["port"] or default_port))


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None
    return "%" not in text  # an interface's name is of another host


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def as_json(value: Any) -> str:
    """Data a command prints for ``--json``."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
