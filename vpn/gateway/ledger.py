"""What the gateway's processes have sent of the bandwidth they share, in memory they share.

The daemon makes it (``open_ledger``) and each process that carries bytes has a place of its own in it, which nobody
else writes: so there is no lock that one of them could keep when it dies or is stopped. ``Ledger.buckets`` are one
limit for all of them together (``SharedBucket``).
"""

from __future__ import annotations

import mmap
import os

from vpn.relay.bucket import SharedBucket

RELAY, PLANE = 0, 1  # the places
_PLACES = 2
_SIZE = mmap.PAGESIZE


def open_ledger() -> int:
    """A new one: a descriptor the caller closes."""
    fd = os.memfd_create("bandwidth")
    os.ftruncate(fd, _SIZE)
    return fd


class Ledger:
    """The ledger of a descriptor, seen from a place; the descriptor may be closed after that."""

    def __init__(self, fd: int, place: int) -> None:
        self._numbers = memoryview(mmap.mmap(fd, _SIZE)).cast("d")
        self._place = place

    def buckets(self, rate: float) -> tuple[SharedBucket, SharedBucket]:
        """Up and down, each ``rate`` bytes a second for all places together."""
        up, down = (self._numbers[start : start + _PLACES] for start in (0, _PLACES))
        return SharedBucket(rate, up, self._place), SharedBucket(rate, down, self._place)
