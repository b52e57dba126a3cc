"""How a gateway is named: by its name, or by HOST:PORT, a place where one of this user's gateways listens.

A place is looked up among the records of the user's gateways, whose ports are kept when they are started again: it
says which gateway is meant, and whose address pilots have anyway. May not live here: talking to it (see ``client``).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable

from vpn.errors import GatewayError, UsageError
from vpn.gateway import state
from vpn.gateway.state import Record

_PLACE = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9][A-Za-z0-9._-]{0,252})):(?P<port>[0-9]{1,5})")


def check_reference(text: str) -> str:
    """A gateway's name, or HOST:PORT, [ADDRESS]:PORT.

    Raises:
        UsageError: it is neither.
    """
    if ":" in text:
        place_of(text)
        return text
    return state.check_name(text)


def place_of(text: str) -> tuple[str, int] | None:
    """Host and port of a place; None for a name.

    Raises:
        UsageError: a place that cannot be one.
    """
    if ":" not in text:
        return None
    found = _PLACE.fullmatch(text)
    if found is None or not 0 < int(found["port"]) < 65536 or (found["six"] and not _is_address(found["six"])):
        raise UsageError(f"{text!r} is neither a gateway's name nor HOST:PORT")
    return found["host"] or found["six"], int(found["port"])


def _is_address(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def name_of(text: str, resolve: Callable[[str], Iterable[str]] | None = None) -> str:
    """The name of the gateway that is meant; ``resolve`` gives a host's addresses.

    Raises:
        UsageError: it is neither a name nor a place.
        GatewayError: no gateway of this user's has that place.
    """
    place = place_of(text)
    if place is None:
        return state.check_name(text)
    host, port = place
    records = [record for name in state.names() if (record := state.read_record(state.state_directory(name)))]
    here = [record for record in records if port in (record.port, record.relay_port)]
    for record in here:
        if _is_at(record, host):
            return record.name
    addresses = set((resolve or addresses_of)(host)) if here else set()
    for record in here:
        local = record.host == socket.gethostname() and any(map(_is_loopback, addresses))
        if local or addresses.intersection(record.addresses):
            return record.name
    known = ", ".join(f"{record.name} at {record.host}:{record.relay_port}" for record in records)
    raise GatewayError(
        f"no gateway of yours listens at {text} ({f'there are {known}' if known else 'there is none'}); start one on "
        f"{host} with `hpcq vpn gateway start --port {port}`, or name one"
    )


def _is_at(record: Record, host: str) -> bool:
    names = {record.host.lower(), record.host.lower().partition(".")[0]}
    return host.lower() in names or host in record.addresses


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def addresses_of(host: str) -> set[str]:
    """A host's addresses; none when it has no name that is known here. May take seconds."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {str(entry[4][0]) for entry in found}
