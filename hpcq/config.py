"""The settings of pilots and queues from files and variables, and where each came from.

Last wins: the defaults; ``/etc/hpcq/config.toml``; ``~/.config/hpcq/config.toml`` (or below ``$XDG_CONFIG_HOME``); the
tables ``[site.NAME]`` of both, in that order; variables ``HPCQ_BATCH``, ``HPCQ_CORES``, …; what the caller gives (the
flags). The site is the one the caller names, else ``HPCQ_SITE``, else ``default_site = "NAME"`` in a file.

Names are those of the flags of ``hpcq submit-pilots``, with ``_`` or ``-``, and those of `QUEUE_KINDS`, which may also
be in a table ``[queue]``. Relative paths in a file are taken from its directory. May not live here: what a value means
to a batch system (see `hpcq.batch.request`).
"""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcq import state_dir
from hpcq.errors import UsageError

SYSTEM_FILE = Path("/etc/hpcq/config.toml")

_TEXTS = (
    "batch", "partition", "account", "qos", "constraint", "reservation", "mail", "job_name", "vpn", "gateway",
    "cvmfs", "cvmfs_proxy", "connection", "server", "user", "servercert",
)  # fmt: skip
_SIZES = (
    "memory", "disk", "cache_size", "walltime", "manager_timeout", "drain_timeout", "cvmfs_quota", "probe_interval",
)  # fmt: skip
_PATHS = (
    "template", "environment", "scratch", "cvmfs_cache", "password_file", "certificate", "sslkey",
)  # fmt: skip
_LISTS = ("options", "modules", "setup", "epilogue", "require", "direct", "cvmfs_image", "cvmfs_server", "cvmfs_key")
KINDS: dict[str, str] = {
    **dict.fromkeys(_TEXTS, "text"),
    **dict.fromkeys(_SIZES, "size"),
    **dict.fromkeys(_PATHS, "path"),
    **dict.fromkeys(("count", "nodes", "cores", "gpus", "mtu"), "number"),
    **dict.fromkeys(_LISTS, "list"),
    **dict.fromkeys(("exclusive", "dtls", "tls"), "flag"),
    "variables": "table",
}
"""Every setting and what it is: text, number, size (text or number), path, list of texts, flag, table of texts."""

QUEUE_KINDS = {"address": "text", "interface": "text", "port": "port", "journal": "journal", "state_dir": "path"}
"""The same for queues: what `Queue` takes by these names. Of address and interface the last that is given counts."""

DEFAULTS: dict[str, Any] = {"batch": "local", "count": 1, "nodes": 1, "cores": 1}

_ALL_KINDS = KINDS | QUEUE_KINDS

_WANTED = {
    "list": "a list of texts",
    "table": "a table of texts",
    "size": "a text or a number",
    "flag": "true or false",
    "port": 'a number or a range such as "20000-20100"',
    "journal": "true, false or a path",
}
_PORT = re.compile(r"\s*\d{1,5}\s*(?:[-:]\s*\d{1,5}\s*)?", re.ASCII)
_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class Settings:
    """The settings that count, by name, and the origin of each; ``sites`` are the names of all known ones."""

    values: dict[str, Any]
    origins: dict[str, str]
    site: str | None = None
    sites: list[str] = field(default_factory=list)


