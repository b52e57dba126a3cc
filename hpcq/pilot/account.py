"""Whose bytes: from what the kernel says of sockets, look after look, to what each task sent and received. Pure.

A `Table` has the sockets of one namespace, an `Account` the sums of all. Each look gives the sockets that are, those
that ended since the look before, and who has what; what a socket has counted since the look before goes to the task at
work in the lane (see `core`) that has it::

    seen in a look with a process that has it --> the lane's, until it ends
    never seen so (it came and went between two looks) --> the only task at work then, if there was one; else *missed*
    a process has it, and none of a lane's for `TRIES` looks --> nobody's: CVMFS, inputs, probes

A task during which more was missed than is its own is told nothing: what it would be told might be far from the truth.
May not live here: when looks are taken, and what is there to see (`traffic`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from hpcq.pilot.sockdiag import Flow

TRIES = 3
"""Looks in which a socket's owner is searched for: it may be on its way from one process to another."""

FORGOTTEN = 100
"""Looks after which a socket that is gone, and was not told to have ended, is not waited for any more."""

NOBODY, MISSED = -1, -2


class Traffic(NamedTuple):
    """Bytes."""

    sent: int = 0
    received: int = 0


NO_TRAFFIC = Traffic()


class Span(NamedTuple):
    """A task that was at work since the look before, and from when on, in seconds of any clock: until the next one of
    its lane, for what it leaves behind takes a moment to end.
    """

    task: int
    lane: int
    since: float


class Account:
    """Sums: ``total`` of all, ``missed`` of both directions; ``tasks`` of those that were not told yet."""

    def __init__(self) -> None:
        self.total = NO_TRAFFIC
        self.missed = 0
        self.tasks: dict[int, Traffic] = {}
        self._told = 0
        self._missed_before: dict[int, int] = {}

    def begin(self, tasks: Iterable[int]) -> None:
        """These run, or did since the look before."""
        for task in tasks:
            self._missed_before.setdefault(task, self.missed)

    def has_begun(self, task: int) -> bool:
        """Whether it is known."""
        return task in self._missed_before

    def add(self, task: int | None, sent: int, received: int) -> None:
        """These bytes more, of a task or of nobody."""
        self.total = Traffic(self.total.sent + sent, self.total.received + received)
        if task is not None:
            before = self.tasks.get(task, NO_TRAFFIC)
            self.tasks[task] = Traffic(before.sent + sent, before.received + received)

    def take(self, task: int) -> Traffic | None:
        """What a task is told when it has ended; None when too much was missed."""
        traffic = self.tasks.pop(task, NO_TRAFFIC)
        if self.missed - self._missed_before.pop(task, self.missed) > sum(traffic):
            return None
        self._told += sum(traffic)
        return traffic

    def keep(self, tasks: Set[int]) -> None:
        """Others than these are never told."""
        for kept in (self.tasks, self._missed_before):
            for task in kept.keys() - tasks:
                del kept[task]

    @property
    def unattributed(self) -> int:
        """Bytes in both directions that were no task's, or none that is told."""
        return sum(self.total) - self._told - sum(map(sum, self.tasks.values()))


class Known:
    """A socket; ``owner`` is a lane, `NOBODY`, `MISSED`, or None while it is looked for."""

    __slots__ = ("absent", "owner", "received", "sent", "tries")

    def __init__(self) -> None:
        self.owner: int | None = None
        self.sent = self.received = 0
        self.tries = self.absent = 0


_NEW = Known()


class Table:
    """The sockets of one namespace."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._known: dict[int, Known] = {}
        self.news = False
        """Whether the last look found a connection that was not there before."""

    def wanted(self, flows: Iterable[Flow]) -> set[int]:
        """The inodes whose owner is looked for."""
        return {flow.inode for flow in flows if flow.inode and self._known.get(flow.cookie, _NEW).owner is None}

    def look(
        self,
        flows: Iterable[Flow],
        ended: Iterable[tuple[float, Flow]],
        owners: Mapping[int, int],
        heads: Mapping[int, int],
        spans: Sequence[Span],
    ) -> None:
        """One look: the sockets there are, those that ended (with the time of that) since the look before, inode to
        lane, lane to task; ``spans`` are all tasks at work meanwhile, none if others were too.
        """
        before = self._known.keys() | ()
        for one in self._known.values():
            one.absent += 1
        for flow in flows:
            one = self._known.setdefault(flow.cookie, Known())
            one.absent = 0
            closing = self._find_owner(one, flow, owners, spans)
            self._credit(
                one, flow, closing if closing is not None else heads.get(one.owner if one.owner is not None else NOBODY)
            )
        for at, flow in ended:
            one = self._known.pop(flow.cookie) if flow.cookie in self._known else Known()
            task = heads.get(one.owner) if one.owner is not None else _guess(one, alone(spans, at))
            self._credit(one, flow, task)
        self.news = not self._known.keys() <= before
        self._known = {cookie: one for cookie, one in self._known.items() if one.absent < FORGOTTEN}

    def _find_owner(self, one: Known, flow: Flow, owners: Mapping[int, int], spans: Sequence[Span]) -> int | None:
        """Look for it; a task, if that is found without its lane's head."""
        if one.owner is not None:
            return None
        if not flow.inode:  # closed already, and something is on its way still: the first of the tasks that may have it
            lanes = {span.lane for span in spans}
            return _guess(one, min(spans, key=lambda span: span.since) if len(lanes) == 1 else None)
        one.tries += 1
        one.owner = owners.get(flow.inode, NOBODY if one.tries >= TRIES else None)
        return None

    def _credit(self, one: Known, flow: Flow, task: int | None) -> None:
        if one.owner is None:
            return
        sent, received = max(0, flow.sent - one.sent), max(0, flow.received - one.received)
        one.sent, one.received = one.sent + sent, one.received + received
        self._account.add(task, sent, received)
        if one.owner == MISSED:
            self._account.missed += sent + received

    def lanes(self) -> set[int]:
        """Those that have connections."""
        return {one.owner for one in self._known.values() if one.owner is not None and one.owner >= 0}

    def awaited(self) -> set[int]:
        """Lanes with connections that are gone, and whose last bytes are not told yet."""
        return {one.owner for one in self._known.values() if one.absent and one.owner is not None}


def _guess(one: Known, span: Span | None) -> int | None:
    """Settle whose a connection is that no process has any more, ``span`` if anybody's; its task.

    One that was looked for twice, and had a process the first time at least, was not found with a task; one that was
    looked for once may have been closed between the kernel's answer and the look at processes.
    """
    if one.tries > 1:
        one.owner = NOBODY
    elif span is None:
        one.owner = MISSED
    else:
        one.owner = span.lane
        return span.task
    return None


def alone(spans: Iterable[Span], at: float) -> Span | None:
    """The task that was at work then, where they were of one lane only."""
    found = [span for span in spans if span.since <= at]
    if len({span.lane for span in found}) != 1:
        return None
    return max(found, key=lambda span: span.since)
