"""What the manager tells those who ask: clients of the command line, and the user's own thread.

The functions read the scheduler's and the roster's state, so they are called in the manager's thread only.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from hpcq import messages as m
from hpcq import transport
from hpcq.addresses import descriptors
from hpcq.errors import HpcqError
from hpcq.roster import PilotState, PilotView, Roster, view
from hpcq.scheduler import Scheduler
from hpcq.units import sum_known

log = logging.getLogger("hpcq.manager")


class Questions:
    """Which topics clients may ask for, and who answers."""

    def __init__(self) -> None:
        self.topics: dict[str, Callable[[Any], Any]] = {}

    def answer(self, link: transport.Link, question: m.Ask) -> None:
        """Send the answer, or one line of what is wrong with the question; never raises."""
        topic = self.topics.get(question.topic)
        if topic is None:
            link.send(m.Answer(b"null", f"the manager knows nothing of {question.topic!r}"))
            return
        try:
            link.send(m.Answer(msgspec.json.encode(topic(msgspec.json.decode(question.body or b"null")))))
        except HpcqError as error:
            link.send(m.Answer(b"null", str(error)))
        except Exception as error:
            log.exception("a question for %s failed", question.topic)
            link.send(m.Answer(b"null", f"{type(error).__name__}: {error}"))


def views(scheduler: Scheduler, roster: Roster) -> list[PilotView]:
    """Every pilot that has connected, ended ones included."""
    busy = {name: pilot.cores - pilot.free_cores for name, pilot in scheduler.pilots.items()}
    why = scheduler.hosts.why
    return [view(entry, busy.get(entry.name, 0), why(entry.hostname)) for entry in roster.entries.values()]


def status(queue: str, scheduler: Scheduler, roster: Roster, waiting_for_files: int) -> dict[str, Any]:
    """Counts of tasks by state and outcome, of pilots by state, of cores, and of bytes through all tunnels."""
    entries = roster.entries.values()
    states = [entry.state for entry in entries]
    held = [record.state.name.lower() for pilot in scheduler.pilots.values() for record in pilot.held()]
    return {
        "queue": queue,
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "tasks": {
            "waiting": scheduler.ready_count + waiting_for_files,
            "sent": held.count("assigned"),
            "running": held.count("running") + held.count("ending"),
            "done": dict(scheduler.finished),
        },
        "pilots": {state.value: states.count(state) for state in PilotState},
        "cores": sum(pilot.cores for pilot in scheduler.pilots.values()),
        "descriptors": descriptors(),
        "cores_busy": sum(pilot.cores - pilot.free_cores for pilot in scheduler.pilots.values()),
        "bytes_sent": sum_known(entry.bytes_sent for entry in entries),
        "bytes_received": sum_known(entry.bytes_received for entry in entries),
    }
