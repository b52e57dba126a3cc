"""Outputs in a sandbox: found, checked, read. What a task left there is not trusted.

An output must be a regular file or a directory that, with all links resolved, lies inside the sandbox. It is opened
first and checked by what was opened, so nothing that changes meanwhile leads outside. Blocking; called in threads.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from hpcq.errors import UsageError
from hpcq.files import digests, names, pack
from hpcq.files.names import shown

SHOWN = 8


class OutputError(Exception):
    """Why a declared output cannot be had; names it."""


class Output(NamedTuple):
    """One that can be read. ``descriptor`` is to be closed by whoever opened it."""

    name: str
    path: str
    descriptor: int
    kind: str
    executable: bool

    def chunks(self) -> Iterator[bytes]:
        """Its content.

        Raises:
            OSError: it cannot be read; a directory has something that cannot be sent.
        """
        if self.kind == "dir":
            return pack.chunks(f"/proc/self/fd/{self.descriptor}", follow=False)
        return digests.file_chunks(self.descriptor)


def open_output(sandbox: str, name: str) -> Output:
    """The output ``name`` of the task that ran in ``sandbox``.

    Raises:
        OutputError: it is missing, leads outside, or is neither a file nor a directory.
    """
    try:
        names.checked(name)
    except UsageError as error:
        raise OutputError(f"output {name!r}: {error}") from error
    path = os.path.join(sandbox, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise OutputError(_missing(sandbox, name)) from error
    except OSError as error:
        raise OutputError(f"output {name!r} cannot be read: {error.strerror}") from error
    try:
        return _checked(sandbox, name, descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def _checked(sandbox: str, name: str, descriptor: int) -> Output:
    real = os.readlink(f"/proc/self/fd/{descriptor}")
    if not real.startswith(os.path.realpath(sandbox) + "/"):
        raise OutputError(f"output {name!r} is a link that leads out of the sandbox, to {shown(real)}")
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        return Output(name, real, descriptor, "dir", False)
    if not stat.S_ISREG(mode):
        raise OutputError(f"output {name!r} is neither a file nor a directory")
    return Output(name, real, descriptor, "file", bool(mode & 0o100))


def _missing(sandbox: str, name: str) -> str:
    if os.path.islink(os.path.join(sandbox, name)):
        return f"output {name!r} is a link that leads nowhere"
    there = sorted(os.listdir(sandbox))
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    listed = ", ".join(repr(shown(item)) for item in there[:SHOWN]) + more
    return f"output {name!r} is missing: the task did not write it; its sandbox has {listed or 'nothing'}"
