"""CPU time of a tree of processes."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import psutil


def tree_seconds(root: int, without: Collection[int] = ()) -> float:
    """CPU seconds, user and system, that ``root`` and its descendants have used, those that ended and were waited for
    included; the trees of ``without`` are left out.
    """
    total = 0.0
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        if pid in without:
            continue
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            waiting += [child.pid for child in process.children()]
            used = process.cpu_times()
            total += used.user + used.system + used.children_user + used.children_system
    return total
