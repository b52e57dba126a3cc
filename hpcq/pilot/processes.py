"""Finding and ending all that descends from a process, and not a process more.

Descendants are read from ``/proc/PID/task/TID/children``: a few files for a small tree, where a look at every process
of the node would cost more than many tasks. In a tunnel's namespace ``/proc`` still shows the node's numbers; those
are translated to our own (``NSpid``) before anything is signalled.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator

DEATH_TIMEOUT_MS = 2000
"""Milliseconds a killed process has to die; one in uninterruptible sleep may take longer and is looked at again."""


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - called for every process
            return file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""


def _children(pid: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - called for every process
    except OSError:
        return []
    return [int(child) for thread in threads for child in _read(f"/proc/{pid}/task/{thread}/children").split()]


def descendants(pid: int) -> list[int]:
    """All that descends from ``pid``, zombies included, by the numbers that ``/proc`` has."""
    if not os.path.exists(f"/proc/{pid}/task/{pid}/children"):  # noqa: PTH110 - a kernel without CONFIG_PROC_CHILDREN
        return _descendants_by_search(pid)
    found: list[int] = []
    pending = [pid]
    while pending:
        children = _children(pending.pop())
        found += children
        pending += children
    return found


def _descendants_by_search(pid: int) -> list[int]:
    import psutil  # noqa: PLC0415 - runners rarely need it

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def _fields(pid: int | str) -> dict[str, str]:
    lines = _read(f"/proc/{pid}/status").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _living(pids: list[int]) -> Iterator[int]:
    """Those that are not zombies, which are done whoever has to reap them, by the numbers of our own namespace."""
    depth = len(_fields("self").get("NSpid", "").split()) - 1
    for pid in pids:
        fields = _fields(pid)
        if fields and not fields.get("State", "").startswith(("Z", "X")):
            yield int(fields["NSpid"].split()[depth]) if depth > 0 else pid


def kill_descendants(pid: int, handle: int | None = None) -> None:
    """Kill all that descends from ``pid``, again and again until nothing is left that could have forked meanwhile.

    With a ``handle`` (pidfd) of it, nothing is killed once it has ended: its number may be another process's by then.
    """

    def find() -> list[int]:
        found = list(_living(descendants(pid)))
        return found if handle is None or _lives(handle) else []

    _kill_all(find)


def _lives(handle: int) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return not poll.poll(0)


def kill_own_descendants() -> None:
    """The same for this process, in whatever namespace."""
    kill_descendants(int(os.readlink("/proc/self")))  # noqa: PTH115


def kill_session(leader: int) -> None:
    """Kill what is left of the session of a process that has ended; its orphans are no longer its descendants."""
    _kill_all(lambda: _members(leader))


def _kill_all(find: Callable[[], list[int]]) -> None:
    for _ in range(100):
        alive = find()
        if not alive:
            return
        _kill(alive)


def _members(session: int) -> list[int]:
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - names only
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if name.isdecimal() and os.getsid(int(name)) == session:
                found.append(int(name))
    return list(_living(found))


def _kill(pids: list[int]) -> None:
    poll = select.poll()
    handles = []
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                handle = os.pidfd_open(pid)
                handles.append(handle)
                signal.pidfd_send_signal(handle, signal.SIGKILL)
                poll.register(handle, select.POLLIN)
        left = len(handles)
        while left > 0 and (dead := poll.poll(DEATH_TIMEOUT_MS)):
            for handle, _event in dead:
                poll.unregister(handle)
            left -= len(dead)
    finally:
        for handle in handles:
            os.close(handle)


def kill_tree(pid: int, handle: int | None = None) -> None:
    """Kill ``pid``, of which ``handle`` is a pidfd if there is one, and all that descends from it.

    It is stopped first, so that it starts nothing new; orphans of its children stay its own, since it is their reaper.
    """
    with contextlib.ExitStack() as stack, contextlib.suppress(ProcessLookupError, PermissionError):
        if handle is None:
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        kill_descendants(pid, handle)
        signal.pidfd_send_signal(handle, signal.SIGKILL)


def pin_tree(pid: int, cpus: tuple[int, ...]) -> None:
    """Let ``pid``, its descendants and all their threads run on these CPUs only."""
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):  # noqa: PTH208
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), cpus)
