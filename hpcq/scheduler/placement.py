"""Which waiting task goes to which pilot.

Tasks with the same needs form a `Demand`; demands that have tasks waiting stand in a *line*, sorted by the first task's
priority, then id. Between two steps no waiting demand fits a pilot with room, so a step looks only at what changed:

1. *touched* pilots (something ended there, or they are new): each takes the first in the line that fits, in turns;
2. *fresh* demands (nothing of them waited before): each looks through the pilots with room, from where it stopped;
3. and 4. the same again for what may be sent ahead, once no free place is left.

So a step costs O(touched pilots x different needs waiting + tasks placed x log pilots), whatever the number of tasks
and of other pilots. Here is also the account of every pilot's room: after any change, `touch` it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from hpcq.scheduler.categories import Category
from hpcq.scheduler.events import NewTask
from hpcq.scheduler.needs import Needs
from hpcq.scheduler.pilots import Openings, Pilot, may_be_sent_ahead
from hpcq.scheduler.records import Demand, Place, Record, TaskState

UNUSED_KEPT = 256
"""Demands without tasks that are kept, because the next task often has the same needs."""


class Placement:
    """Who waits, who has room, and the decisions between them. ``on_placed`` hears of every task that is placed."""

    def __init__(self, on_placed: Callable[[Record, Pilot], None]) -> None:
        self.demands: dict[object, Demand] = {}
        self.line: list[Place] = []
        self.waiting = 0
        self.open = Openings()
        self.free_cores = 0
        self.backlogged: dict[Pilot, None] = {}
        self._ahead = Openings()
        self._touched: dict[Pilot, None] = {}
        self._fresh: dict[Demand, None] = {}
        self._unused: dict[Demand, None] = {}
        self._on_placed = on_placed
        self._now = 0.0

    # --- demands ---

    def demand(self, task: NewTask, category: Category) -> Demand:
        """The demand of a new task."""
        needs = Needs.of(task)
        adapts = category.allots and not (task.memory and task.disk)
        key = (needs, category.kind) if adapts else needs
        demand = self.demands.get(key)
        if demand is None:
            demand = self.demands[key] = Demand(needs, key, category if adapts else None)
            if adapts:
                demand.refit()
        return demand

    def raised(self, needs: Needs, level: int) -> Demand:
        """The demand of tasks that get more than they said."""
        key = (needs, level)
        demand = self.demands.get(key)
        if demand is None:
            demand = self.demands[key] = Demand(needs, key, level=level)
        return demand

    def refit(self, category: Category) -> None:
        """What the category allots has changed."""
        for demand in self.demands.values():
            if demand.category is category:
                demand.refit()
                if demand.place is not None:
                    self._fresh[demand] = None

    def adopt(self, record: Record, demand: Demand) -> None:
        """The record counts under this demand from now on."""
        if not demand.alive:
            self._unused.pop(demand, None)
        demand.alive += 1
        record.demand = demand

    def dismiss(self, record: Record) -> None:
        """The record counts no more."""
        demand = record.demand
        demand.alive -= 1
        if not demand.alive:
            self._unused[demand] = None
            if len(self._unused) > UNUSED_KEPT:
                oldest = next(iter(self._unused))
                del self._unused[oldest], self.demands[oldest.key]

    def add(self, record: Record, *, first: bool = False) -> None:
        """It waits: behind its equals or, having waited before, in front of them."""
        demand = record.demand
        if first:
            demand.ready.add_first(record)
        else:
            demand.ready.add(record)
        self.waiting += 1
        place = demand.place
        if place is None:
            self._fresh[demand] = None
            self._move(demand)
        elif first or -record.priority < place[0]:
            self._move(demand)

    def discard(self, record: Record) -> None:
        """It does not wait any more, without having been placed; its state says so already."""
        record.demand.ready.discard(record)
        self.waiting -= 1
        self._move(record.demand)

    def _move(self, demand: Demand) -> None:
        """Put the demand where its first task belongs in the line."""
        line, old = self.line, demand.place
        new: Place | None = None
        if len(demand.ready):
            head = demand.ready.head()
            new = (-head.priority, head.id, demand)
        demand.place = new
        if old is None:
            if new is not None:
                insort(line, new)
            return
        at = bisect_left(line, old)
        if new is None:
            del line[at]
        elif (not at or line[at - 1] < new) and (at + 1 == len(line) or new < line[at + 1]):
            line[at] = new
        else:
            del line[at]
            insort(line, new)

    # --- pilots ---

    def touch(self, pilot: Pilot) -> None:
        """Something about its room has changed."""
        self._touched[pilot] = None
        if not pilot.usable:
            self._list(pilot)

    def look_later(self, pilot: Pilot) -> None:
        """Others that hold something in advance are looked at before this one."""
        del self.backlogged[pilot]
        self.backlogged[pilot] = None

    def remove(self, pilot: Pilot) -> None:
        """It is gone."""
        pilot.draining = True
        self._touched.pop(pilot, None)
        self._list(pilot)
        self.backlogged.pop(pilot, None)

    def _list(self, pilot: Pilot) -> None:
        """Enter the pilot where its room now allows."""
        usable = pilot.usable
        if usable and pilot.free_cores and not pilot.backlog:
            self.open.put(pilot)
            free = pilot.free_cores
        else:
            self.open.drop(pilot)
            free = 0
        self.free_cores += free - pilot.listed
        pilot.listed = free
        if usable and pilot.load < 1 and not pilot.asked_back:
            self._ahead.put(pilot)
        else:
            self._ahead.drop(pilot)
        if pilot.backlog:
            self.backlogged[pilot] = None
        else:
            self.backlogged.pop(pilot, None)

    # --- decisions ---

    def place(self, now: float) -> None:
        """Place what can be placed after what has changed since the last time."""
        self._now = now
        touched, self._touched = self._touched, {}
        fresh, self._fresh = self._fresh, {}
        if self.line:
            self._serve(touched, ahead=False)
            stuck = self._spread(fresh, ahead=False)
            if self.line:
                self._serve(touched, ahead=True)
                self._spread(stuck, ahead=True)
        for pilot in touched:
            self._list(pilot)

    def _serve(self, pilots: dict[Pilot, None], *, ahead: bool) -> None:
        """Let pilots take from the line, in turns."""
        turns = deque(pilot for pilot in pilots if pilot.usable)
        while turns and self.line:
            pilot = turns.popleft()
            if self._take_first_held_ahead(pilot) if ahead else self._take_first(pilot):
                turns.append(pilot)

    def _take_first(self, pilot: Pilot) -> bool:
        if not pilot.free_cores or pilot.backlog:
            return False
        for _, _, demand in self.line:
            if pilot.can_now(demand.needs, self._now):
                self._assign(demand, pilot, None)
                return True
        return False

    def _take_first_held_ahead(self, pilot: Pilot) -> bool:
        if pilot.asked_back or pilot.load >= 1:
            return False
        for _, _, demand in self.line:
            weight = pilot.weight(demand)
            if weight is not None and pilot.admits(weight) and pilot.could_ever(demand.needs, self._now):
                self._assign(demand, pilot, weight)
                return True
        return False

    def _spread(self, demands: dict[Demand, None], *, ahead: bool) -> dict[Demand, None]:
        """Let demands look for pilots, the first in the line first; returns those that have tasks left."""
        stuck: dict[Demand, None] = {}
        heap = [demand.place for demand in demands if demand.place is not None]
        heapify(heap)
        search = self._search_ahead if ahead else self._search_open
        while heap:
            demand = heappop(heap)[2]
            if not search(demand):
                stuck[demand] = None
            elif demand.place is not None:
                heappush(heap, demand.place)
        return stuck

    def _search_open(self, demand: Demand) -> bool:
        needs, now = demand.needs, self._now
        pilot, demand.seen = self.open.find(demand.seen, lambda pilot: pilot.can_now(needs, now))
        if pilot is None:
            return False
        self._assign(demand, pilot, None)
        self._list(pilot)
        return True

    def _search_ahead(self, demand: Demand) -> bool:
        needs, now = demand.needs, self._now

        def accept(pilot: Pilot) -> bool:
            weight = pilot.weight(demand)
            return weight is not None and pilot.admits(weight) and pilot.could_ever(needs, now)

        if not may_be_sent_ahead(demand):
            return False  # not to any pilot: no need to ask them all
        pilot, demand.seen_ahead = self._ahead.find(demand.seen_ahead, accept)
        if pilot is None:
            return False
        self._assign(demand, pilot, pilot.weight(demand))
        self._list(pilot)
        return True

    def _assign(self, demand: Demand, pilot: Pilot, weight: float | None) -> None:
        record = demand.ready.pop()
        self.waiting -= 1
        record.move("place", TaskState.ASSIGNED, self._now)
        record.pilot = pilot
        pilot.take(record, demand.needs, weight)
        self._move(demand)
        self._on_placed(record, pilot)

    def check(self) -> None:
        """Every invariant, for tests."""
        assert self.line == sorted(self.line)
        assert {id(d) for *_, d in self.line} == {id(d) for d in self.demands.values() if len(d.ready)}
        assert all(demand.place == place for place in self.line for demand in [place[2]])
        assert self.waiting == sum(len(demand.ready) for demand in self.demands.values())
        assert self.free_cores == sum(pilot.free_cores for pilot in self.open)
        assert set(self._unused) == {demand for demand in self.demands.values() if not demand.alive}
        for _, _, demand in self.line:
            assert not any(pilot.can_now(demand.needs, self._now) for pilot in self.open), "room, and it waits"
