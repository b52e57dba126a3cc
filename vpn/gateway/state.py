"""Where a gateway keeps its state, and how to know whether the one written down still lives.

``$XDG_STATE_HOME/hpcq-gateway/NAME/`` (0700) holds ``gateway.json``, the server's key and certificate, the
control socket and the log. A home directory is shared by a site's login nodes, so the host is part of the
record. A process is known by pid, start time and boot: a pid alone is soon another's.
"""

from __future__ import annotations

import ipaddress
import os
import re
import select
import shutil
import socket
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from vpn.config import check_address, check_port
from vpn.errors import GatewayError, UsageError
from vpn.gateway.policy import Address, parse_rule

Uplink = Literal["sockets", "slirp4netns", "prototype"]
UPLINKS: tuple[str, ...] = get_args(Uplink)

SOCKET_PREFIX = "hpcq-gateway-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Record(msgspec.Struct, frozen=True):
    """``gateway.json``: what is needed to find a running gateway. Holds no secret."""

    name: str
    host: str
    boot: str
    pid: int
    start_time: int
    addresses: list[str]
    port: int
    pin: str
    control: str
    relay_port: int = 0
    refusal: str = ""


@dataclass(frozen=True)
class GatewayConfig:
    """How to run a gateway: ``listen`` is an address ("": all of this host), ``port`` 0 chooses one.

    ``dns`` are the name servers given to pilots; none means this host's own. ``uplink`` is
    what carries clients' packets to ocserv: the host's own sockets, or slirp4netns (``prototype``: by its MTU and
    TCP alone, for comparison). ``relay_port`` 0 is one after
    ``port``. ``privileged``: by root, without a user namespace.
    ``allow`` are rules of ``vpn.gateway.policy``; ``rate`` and ``rate_per_pilot`` bytes a second each way.
    """

    name: str = "default"
    listen: str = ""
    port: int = 0
    dns: tuple[str, ...] = ()
    uplink: Uplink = "sockets"
    relay_port: int = 0
    allow: tuple[str, ...] = ()
    rate: float = 0.0
    rate_per_pilot: float = 0.0
    privileged: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        for rule in self.allow:
            parse_rule(rule)
        if self.privileged and self.uplink != "sockets":
            raise UsageError(f"--uplink {self.uplink} means nothing with --privileged")
        if self.relay_port:
            check_port(self.relay_port)
        if self.listen and ":" in check_address(self.listen) and self.uplink != "sockets":
            raise UsageError(f"--listen {self.listen}: slirp4netns forwards IPv4 ports only")
        if self.port:
            check_port(self.port)
        for server in self.dns:
            check_address(server)


def check_name(name: str) -> str:
    """A gateway's name: it becomes a directory's."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} cannot be a gateway's name: letters, digits, dot, dash, underscore; at most 64")
    return name


def state_directory(name: str) -> Path:
    """The directory of one gateway; not made here."""
    try:
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:
        raise UsageError("this user has no home directory: set HOME or XDG_STATE_HOME") from None
    return Path(base) / "hpcq-gateway" / check_name(name)


def names() -> list[str]:
    """Every gateway of this user that has a directory, by name."""
    with suppress(OSError):
        return sorted(each.name for each in state_directory("any").parent.iterdir() if _NAME.fullmatch(each.name))
    return []


def make_directory(name: str) -> Path:
    """The directory, made private."""
    directory = state_directory(name)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except OSError as error:
        raise GatewayError(
            f"cannot use {directory}: {error.strerror}; set XDG_STATE_HOME to a directory of yours"
        ) from None
    return directory


def socket_directory(directory: Path, *, holds_sockets: Callable[[Path], bool] | None = None) -> Path:
    """Where the gateway's sockets go: its state directory, or one under /tmp when that cannot hold any.

    AFS homes, and some parallel file systems, have no Unix sockets.
    """
    if (holds_sockets or can_hold_sockets)(directory):
        return directory
    return Path(tempfile.mkdtemp(prefix=SOCKET_PREFIX))


def can_hold_sockets(directory: Path) -> bool:
    """Whether a Unix socket can be made in a directory: by making one."""
    name = f"probe.{os.getpid()}.sock"
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.bind(f"/proc/self/fd/{folder}/{name}")
        (directory / name).unlink()
    except OSError:
        return False
    finally:
        os.close(folder)
    return True


def remove_socket_directory(directory: Path) -> None:
    """Remove a directory that ``socket_directory`` made; a state directory stays."""
    if directory.name.startswith(SOCKET_PREFIX):
        shutil.rmtree(directory, ignore_errors=True)


def read_record(directory: Path) -> Record | None:
    """The record; None when there is none or it is not one."""
    try:
        return msgspec.json.decode((directory / "gateway.json").read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError):
        return None


def write_record(directory: Path, record: Record) -> None:
    """Write the record at once or not at all, 0600."""
    write_private(directory / "gateway.json", msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def write_private(path: Path, data: bytes) -> None:
    """Replace a file as a whole, 0600; raises OSError and then leaves the old one."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def last_port(directory: Path) -> int:
    """The port an earlier gateway of this name had, at which its pilots look for it; 0 when unknown."""
    try:
        text = (directory / "port").read_text()
    except OSError:
        return 0
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536 else 0


def keep_port(directory: Path, port: int) -> None:
    """Note the port for the next gateway of this name; that it cannot be is no reason to end this one."""
    with suppress(OSError):
        write_private(directory / "port", str(port).encode())


def is_alive(record: Record) -> bool:
    """Whether the recorded daemon is a process of this host now; False for one of another host."""
    return (
        record.host == socket.gethostname() and record.boot == boot_id() and start_time(record.pid) == record.start_time
    )


def boot_id() -> str:
    """Names this boot of this host."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot (proc(5), field 22 of stat); 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


def wait_ended(pid: int, deadline: float) -> bool:
    """Wait until a process, perhaps no child, has ended; False when ``deadline`` seconds pass first."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:  # it has ended; or a kernel before 5.3, where its socket's end must do
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(deadline * 1000))
    finally:
        os.close(fd)


def host_addresses(families: Collection[int] = (socket.AF_INET,)) -> list[str]:
    """This host's addresses that others can use, IPv4 first; where no link of it runs (a moment after they came up),
    those of links that are up.
    """
    import psutil  # noqa: PLC0415  (only the daemon needs it)

    flags = {name: found.flags.split(",") for name, found in psutil.net_if_stats().items()}
    addresses = [
        (name, ipaddress.ip_address(entry.address))
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families and "%" not in entry.address  # with an interface's name: of this host only
    ]
    return usable_addresses(addresses, flags)


def usable_addresses(addresses: Iterable[tuple[str, Address]], flags: Mapping[str, Collection[str]]) -> list[str]:
    """Of (interface, address), those that others can use. Pure."""
    others = [(name, address) for name, address in addresses if not (address.is_loopback or address.is_link_local)]
    running, up = (
        [(name, address) for name, address in others if flag in flags.get(name, ())] for flag in ("running", "up")
    )
    return [str(address) for _, address in sorted(running or up, key=lambda one: one[1].version)]
