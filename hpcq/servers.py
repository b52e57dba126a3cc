"""A VPN server of the user's own: how pilots name it, and who to be there, kept for the queue.

The name, ``server:USER@HOST:PORT``, stands where a gateway's does: on a pilot's command line, in its first message. The
credential is in a file of the queue's directory, mode 0600, and goes to each pilot over the encrypted link, as a
gateway's does. It is for as many logins as there are pilots, and nothing revokes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcq import state_dir
from hpcq.errors import UsageError
from vpn import Credential, Login, gateway_names, read_secret, server_credential
from vpn import UsageError as VpnUsageError

OPTIONS = ("server", "user", "servercert", "password_file", "certificate", "sslkey")
"""Options of pilots that say where and who; all are texts."""

_MARK = "server:"


def gateways_of(text: str) -> tuple[str, ...]:
    """What a pilot's tunnel may end at: gateways by their names, or the one server.

    Raises:
        vpn.UsageError: a name that no gateway can have.
    """
    return (text,) if is_server(text) else gateway_names(text)


def is_server(name: str) -> bool:
    """Whether it names a server of the user's own."""
    return name.startswith(_MARK)


def server_name(given: Mapping[str, Any], shown: Callable[[str], str]) -> str | None:
    """The name of the server that these options describe; None if they describe none. ``shown`` is how an option is
    typed.

    Raises:
        UsageError: something is missing, or cannot be; names the option.
    """
    for name in OPTIONS:
        if name in given and not isinstance(given[name], str | Path):
            raise UsageError(f"{shown(name)} must be a text, not {given[name]!r}")
        if name in given and "server" not in given:
            raise UsageError(f"{shown(name)} is for {shown('server')}, which is missing")
    if "server" not in given:
        return None
    if "gateway" in given:
        raise UsageError(f"{shown('gateway')} and {shown('server')} exclude each other")
    return _name(_credential(given, ""))


def keep(queue: str, given: Mapping[str, Any], ask: Callable[[], str] | None = None) -> None:
    """Keep who to be at the server that options name, if they name one; the password is in their ``password_file``, or
    ``ask`` gets it. Without either what is kept already counts.

    Raises:
        UsageError: there is no password, or its file cannot be read, or can be by others.
    """
    given = {name: value for name, value in given.items() if value is not None}
    name = server_name(given, lambda option: option)
    if name is None:
        return
    path = _file(queue, name)
    if "password_file" in given:
        password = _first_line(Path(given["password_file"]))
    elif ask is None and path.exists():
        return
    elif "user" not in given:
        password = ""
    elif ask is not None:
        password = ask()
    else:
        raise UsageError(f"password_file is missing: a file of mode 0600 with the password for {name}")
    if "user" in given and not password:
        raise UsageError(f"the password for {name} is empty")
    state_dir.ensure_queue_dir(queue)
    state_dir.ensure_private_dir(path.parent)
    state_dir.write_private(path, _credential(given, password).to_bytes())


def credential(queue: str, name: str) -> Credential:
    """Who to be at a server, by its name.

    Raises:
        vpn.UsageError: nothing is kept for it.
    """
    try:
        return Credential.from_bytes(_file(queue, name).read_bytes())
    except OSError as error:
        raise VpnUsageError(f"no password is kept for {name}: {error.strerror}; submit pilots for it again") from None


def _first_line(file: Path) -> str:
    try:
        return read_secret(file).partition(b"\n")[0].removesuffix(b"\r").decode()
    except UnicodeDecodeError:
        raise UsageError(f"password_file: {file} is not text in UTF-8") from None
    except VpnUsageError as error:
        raise UsageError(f"password_file: {error}") from None


def _credential(given: Mapping[str, Any], password: str) -> Credential:
    files = (str(Path(given[name]).absolute()) if name in given else "" for name in ("certificate", "sslkey"))
    try:
        return server_credential(
            given["server"], given.get("servercert"), given.get("user"), password, Login(False, *files)
        )
    except VpnUsageError as error:
        raise UsageError(str(error)) from None


def _name(found: Credential) -> str:
    host = f"[{found.addresses[0]}]" if ":" in found.addresses[0] else found.addresses[0]
    return f"{_MARK}{found.username}@{host}:{found.port}"


def _file(queue: str, name: str) -> Path:
    return state_dir.queue_dir(queue) / "servers" / hashlib.sha256(name.encode()).hexdigest()[:32]
