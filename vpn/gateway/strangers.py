"""The log of what strangers do: whoever can reach the gateway's ports can have it write lines, but not fill a disk.

``log`` is the logger for all that somebody without a credential can cause, ocserv's own words included. Of each *kind*
of line (its words, without what is quoted, in brackets, or a number) a burst is written, then few; the next that is
written says how many are missing. There are at most `KINDS`, however much is made up. What cannot be printed is not
written: a log is read on terminals.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

BURST = 200
"""Lines of a kind that are written as they come,"""
EVERY = 2.0
"""and then one in so many seconds."""
KINDS = 50
_OTHER = "other"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)")
_NUMBER = re.compile(r"\S*\d\S*")


class Flood:
    """How many lines of each kind may still be written. Pure: ``now`` in seconds of any steady clock."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, float, int]] = {}  # lines still allowed, when that was, those left out

    def admit(self, text: str, now: float) -> int | None:
        """How many lines of this kind were left out before this one, or None: it is to be left out, too."""
        kind = _NUMBER.sub("", _QUOTED.sub("", text))
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            kind = _OTHER
        allowed, at, missing = self._kinds.get(kind, (float(BURST), now, 0))
        allowed = min(float(BURST), allowed + (now - at) / EVERY)
        if allowed < 1:
            self._kinds[kind] = allowed, now, missing + 1
            return None
        self._kinds[kind] = allowed - 1, now, 0
        return missing


class Filter(logging.Filter):
    """Holds a logger to what `Flood` admits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._flood = Flood()
        self._clock = clock

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is written; what is written is made printable, and says what is missing."""
        text = record.getMessage()
        missing = self._flood.admit(text, self._clock())
        record.msg, record.args = printable(text), ()
        if missing:
            record.msg += f" ({missing} more like this are not shown)"
        return missing is not None


def printable(text: str) -> str:
    """The text with a mark for whatever a terminal could take for a command, or a reader for another line."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


log = logging.getLogger("vpn.gateway.strangers")
log.addFilter(Filter())
