"""A directory as one stream of bytes, the same each time, and back.

The stream is a tar archive with sorted names and without owners and times. Links that stay inside are kept as links;
in a directory the user gave, a link to a file elsewhere is sent as that file. Anything else that is neither a file nor
a directory is refused by name. Unpacking uses the interpreter's ``data`` filter: nothing is written outside.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hpcq.files.names import shown

CHUNK = 1 << 20
"""Bytes read and sent at a time."""


class PackError(OSError):
    """Something in a directory that cannot be sent, or that changed while it was read; names it."""


class Entry:
    """One thing in a directory. ``target`` is a link's; ``status`` that of the file whose contents count."""

    __slots__ = ("name", "path", "status", "target")

    def __init__(self, name: str, path: str, status: os.stat_result, target: str) -> None:
        self.name = name
        self.path = path
        self.status = status
        self.target = target


def entries(root: str, follow: bool) -> Iterator[Entry]:
    """Everything below ``root``, in order; ``follow`` links that lead to files outside.

    Raises:
        PackError: a link that leads outside (or nowhere), a device, a pipe, a name that is not Unicode.
    """
    real_root = os.path.realpath(root)
    stack = [""]
    while stack:
        below = stack.pop()
        children = sorted(os.listdir(os.path.join(root, below)))
        for child in children:
            name = os.path.join(below, child)
            entry = _entry(root, real_root, name, follow)
            if not entry.target and stat.S_ISDIR(entry.status.st_mode):
                stack.append(name)
            yield entry


def _entry(root: str, real_root: str, name: str, follow: bool) -> Entry:
    path = os.path.join(root, name)
    status = os.lstat(path)
    target = ""
    if stat.S_ISLNK(status.st_mode):
        real = os.path.realpath(path)
        if _is_inside(real, real_root) and os.path.exists(real):
            target = os.path.relpath(real, os.path.realpath(os.path.dirname(path)))
        elif follow and os.path.isfile(real):
            path, status = real, os.stat(real)
        else:
            raise PackError(f"{shown(path)} is a link that leads to {shown(real)}, outside the directory or nowhere")
    elif not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise PackError(f"{shown(path)} is neither a file nor a directory")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise PackError(f"{shown(path)} has a name that is not valid Unicode") from None
    return Entry(name, path, status, target)


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")


def chunks(root: str, follow: bool) -> Iterator[bytes]:
    """The archive of ``root``, in pieces of at most about `CHUNK`.

    Raises:
        PackError: see `entries`; or a file whose size changed while it was read.
    """
    small: list[bytes] = []
    held = 0
    for entry in entries(root, follow):
        header = _header(entry)
        small.append(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        held += len(small[-1])
        if header.isreg():
            for piece in _contents(entry):
                small.append(piece)
                held += len(piece)
                if held >= CHUNK:
                    yield b"".join(small)
                    small, held = [], 0
    small.append(bytes(1024))
    yield b"".join(small)


def _header(entry: Entry) -> tarfile.TarInfo:
    header = tarfile.TarInfo(entry.name)
    if entry.target:
        header.type, header.linkname = tarfile.SYMTYPE, entry.target
    elif stat.S_ISDIR(entry.status.st_mode):
        header.type, header.mode = tarfile.DIRTYPE, 0o755
    else:
        header.size = entry.status.st_size
        header.mode = 0o755 if entry.status.st_mode & 0o100 else 0o644
    return header


def _contents(entry: Entry) -> Iterator[bytes]:
    left = entry.status.st_size
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        while left:
            piece = file.read(min(left, CHUNK))
            if not piece:
                raise PackError(f"{shown(entry.path)} became shorter while it was read")
            left -= len(piece)
            yield piece
        if file.read(1):
            raise PackError(f"{shown(entry.path)} became longer while it was read")
    yield bytes(-entry.status.st_size % 512)


def unpack(archive: BinaryIO, into: Path) -> None:
    """Make the directory ``into`` from an archive.

    Raises:
        OSError: it cannot be written, or the archive holds a name that leads outside.
    """
    into.mkdir(mode=0o755)
    try:
        with tarfile.open(fileobj=archive, mode="r|", bufsize=CHUNK) as tar:
            tar.extractall(into, filter="data")  # noqa: S202 - the filter refuses what leads outside
    except tarfile.TarError as error:
        raise PackError(f"the contents of directory {shown(into.name)} cannot be unpacked: {error}") from error
