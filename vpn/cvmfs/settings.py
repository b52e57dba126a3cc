"""What CVMFS a session is asked for: frozen, checked when made; no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from vpn.errors import UsageError

QUOTA = 4000
"""MB of 2**20 bytes, CVMFS' own default."""
SMALLEST_QUOTA = 1000
"""MB below which catalogs alone push each other out of the cache."""

_REPOSITORY = re.compile(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+", re.IGNORECASE)


class Image(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A squashfs file with the contents of a repository, or of all of /cvmfs (``repository`` "")."""

    path: str
    repository: str = ""

    @classmethod
    def parse(cls, text: str) -> Image:
        """``FILE`` or ``REPOSITORY=FILE``; raises UsageError."""
        name, equals, path = text.partition("=")
        if equals and _REPOSITORY.fullmatch(name):
            return cls(path, name)
        return cls(text)


class Cvmfs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Repositories that must be readable at /cvmfs, and how to mount those that are not there.

    ``proxy`` is CVMFS_HTTP_PROXY ("": the node's configuration, else DIRECT); ``servers`` are URLs up to and without
    the repository's name, ``keys`` public keys, both for repositories the node's configuration does not know.
    ``cache`` is a node-local directory ("": TMPDIR or /tmp), held at ``quota`` MB by all sessions of this user on the
    node together.
    """

    repositories: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    proxy: str = ""
    servers: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    cache: str = ""
    quota: int = QUOTA

    def __post_init__(self) -> None:
        for name in (*self.repositories, *(image.repository for image in self.images if image.repository)):
            _require(_REPOSITORY.fullmatch(name) is not None, f"{name!r} is not a CVMFS repository, as cms.cern.ch is")
        targets = [image.repository for image in self.images]
        _require(len(set(targets)) == len(targets), "two CVMFS images have the same place")
        _require("" not in targets or len(targets) == 1, "an image of all of /cvmfs leaves no place for another")
        for path in (*(image.path for image in self.images), *self.keys, *([self.cache] if self.cache else [])):
            _require(path.startswith("/"), f"{path!r} must be a whole path: the session starts somewhere else")
            _require("\0" not in path and "\n" not in path, f"{path!r} cannot be a path")
        for server in self.servers:
            _require(_is_url(server), f"CVMFS server {server!r} is not http://HOST/cvmfs")
        _require(bool(self.servers) == bool(self.keys), "a CVMFS server and its public key are given together")
        _require("\n" not in self.proxy and "\0" not in self.proxy, "the CVMFS proxy holds a line break")
        _require(self.quota >= SMALLEST_QUOTA, f"a CVMFS cache needs at least {SMALLEST_QUOTA} MB, not {self.quota}")
        _require(bool(self.repositories or self.images), "no CVMFS repository was named")

    @property
    def names(self) -> tuple[str, ...]:
        """Every repository that will be readable, as far as it is named."""
        imaged = [image.repository for image in self.images if image.repository]
        return tuple(dict.fromkeys([*self.repositories, *imaged]))

    @property
    def whole(self) -> Image | None:
        """The image of all of /cvmfs."""
        return next((image for image in self.images if not image.repository), None)

    def to_json(self) -> str:
        """For a command line; there is no secret in it."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Cvmfs:
        """The inverse of ``to_json``; raises UsageError."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise UsageError(f"not CVMFS settings: {error}") from None


def whole_image(text: str) -> str:
    """``[REPOSITORY=]FILE`` with a file that is relative made whole, from here."""
    image = Image.parse(text)
    path = str(Path(image.path).absolute())
    return f"{image.repository}={path}" if image.repository else path


def make_cvmfs(
    repositories: str | Sequence[str] | None,
    *,
    images: Sequence[str] = (),
    proxy: str | None = None,
    servers: Sequence[str] = (),
    keys: Sequence[str] = (),
    cache: str | None = None,
    quota: int | None = None,
) -> Cvmfs | None:
    """Settings from options as they are written (``cms.cern.ch,…``, ``[REPOSITORY=]FILE``); None when none is given.

    Raises:
        UsageError: names the value that cannot be used.
    """
    names = repositories.split(",") if isinstance(repositories, str) else list(repositories or ())
    if not (names or images):
        if proxy or servers or keys or cache or quota:
            raise UsageError("CVMFS settings without a repository: say which with --cvmfs")
        return None
    return Cvmfs(
        tuple(dict.fromkeys(name.strip() for name in names)),
        tuple(Image.parse(image) for image in images),
        proxy or "",
        tuple(servers),
        tuple(keys),
        cache or "",
        QUOTA if quota is None else quota,
    )


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and not re.search(r"\s", text)
    except ValueError:
        return False


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