def user_file() -> Path:
    """Return where the user's own settings are."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(configured) if Path(configured).is_absolute() else state_dir.home() / ".config"
    return base / "hpcq" / "config.toml"


def resolve(
    given: Mapping[str, Any] | None = None, *, site: str | None = None, origin: str = "command line"
) -> Settings:
    """Return the settings of pilots that count; those ``given`` that are None or empty lists count as not given.

    Raises:
        UsageError: a file that cannot be read; an unknown setting, a value of the wrong kind, an unknown site: by name,
            with the file or variable it is in.
    """
    return _settle(KINDS, DEFAULTS, given, site, origin)


def resolve_queue(
    given: Mapping[str, Any] | None = None, *, site: str | None = None, origin: str = "program"
) -> Settings:
    """As `resolve`, for queues: where the program listens, whether it keeps a journal."""
    return _settle(QUEUE_KINDS, {"port": 0, "journal": False}, given, site, origin)


def _settle(
    kinds: Mapping[str, str],
    defaults: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    site: str | None,
    origin: str,
) -> Settings:
    files = [(path, _read(path)) for path in (SYSTEM_FILE, user_file())]
    chosen = site or os.environ.get("HPCQ_SITE") or _site_of(files)
    known = sorted({name for path, content in files for name in _sites(path, content)})
    if chosen is not None and chosen not in known:
        names = f"known are {', '.join(known)}" if known else "there is none"
        raise UsageError(f"unknown site {chosen!r} ({names}); write a table [site.{chosen}] in {user_file()}")
    layers = [("default", defaults)]
    for path, content in files:
        layers.append((str(path), _table(content, str(path), path.parent, top=True)))
        layers.append((f"{path} [queue]", _queue_table(content, path)))
    for path, content in files:
        sites = _sites(path, content)
        if chosen in sites:
            where = f"{path} [site.{chosen}]"
            layers.append((where, _table(sites[chosen], where, path.parent)))
    layers += [(f"${variable}", {name: value}) for variable, name, value in _variables()]
    layers.append((origin, {n: v for n, v in (given or {}).items() if v not in (None, (), [])}))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for where, layer in layers:
        if "address" in layer or "interface" in layer:
            values = {name: value for name, value in values.items() if name not in ("address", "interface")}
        for name, value in layer.items():
            if name in kinds:
                values[name], origins[name] = value, where
    return Settings(values, {name: origins[name] for name in values}, chosen, known)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"the settings in {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def _site_of(files: list[tuple[Path, dict[str, Any]]]) -> str | None:
    chosen = None
    for path, content in files:
        chosen = content.get("default_site", chosen)
        if chosen is not None and not isinstance(chosen, str):
            raise UsageError(f"{path}: default_site must be the name of a site, not {chosen!r}")
    return chosen


def _sites(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    sites = content.get("site", {})
    if not isinstance(sites, dict):
        raise UsageError(f"{path}: write tables [site.NAME], and default_site for the one to use, not site = {sites!r}")
    for name, table in sites.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: site.{name} must be a table, as under a line [site.{name}]")
    return sites


def _queue_table(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    table, where = content.get("queue", {}), f"{path} [queue]"
    if not isinstance(table, dict):
        raise UsageError(f"{path}: queue must be a table, as under a line [queue]")
    unknown = [name for name in table if name not in QUEUE_KINDS]
    if unknown:
        raise UsageError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(QUEUE_KINDS)}")
    return _table(table, where, path.parent)


def _table(content: Mapping[str, Any], where: str, directory: Path, *, top: bool = False) -> dict[str, Any]:
    own = {}
    for written, value in content.items():
        if top and written in ("site", "default_site", "queue"):
            continue
        name = written.replace("-", "_")
        if name not in _ALL_KINDS:
            raise UsageError(f"{where}: unknown setting {written!r}; known are {', '.join(sorted(_ALL_KINDS))}")
        own[name] = _checked(name, value, where, directory)
    return own


def _checked(name: str, value: Any, where: str, directory: Path) -> Any:
    kind = _ALL_KINDS[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "text": isinstance(value, str),
        "path": isinstance(value, str),
        "size": isinstance(value, str) or number,
        "number": isinstance(value, int) and not isinstance(value, bool),
        "flag": isinstance(value, bool),
        "journal": isinstance(value, bool | str),
        "port": isinstance(value, int | str) and _PORT.fullmatch(str(value)) is not None,
        "list": isinstance(value, list) and all(isinstance(item, str) for item in value),
        "table": isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    }[kind]
    if not fits:
        raise UsageError(f"{where}: {name} must be {_WANTED.get(kind, f'a {kind}')}, not {value!r}")
    is_path = kind == "path" or (kind == "journal" and isinstance(value, str))
    return directory / _expanded(value, f"{where}: {name}") if is_path else value


def _expanded(text: str, what: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{what}: there is no home directory for {text!r}") from None


def _variables() -> list[tuple[str, str, Any]]:
    found = []
    for name, kind in _ALL_KINDS.items():
        variable = f"HPCQ_{name.upper()}"
        text = os.environ.get(variable, "")
        if text and kind != "table":
            found.append((variable, name, _from_text(variable, kind, text)))
    return found


def _from_text(variable: str, kind: str, text: str) -> Any:
    """A variable's value; a list is written as words, as for a shell."""
    try:
        if kind == "number":
            return int(text)
        if kind == "flag":
            return _FLAGS[text.lower()]
        if kind == "journal" and text.lower() in _FLAGS:
            return _FLAGS[text.lower()]
        if kind == "list":
            return shlex.split(text)
        if kind == "port" and _PORT.fullmatch(text) is None:
            raise ValueError(text)
    except (ValueError, KeyError) as error:
        wanted = (_WANTED | {"number": "a number", "list": "words, quoted as for a shell"})[kind]
        raise UsageError(f"the variable {variable} must be {wanted}, not {text!r}") from error
    return _expanded(text, f"the variable {variable}") if kind in ("path", "journal") else text
