"""Which task runs where: a pure state machine.

`Scheduler.handle` takes events and the time and returns commands; it does no I/O, reads no clock, keeps no payload.
The same events give the same commands, so a recorded run replays. One concern to a module:

- `events`: what goes in and comes out;
- `records`: one task's state with the table of legal transitions, and the queue of tasks with equal `needs`;
- `pilots`: one pilot's account of what it has and holds;
- `placement`: which waiting task goes to which pilot;
- `categories`: what is learned of tasks of one kind, and what memory and disk they are allotted for it;
- `relief`: what idle pilots can take over of that which is stuck on others;
- `speculation`: when a task that takes too long gets a copy elsewhere;
- `hosts`: where nothing is placed any more, since things fail there;
- `explain`: why a task is where it is, in words;
- `machine`: the scheduler itself, which applies events to all of them; `invariants`: what always holds of it.

**A task's states** (`records.TRANSITIONS` is the table the code obeys)::

    READY --place--> ASSIGNED --start--> RUNNING --end--> DONE
      ^                 |  |                |  |
      |<--give back-----+  |                |  +--pilot gone, retries spent--> DONE (lost)
      |<--pilot gone-------+                |
      |<--pilot gone, a retry spent---------+
      |<--end as resources, more to be had--+
      |<--end as network: the tunnel was down
    any of READY, ASSIGNED, RUNNING --cancel--> DONE (READY) or ENDING --end, give back, pilot gone--> DONE (cancelled)

A task counts as begun only once its pilot said so. The pilot says so as it begins, or with the result of a task that
ends within a moment. So when a pilot goes, a task that had a place there, and was not announced, may have begun: it is
in doubt, which counts as one attempt when the next pilot is lost with it too, and from then on is announced at once, as
is one without retries. Hence a task that was merely waiting on a dying pilot costs no retry, and one that kills every
pilot it meets runs ``retries + 1`` times and no more.

**Placement.** Free places are filled first, pilots in turn; then short tasks are sent ahead, about `LOOKAHEAD` seconds
of expected work for each core of a pilot, so that no round trip lies between two tasks. What was sent ahead and is
stuck behind a longer task than expected is asked back when another pilot has nothing to do. A pilot works off what it
holds in order, and the scheduler accounts for it in the same order: resources are never promised twice. A step costs
what has changed, not what there is: see `placement`.

**Copies.** With ``speculate``, a RUNNING task that is an outlier of its category gets a second pilot (`Record.second`)
where there is room that nothing waits for. It stays one task in one state: the first result from either pilot ends it,
and if one of them goes, the other carries on. The one that comes too late is stopped and keeps its resources until its
pilot has answered; it is then in that pilot's account only.
"""

from hpcq.scheduler.categories import MODES
from hpcq.scheduler.events import (
    Allotment,
    AskBack,
    Assign,
    Cancelled,
    CategorySet,
    Command,
    Ended,
    EndedTask,
    Event,
    Finish,
    HostBlocked,
    HostUnblocked,
    NewTask,
    PilotDraining,
    PilotGone,
    PilotReady,
    PilotTunnel,
    Returned,
    SpeculationSet,
    Started,
    StartFailed,
    Stop,
    Submitted,
    Tick,
)
from hpcq.scheduler.explain import TaskRow, explain, rows
from hpcq.scheduler.machine import Scheduler
from hpcq.scheduler.pilots import LOOKAHEAD
from hpcq.scheduler.records import TRANSITIONS, IllegalTransitionError, TaskState

__all__ = [
    "LOOKAHEAD",
    "MODES",
    "TRANSITIONS",
    "Allotment",
    "AskBack",
    "Assign",
    "Cancelled",
    "CategorySet",
    "Command",
    "Ended",
    "EndedTask",
    "Event",
    "Finish",
    "HostBlocked",
    "HostUnblocked",
    "IllegalTransitionError",
    "NewTask",
    "PilotDraining",
    "PilotGone",
    "PilotReady",
    "PilotTunnel",
    "Returned",
    "Scheduler",
    "SpeculationSet",
    "StartFailed",
    "Started",
    "Stop",
    "Submitted",
    "TaskRow",
    "TaskState",
    "Tick",
    "explain",
    "rows",
]
