"""What the standard library does at each fork for the sake of other threads, left out while there are none.

``threading`` and ``logging`` make their locks anew in a child, because a thread that is not there any more may have
held them. In a process of one thread nobody can have; yet to do it costs a child some 180 page faults, a fifth of what
a small task in a fork costs. So a runner for such tasks lets these two register their hooks here.
May not live here: hooks that a process of one thread needs, such as that of ``random``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

CONCERN_THREADS = frozenset({"threading", "logging"})
"""Modules whose hooks are about other threads only."""

Hook = Callable[[], Any]


class ThreadHooks:
    """Hooks that are called at a fork if the process has more than one thread, in the order that Python has for them:
    those before it from the last to the first, those after it from the first to the last.
    """

    def __init__(self, threads: Callable[[], int]) -> None:
        self._threads = threads
        self._before: list[Hook] = []
        self._in_parent: list[Hook] = []
        self._in_child: list[Hook] = []
        self._called = False

    def add(
        self, *, before: Hook | None = None, after_in_parent: Hook | None = None, after_in_child: Hook | None = None
    ) -> None:
        """Take what is meant for ``os.register_at_fork``."""
        for hooks, hook in (
            (self._before, before),
            (self._in_parent, after_in_parent),
            (self._in_child, after_in_child),
        ):
            if hook is not None:
                hooks.append(hook)

    def before(self) -> None:
        """A fork comes. What is decided now holds for what comes after it: who took a lock gives it back."""
        self._called = self._threads() > 1
        if self._called:
            for hook in reversed(self._before):
                hook()

    def in_parent(self) -> None:
        """A fork was made, and we are who made it."""
        if self._called:
            for hook in self._in_parent:
                hook()

    def in_child(self) -> None:
        """A fork was made, and we are what it made."""
        if self._called:
            for hook in self._in_child:
                hook()


def install() -> None:
    """Import the modules concerned and keep their hooks; one that is imported already has registered them itself."""
    hooks = ThreadHooks(lambda: len(sys._current_frames()))
    os.register_at_fork(before=hooks.before, after_in_parent=hooks.in_parent, after_in_child=hooks.in_child)
    register = os.register_at_fork

    def keep(**given: Hook) -> None:
        theirs = sys._getframe(1).f_globals.get("__name__") in CONCERN_THREADS
        (hooks.add if theirs else register)(**given)

    os.register_at_fork = keep  # type: ignore[assignment]
    try:
        import logging  # noqa: PLC0415, F401
        import threading  # noqa: PLC0415, F401
    finally:
        os.register_at_fork = register
