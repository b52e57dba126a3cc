"""Which task runs where: a pure state machine.

`Scheduler.handle` takes events and the time and returns commands; it does no I/O, reads no clock, keeps no payload.
The same events give the same commands, so a recorded run replays. `events` lists what goes in and comes out,
`records` holds one task's and one pilot's state with the table of legal transitions, `machine` is the scheduler.

**A task's states** (`records.TRANSITIONS` is the table the code obeys)::

    READY --place--> ASSIGNED --start--> RUNNING --end--> DONE
      ^                 |  |                |  |
      |<--give back-----+  |                |  +--pilot gone, retries spent--> DONE (lost)
      |<--pilot gone-------+                |
      |<--pilot gone, a retry spent---------+
    any of READY, ASSIGNED, RUNNING --cancel--> DONE (READY) or ENDING --end, give back, pilot gone--> DONE (cancelled)

A task counts as begun only once its pilot said so; the pilot says so before it begins. Hence a task that was merely
waiting on a dying pilot costs no retry, and one that kills every pilot it meets runs ``retries + 1`` times and no more.

**Placement.** Tasks with the same needs form one `Demand`, with its own queue by priority, then age. For each demand
the pilots that could start such a task at once (*idle*) and those that may hold one more in advance (*roomy*) are kept
as sets, updated when a pilot changes. So an event costs O(demands), not O(tasks) or O(pilots). Free places are filled
first, pilots in turn; then short tasks are sent ahead, about `LOOKAHEAD` seconds of expected work for each pilot, so
that no round trip lies between two tasks. What was sent ahead and is stuck behind a longer task than expected is asked
back when another pilot has nothing to do. A pilot works off what it holds in order, and the scheduler accounts for it
in the same order: resources are never promised twice.
"""

from hpcq.scheduler.events import (
    AskBack,
    Assign,
    Cancelled,
    Command,
    Ended,
    EndedTask,
    Event,
    Finish,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    Returned,
    Started,
    Stop,
    Submitted,
    Tick,
)
from hpcq.scheduler.machine import LOOKAHEAD, Scheduler
from hpcq.scheduler.records import TRANSITIONS, IllegalTransitionError, TaskState

__all__ = [
    "LOOKAHEAD",
    "TRANSITIONS",
    "AskBack",
    "Assign",
    "Cancelled",
    "Command",
    "Ended",
    "EndedTask",
    "Event",
    "Finish",
    "IllegalTransitionError",
    "NewTask",
    "PilotDraining",
    "PilotGone",
    "PilotReady",
    "Returned",
    "Scheduler",
    "Started",
    "Stop",
    "Submitted",
    "TaskState",
    "Tick",
]
