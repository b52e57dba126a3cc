"""What always holds of a scheduler, for tests."""

from __future__ import annotations

from hpcq.scheduler.machine import Scheduler
from hpcq.scheduler.records import TaskState


def check(scheduler: Scheduler) -> None:
    """Every invariant, for tests: sums agree, nothing is promised twice, nothing is lost between sets."""
    scheduler.placement.check()
    for pilot in scheduler.pilots.values():
        claimed = [record.claimed for record in pilot.claimed.values()]
        assert pilot.free_cores == pilot.cores - sum(needs.cores for needs in claimed) >= 0
        assert pilot.free_memory == pilot.memory - sum(needs.memory for needs in claimed) >= 0
        assert pilot.free_disk == pilot.disk - sum(needs.disk for needs in claimed) >= 0
        assert pilot.free_gpus == pilot.gpus - sum(needs.gpus for needs in claimed) >= 0
        assert not pilot.claimed.keys() & pilot.backlog.keys()
        assert (pilot in scheduler.placement.backlogged) == bool(pilot.backlog)
    for number, record in scheduler.tasks.items():
        assert record.id == number
        assert record.state is not TaskState.DONE
        assert (record.pilot is not None) == (record.state is not TaskState.READY)
        assert record.pilot is None or record.pilot.find(number) is record
        assert record.second is None or (record.second is not record.pilot and number in record.second.claimed)
    ready = [record.id for *_, demand in scheduler.placement.line for record in demand.ready]
    assert sorted(ready) == sorted(r.id for r in scheduler.tasks.values() if r.state is TaskState.READY)
