"""A directory as one stream of bytes, the same each time, and back.

The stream is a tar archive with sorted names and without owners and times. Links that stay inside are kept as links;
in a directory the user gave, a link to a file elsewhere is sent as that file. Anything else that is neither a file nor
a directory is refused by name. Unpacking trusts nothing: see `unpack`.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hpcq.errors import UsageError
from hpcq.files import names
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
    """Make the directory ``into`` from an archive. The archive is not trusted.

    Raises:
        OSError: it cannot be written; or the archive has a name or link that leads outside, or anything but files,
            directories and links.
    """
    into.mkdir(mode=0o755)
    root = into.resolve()
    try:
        with tarfile.open(fileobj=archive, mode="r|", bufsize=CHUNK) as tar:
            for member in tar:
                _make(tar, member, root)
    except tarfile.TarError as error:
        raise PackError(f"the contents of directory {shown(into.name)} cannot be unpacked: {error}") from error


def _make(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    try:
        path = root / names.checked(member.name)
    except UsageError as error:
        raise PackError(str(error)) from error
    if path.parent.resolve() != path.parent:  # it would be reached through a link
        raise PackError(f"{shown(member.name)} lies behind a link")
    if member.isdir():
        path.mkdir(mode=0o755)
    elif member.issym():
        if not _stays_inside(path.parent, member.linkname, root):
            raise PackError(f"{shown(member.name)} is a link that leads outside, to {shown(member.linkname)}")
        path.symlink_to(member.linkname)
    elif member.isreg():
        _make_file(tar, member, path)
    else:
        raise PackError(f"{shown(member.name)} is neither a file, a directory nor a link")


def _stays_inside(parent: Path, target: str, root: Path) -> bool:
    """Whether a link does, given that all others do: ``..`` may only come first, where no link can be before it."""
    parts = target.split("/")
    climbs = next((index for index, part in enumerate(parts) if part != ".."), len(parts))
    leads_to = os.path.normpath(os.path.join(parent, target))
    return not target.startswith("/") and ".." not in parts[climbs:] and _is_inside(leads_to, str(root))


def _make_file(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    contents = tar.extractfile(member)
    assert contents is not None
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o755 if member.mode & 0o100 else 0o644), "wb", buffering=0) as file:
        shutil.copyfileobj(contents, file, CHUNK)
