"""What users write in ``inputs`` and ``outputs``, checked when it is set.

A source is immutable except for `Temp`, which learns its producer when that is submitted. May not live here: reading.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hpcq.errors import UsageError
from hpcq.files import names

if TYPE_CHECKING:
    from hpcq.task import Task

SCHEMES = ("http", "https", "root", "roots", "xroot", "xroots")


@dataclass(frozen=True, slots=True)
class File:
    """A file or directory where the program runs, read when the task is about to be sent.

    Args:
        path: where it is; relative to the program's directory now.
        cache: keep it on the nodes for other tasks; without, each task gets it anew.
        link: the task sees a read-only hard link to the node's copy instead of a copy of its own. For large files that
            many tasks read: no copy is made, but a task that makes it writable and writes damages it for those that
            have it at that moment. (Later ones get it anew.)
    """

    path: str
    cache: bool = True
    link: bool = False

    def __init__(self, path: str | os.PathLike[str], cache: bool = True, link: bool = False) -> None:
        object.__setattr__(self, "path", _local("path", path))
        for name, value in (("cache", cache), ("link", link)):
            if not isinstance(value, bool):
                raise UsageError(f"File: {name} must be True or False, not {value!r}")
            object.__setattr__(self, name, value)
        if link and not cache:
            raise UsageError("File: link=True needs cache=True, since it links to the cache")


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes (or text, as UTF-8) that the task sees as a file."""

    data: bytes

    def __init__(self, data: bytes | bytearray | memoryview | str) -> None:
        if isinstance(data, str):
            data = data.encode()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise UsageError(f"Buffer takes bytes or text, not {type(data).__name__}")
        object.__setattr__(self, "data", bytes(data))

    def __repr__(self) -> str:
        return f"Buffer(<{len(self.data)} bytes>)"


@dataclass(frozen=True, slots=True)
class URL:
    """Something the pilot fetches itself, inside its tunnel: ``http``, ``https`` or ``root``.

    Args:
        url: what to fetch; no password in it, since it is shown in messages.
        cache: keep it on the node by its URL: the same URL is then taken to mean the same content.
        timeout: seconds for the whole transfer, all attempts together.
    """

    url: str
    cache: bool = False
    timeout: float = 3600.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.isprintable() or " " in self.url:
            raise UsageError(f"URL: {self.url!r} is not a URL; quote blanks as %20")
        try:
            parts = urlsplit(self.url)
            usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError as error:
            raise UsageError(f"URL: {self.url!r} cannot be used: {error}") from error
        if parts.scheme not in SCHEMES or not usable:
            raise UsageError(f"URL: {self.url!r} must be {', '.join(SCHEMES)}://HOST/…")
        if parts.password:
            raise UsageError("URL: a password in a URL would show in messages; use a token or a proxy certificate")
        if not isinstance(self.timeout, int | float) or not self.timeout > 0:
            raise UsageError(f"URL: timeout must be more than 0 seconds, not {self.timeout!r}")


class Temp:
    """An output that stays on the pilots; use the same object as an input of later tasks.

    When every pilot that had it is gone, the task that wrote it runs again, a few times at most.
    """

    __slots__ = ("producer",)

    def __init__(self) -> None:
        self.producer: tuple[Task, str] | None = None

    def __repr__(self) -> str:
        made = f" of {self.producer[0].label}: {self.producer[1]!r}" if self.producer else ""
        return f"<hpcq.Temp{made}>"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """An output of another task, made by `Task.file`."""

    task: Task
    name: str


Source = File | Buffer | URL | Temp | TaskFile
Destination = str | Temp


def _local(what: str, path: object) -> str:
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        raise UsageError(f"{what} must be a path, not {path!r}") from None
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{what} must be a path of text without NUL, not {text!r}")
    return os.path.abspath(text)


def _source(name: str, value: Any) -> Source:
    if isinstance(value, File | Buffer | URL | Temp | TaskFile):
        return value
    if isinstance(value, bytes | bytearray):
        raise UsageError(f"inputs[{name!r}]: wrap contents as hpcq.Buffer(…); a path is a string")
    if isinstance(value, str) and value.split("://")[0] in SCHEMES and "://" in value:
        raise UsageError(f"inputs[{name!r}]: wrap a URL as hpcq.URL({value!r}); a plain string is a path")
    try:
        return File(value)
    except UsageError as error:
        raise UsageError(f"inputs[{name!r}]: {error}") from None


def _destination(name: str, value: Any) -> Destination:
    return value if isinstance(value, Temp) else _local(f"outputs[{name!r}]", value)


def _mapping(option: str, value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"{option} must map names in the sandbox to files, not {value!r}")
    found: dict[str, Any] = {}
    for key, item in value.items():
        try:
            name = names.checked(key)
        except UsageError as error:
            raise UsageError(f"{option}: {error}") from None
        if name in found:
            raise UsageError(f"{option}: the name {name!r} is there twice")
        found[name] = item
    try:
        names.disjoint(found)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None
    return found or None


def check_inputs(option: str, value: object) -> dict[str, Source] | None:
    """The option ``inputs`` as it is kept.

    Raises:
        UsageError: a name or source that cannot be used, by name.
    """
    found = _mapping(option, value)
    return found and {name: _source(name, item) for name, item in found.items()}


def check_outputs(option: str, value: object) -> dict[str, Destination] | None:
    """The option ``outputs`` as it is kept.

    Raises:
        UsageError: a name or destination that cannot be used, by name.
    """
    found = _mapping(option, value)
    if not found:
        return None
    kept = {name: _destination(name, item) for name, item in found.items()}
    places = [place if isinstance(place, str) else id(place) for place in kept.values()]
    if len(set(places)) < len(places):
        raise UsageError(f"{option}: two outputs go to the same place")
    return kept
