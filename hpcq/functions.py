"""Which function bodies are in use and which pilot has which. Pure; the manager performs what it says.

A body is kept while a task that is not done refers to it, and after that as one of the `KEPT` last used, since the
next submit most often names the same function. When it goes, the pilots that have it are told to forget it too.
"""

from __future__ import annotations

from collections import OrderedDict

from hpcq.messages import FunctionBody

KEPT = 256


class Functions:
    """Bodies by digest, with the number of tasks that need each."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._bodies: dict[bytes, bytes] = {}
        self._users: dict[bytes, int] = {}
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        self._known: dict[str, set[bytes]] = {}
        self._to_forget: dict[str, list[bytes]] = {}

    def __len__(self) -> int:
        return len(self._bodies)

    def size(self, key: bytes) -> int:
        """Bytes of a body; 0 for none."""
        return len(self._bodies.get(key, b""))

    def acquire(self, key: bytes, body: bytes) -> None:
        """One more task needs this body."""
        if key in self._users:
            self._users[key] += 1
        else:
            self._bodies[key] = body
            self._users[key] = 1
            self._unused.pop(key, None)

    def release(self, key: bytes) -> None:
        """One task less needs it."""
        left = self._users[key] - 1
        if left:
            self._users[key] = left
            return
        del self._users[key]
        self._unused[key] = None
        while len(self._unused) > self._kept:
            self._drop(self._unused.popitem(last=False)[0])

    def _drop(self, key: bytes) -> None:
        del self._bodies[key]
        for pilot, known in self._known.items():
            if key in known:
                known.discard(key)
                self._to_forget.setdefault(pilot, []).append(key)

    def missing(self, pilot: str, keys: set[bytes]) -> list[FunctionBody]:
        """The bodies among ``keys`` that the pilot lacks; it is taken to have them from now on."""
        known = self._known.setdefault(pilot, set())
        lacking = keys - known
        known |= lacking
        return [FunctionBody(key, self._bodies[key]) for key in lacking]

    def to_forget(self, pilot: str) -> list[bytes]:
        """The bodies this pilot has and nobody needs; each is named once."""
        known = self._known.get(pilot, set())  # one that was dropped and has just been sent again is needed
        return [key for key in self._to_forget.pop(pilot, []) if key not in known]

    def pilot_gone(self, pilot: str) -> None:
        """It has nothing any more."""
        self._known.pop(pilot, None)
        self._to_forget.pop(pilot, None)
