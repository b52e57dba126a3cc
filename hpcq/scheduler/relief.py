"""What idle pilots can take over of that which was sent ahead to others and is stuck there."""

from __future__ import annotations

from hpcq.scheduler.needs import Needs
from hpcq.scheduler.pilots import Pilot
from hpcq.scheduler.records import Record, TaskState


class Relief:
    """The room of idle pilots, used up as tasks are found for it."""

    def __init__(self, takers: list[Pilot], now: float) -> None:
        self._room = {taker: taker.free_cores for taker in takers}
        self._hopeless: set[int] = set()
        self._now = now

    def movable(self, pilot: Pilot) -> list[Record]:
        """What waits on this pilot and could begin elsewhere, the last first."""
        wanted = []
        for record in reversed(pilot.backlog.values()):
            if not self._room:
                break
            if record.state is TaskState.ASSIGNED and self._claim(record.claimed):
                wanted.append(record)
        return wanted

    def _claim(self, needs: Needs) -> bool:
        if id(needs) in self._hopeless:
            return False
        for taker, cores in self._room.items():
            if cores >= needs.cores and taker.can_now(needs, self._now):
                self._room[taker] -= needs.cores
                if cores == needs.cores:
                    del self._room[taker]
                return True
        self._hopeless.add(id(needs))
        return False
