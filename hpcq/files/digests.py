"""Digests of contents, and a memory of those already computed.

A file is taken to be unchanged while device, inode, size, mode and modification time are; a digest of a file changed
less than `RACY` seconds ago is not remembered, since it could change again within one tick of the file system's clock.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

import msgspec

from hpcq.files import pack
from hpcq.files.names import shown

RACY = 2.0
REMEMBERED = 100_000


class Content(msgspec.Struct, frozen=True, gc=False):
    """A file (``dir`` for a packed directory) by its digest; ``size`` in bytes, of the archive for a directory."""

    digest: bytes
    size: int
    kind: str = "file"
    executable: bool = False


class Hash(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None:
        """More of the content."""

    def digest(self) -> bytes:
        """Of all."""


def new_hash() -> Hash:
    """An empty digest: SHA-256, which processors have instructions for."""
    return hashlib.sha256()


def of_bytes(data: bytes) -> Content:
    """The content of a buffer."""
    return Content(hashlib.sha256(data).digest(), len(data))


def file_chunks(descriptor: int) -> Iterator[bytes]:
    """A file from its beginning."""
    offset = 0
    while piece := os.pread(descriptor, pack.CHUNK, offset):
        offset += len(piece)
        yield piece


def of_chunks(chunks: Iterator[bytes], kind: str = "file", executable: bool = False) -> Content:
    """The content of a stream."""
    total, size = new_hash(), 0
    for piece in chunks:
        total.update(piece)
        size += len(piece)
    return Content(total.digest(), size, kind, executable)


def open_regular(path: str) -> int:
    """A descriptor of a regular file or directory; does not hang on a pipe.

    Raises:
        OSError: it cannot be read, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        os.close(descriptor)
        raise OSError(f"{shown(path)} is neither a file nor a directory")
    return descriptor


def signature(path: str) -> tuple[object, ...]:
    """What changes when a file, or anything in a directory, is changed.

    Raises:
        OSError: it cannot be looked at.
    """
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        return _signature(status)
    total = new_hash()
    newest = status.st_mtime_ns
    for entry in pack.entries(path, follow=True):
        total.update(repr((entry.name, entry.target, _signature(entry.status))).encode())
        newest = max(newest, entry.status.st_mtime_ns)
    return (status.st_dev, status.st_ino, total.digest(), newest)


def _signature(status: os.stat_result) -> tuple[object, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mode, status.st_mtime_ns)


class Digests:
    """Contents by path signature. May be used by many threads."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[object, ...], Content] = OrderedDict()
        self._lock = threading.Lock()

    def of_path(self, path: str) -> tuple[Content, tuple[object, ...]]:
        """The content of a file or directory, and the signature under which it holds.

        Raises:
            OSError: it cannot be read, or changed meanwhile.
        """
        before = signature(path)
        with self._lock:
            known = self._known.get(before)
        if known is not None:
            return known, before
        content = _read(path)
        if signature(path) != before:
            raise OSError(f"{shown(path)} changed while it was read")
        newest = before[-1]
        assert isinstance(newest, int)
        if time.time() - newest / 1e9 > RACY:
            with self._lock:
                self._known[before] = content
                while len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
        return content, before


def _read(path: str) -> Content:
    descriptor = open_regular(path)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            return of_chunks(pack.chunks(path, follow=True), "dir")
        return of_chunks(file_chunks(descriptor), "file", bool(mode & 0o100))
    finally:
        os.close(descriptor)
