"""IPv4 datagrams put together from fragments (RFC 791) as a device of the gateway's namespace has them. Pure.

The kernel of that namespace has put each datagram together already, for its packet filter, and takes it apart again
as it was: so the fragments of one come in their order, and none overlaps another. What does not come so is dropped.
Between them may come those of others, ``PENDING`` datagrams at most; of more the oldest is dropped.
"""

from __future__ import annotations

import collections

PENDING = 64
LONGEST = 65535  # bytes of a packet
_MORE, _OFFSET = 0x2000, 0x1FFF


class Fragments:
    """Datagrams whose ends are yet to come."""

    def __init__(self) -> None:
        self._parts: collections.OrderedDict[bytes, bytearray] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, raw: bytes) -> bytes | None:
        """A packet that is whole, by this one or by itself; None when it is not yet, or is malformed."""
        start, total = (raw[0] & 15) * 4 if raw else 0, int.from_bytes(raw[2:4])
        if len(raw) < 20 or raw[0] >> 4 != 4 or not 20 <= start <= total <= len(raw):
            return None
        field = int.from_bytes(raw[6:8])
        more, offset = field & _MORE, (field & _OFFSET) * 8
        if not more and not offset:
            return raw
        key = raw[4:6] + raw[9:10] + raw[12:20]  # identification, protocol, addresses
        whole = bytearray(raw[:total]) if not offset else self._continued(key, offset, raw[start:total])
        self._parts.pop(key, None)
        if whole is None:
            return None
        if more:
            self._parts[key] = whole
            if len(self._parts) > PENDING:
                self._parts.popitem(last=False)
            return None
        whole[2:4], whole[6:8] = len(whole).to_bytes(2), bytes(2)
        return bytes(whole)

    def _continued(self, key: bytes, offset: int, data: bytes) -> bytearray | None:
        """What there is of a datagram, with its next part; None when it is not that."""
        whole = self._parts.get(key)
        if whole is None or offset != len(whole) - (whole[0] & 15) * 4 or len(whole) + len(data) > LONGEST:
            return None
        return whole + data
