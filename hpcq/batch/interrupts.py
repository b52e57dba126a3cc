"""Ctrl-C in the middle of a submission: a command that is cut off may leave jobs behind that nobody knows of."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

log = logging.getLogger("hpcq.batch")


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Have Ctrl-C heard at the end of the block only; a second one is heard at once.

    Elsewhere than in the main thread, which alone is interrupted, and where a program handles SIGINT in a way of its
    own, nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    heard = False

    def hear(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            raise KeyboardInterrupt
        heard = True
        log.warning(
            "waiting for the batch system's answer; Ctrl-C again leaves jobs behind that may have been submitted"
        )

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if heard:
            raise KeyboardInterrupt
