"""Payloads too large for a message: where they are while they are on their way.

A *parcel* holds the pieces of one payload: the pickle and the buffers that were kept out of it (PEP 574), each at an
aligned offset. It is written once, read by threads and mapped by whoever unpickles it: privately, so that arrays point
into the mapping without a copy, are writable, and are still nobody else's.

::

    manager:  < LARGE       memory without a name or a descriptor: there may be many thousands
              >= LARGE      a file in memory (memfd), until all of them hold `Shelf.memory` bytes; then a file on disk
    pilot:    any size      the same two, always with a descriptor, which the runner is given

Files have no name from the beginning, and what nobody refers to any more is freed, so nothing is left by whoever is
killed. May not live here: sockets, pickling.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LARGE = 32 << 20
"""Bytes from which on a parcel of the manager is a file."""

ALIGNMENT = 64
"""Bytes: what arrays want, and a line of the processor's cache."""

STEP = 1 << 18
"""Bytes copied at a time: what stays in a processor's cache between receiving and writing."""

Buffer = bytes | memoryview


class Pieces(NamedTuple):
    """A payload that will be a parcel: its pickle, as it was written, and the buffers left out of it."""

    pickle: list[bytes]
    buffers: list[memoryview]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each piece, the pickle being the first."""
        return [sum(map(len, self.pickle)), *(buffer.nbytes for buffer in self.buffers)]


class Load(NamedTuple):
    """A parcel, and where its pieces are in it."""

    parcel: Parcel
    sizes: list[int]

    def views(self) -> list[memoryview]:
        """The pieces; see `Parcel.views`."""
        return self.parcel.views(self.sizes)


def total_size(sizes: Iterable[int]) -> int:
    """Bytes of the parcel of pieces of these sizes."""
    return sum(map(_padded, sizes)) or ALIGNMENT  # nothing at all cannot be mapped


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Parcel:
    """``size`` bytes in a file without a name, or in plain memory (``descriptor`` is -1).

    Raises OSError from whatever writes: no space where it is.
    """

    def __init__(self, size: int, descriptor: int) -> None:
        self.size = size
        self.descriptor = descriptor
        self.shelf: Shelf | None = None
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE) if descriptor < 0 else None

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
        if self.shelf is not None:
            self.shelf.freed(self.size)

    def write(self, offset: int, data: Buffer) -> None:
        """Put bytes where they belong."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), 16 * STEP):  # others may have the interpreter between two steps
            self._write(offset + start, view[start : start + 16 * STEP])

    def _write(self, offset: int, view: memoryview) -> None:
        if self._memory is not None:
            self._memory[offset : offset + len(view)] = view
            return
        while view:
            done = os.pwrite(self.descriptor, view, offset)
            offset, view = offset + done, view[done:]

    def fill(self, pieces: Pieces) -> None:
        """Write all pieces."""
        offset = 0
        for part in pieces.pickle:
            self.write(offset, part)
            offset += len(part)
        offset = _padded(offset)
        for buffer in pieces.buffers:
            self.write(offset, buffer)
            offset += _padded(buffer.nbytes)

    def read(self, offset: int, room: memoryview) -> memoryview:
        """At most so many bytes from there, in ``room`` or where they are."""
        if self._memory is not None:
            return memoryview(self._memory)[offset : min(offset + len(room), self.size)]
        done = os.preadv(self.descriptor, [room[: self.size - offset]], offset)
        if not done and offset < self.size:
            raise OSError(f"a parcel of {self.size} bytes ends at {offset}")
        return room[:done]

    def views(self, sizes: Sequence[int]) -> list[memoryview]:
        """The pieces, writable; what is written there shows nowhere else. They live as long as they are referred to.

        Raises:
            ValueError: they do not lie in it.
        """
        if total_size(sizes) > self.size or min(sizes, default=0) < 0:
            raise ValueError(f"pieces of {total_size(sizes)} bytes in a parcel of {self.size}")
        whole = memoryview(self._memory or mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_PRIVATE))
        views, offset = [], 0
        for size in sizes:
            views.append(whole[offset : offset + size])
            offset += _padded(size)
        return views


class Shelf:
    """Makes parcels, and knows how much memory they hold. May be used by many threads.

    Args:
        memory: bytes that parcels may hold in memory; what comes then is put on disk.
        directory: where on disk (None: the directory for temporary files).
        described: every parcel has a descriptor.
    """

    def __init__(self, memory: int, directory: Path | None = None, *, described: bool = False) -> None:
        self.memory = memory
        self.held = 0
        self._directory = directory
        self._described = described
        self._lock = threading.RLock()  # a parcel may be freed while this thread makes another

    def new(self, size: int) -> Parcel:
        """An empty parcel.

        Raises:
            OSError: it cannot be made.
        """
        if size < LARGE and not self._described:
            return Parcel(size, -1)
        on_disk = self.is_full(size)
        return self._counted(new_file(size, on_disk, self._directory), on_disk)

    def adopt(self, descriptor: int, on_disk: bool) -> Parcel:
        """A parcel that somebody else has written."""
        return self._counted(Parcel(os.fstat(descriptor).st_size, descriptor), on_disk)

    def _counted(self, parcel: Parcel, on_disk: bool) -> Parcel:
        if not on_disk:
            parcel.shelf = self
            with self._lock:
                self.held += parcel.size
        return parcel

    def is_full(self, size: int = 0) -> bool:
        """Whether so much more would have to go to disk."""
        return self.held + size > self.memory

    def store(self, pieces: Pieces) -> Parcel:
        """A parcel with these pieces.

        Raises:
            OSError: it cannot be written.
        """
        parcel = self.new(total_size(pieces.sizes))
        parcel.fill(pieces)
        return parcel

    def freed(self, size: int) -> None:
        """A parcel in memory is gone."""
        with self._lock:
            self.held -= size


def _on_disk(directory: Path | None) -> int:
    """A file without a name, of file systems that cannot do that as well."""
    import tempfile  # noqa: PLC0415 - runners rarely need it

    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        return os.dup(file.fileno())


def new_file(size: int, on_disk: bool, directory: Path | None = None) -> Parcel:
    """An empty parcel with a descriptor, in memory or in a file on disk; nobody counts it.

    Raises:
        OSError: it cannot be made.
    """
    parcel = Parcel(size, _on_disk(directory) if on_disk else os.memfd_create("hpcq-parcel", os.MFD_CLOEXEC))
    os.ftruncate(parcel.descriptor, size)
    return parcel
