"""`WorkQueue`: Work Queue's manager on top of an `hpcq.Queue`.

What Work Queue does only while the program is in ``wait``, hpcq does in a thread of its own: tasks are placed, run and
fetched meanwhile. Only what hpcq itself does not know happens in ``wait``, as there: tasks with a ``start_time_min`` or
in a category that is full are handed on when it is their turn, and those past their ``end_time`` are ended.

::

    submit --> held (start time, full category) --> hpcq.Queue --> arrived --wait--> the program
                                                        |              |
                                                        +--cancel------+--> the program, at once

For one thread, as Work Queue's own.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import math
import os
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import hpcq
from hpcq.mailbox import Mailbox
from hpcq.work_queue import constants as c
from hpcq.work_queue.build import Builder, settle
from hpcq.work_queue.categories import Category, check_mode
from hpcq.work_queue.constants import unsupported
from hpcq.work_queue.debug import port_range, specify_debug_log
from hpcq.work_queue.settings import Settings
from hpcq.work_queue.tasks import Task
from hpcq.work_queue.workers import Workers

log = logging.getLogger("hpcq.work_queue")

HUNGRY_PER_WORKER = 2
"""A queue is hungry while fewer tasks wait than this for each worker (or ``hungry-minimum``), as in Work Queue."""

RUNNING: weakref.WeakValueDictionary[str, WorkQueue] = weakref.WeakValueDictionary()
"""The queues of this program, by the name that hpcq knows them by: for the factories beside them."""


def _weakly(method: Callable[[hpcq.Task], None]) -> Callable[[hpcq.Task], None]:
    """The method, without a cycle: a queue ends with its last user, not when the garbage collector finds it."""
    reference = weakref.WeakMethod(method)

    def call(task: hpcq.Task) -> None:
        bound = reference()
        assert bound is not None
        bound(task)

    return call


class WorkQueue(Settings, Workers):
    """A queue of tasks. See the table in `hpcq.work_queue`.

    Args:
        port: the port to listen on; 0 for any, or the first and last of a range.
        name: how ``hpcq submit-pilots --name`` and `Factory` call it.
        shutdown: send the workers away at the end. Without, those of a queue with a name wait for the next program of
            that name (for their manager timeout).
        stats_log: refused.
        transactions_log: refused.
        debug_log: a file for hpcq's debug messages.
        ssl: True or nothing: connections are always encrypted, with keys of the queue's own.
        status_display_interval: refused.

    Raises:
        HpcqError: the port cannot be listened on, or another running program serves a queue of that name.
        NotImplementedError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        port: int | Sequence[int] = c.WORK_QUEUE_DEFAULT_PORT,
        name: str | None = None,
        shutdown: bool = False,
        stats_log: str | None = None,
        transactions_log: str | None = None,
        debug_log: str | None = None,
        ssl: Any = None,
        status_display_interval: float | None = None,
    ) -> None:
        if stats_log:
            unsupported("stats_log", "see hpcq status --json")
        if transactions_log:
            unsupported("transactions_log", "see hpcq tasks --json")
        if status_display_interval and status_display_interval >= 1:
            unsupported("status_display_interval", "see hpcq status --watch")
        if ssl and ssl is not True and any(ssl):
            unsupported("ssl with a key and certificate of your own", "connections are encrypted by the queue's own")
        if debug_log:
            specify_debug_log(debug_log)
        self._shutdown = shutdown
        self._ports = _ports(port)
        self._started = time.time()
        self._next_id = 1
        self._tasks: dict[int, Task] = {}  # submitted and neither returned nor cancelled
        self._held: dict[int, Task] = {}  # of these, those that are not hpcq's yet,
        self._dated: list[tuple[float, int]] = []  # because of their start time (a heap; some are held no more),
        self._lines: dict[str, deque[int]] = {}  # or because their category is full (likewise)
        self._arrived: dict[int, Task] = {}  # of these, those that have ended
        self._timed: dict[int, Task] = {}  # of these, those with an end time
        self._cancelled: set[int] = set()
        self._categories: dict[str, Category] = {}
        self._new_mode = c.WORK_QUEUE_ALLOCATION_MODE_FIXED
        self._execution = 0.0
        self.hungry_minimum = 10
        self.tasks_left = 0
        self._staging = tempfile.mkdtemp(prefix="hpcq-work-queue-", dir=os.environ.get("CCTOOLS_TEMP") or None)
        self._builder = Builder(self._staging, _weakly(self._produce))
        try:
            self._open(name or os.environ.get("WORK_QUEUE_NAME") or None)
        except BaseException:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise

    def _open(self, name: str | None) -> None:
        # A queue without a name is found by nobody again: its workers end with it.
        keep = name is not None and not self._shutdown
        self._queue = hpcq.Queue(name, port=self._ports, keep_pilots=keep)
        self._name = name
        RUNNING[self._queue.name] = self

    def _reopen(self, name: str) -> None:
        """Under another name, on the same port."""
        if self._next_id > 1 or self._queue.pilots():
            unsupported("specify_name after tasks or workers came", "give the name to WorkQueue(name=…)")
        self._ports = [self.port]
        before = self._name
        self._queue.close()
        try:
            self._open(name)
        except BaseException:
            self._open(before)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free()

    def __del__(self) -> None:
        if hasattr(self, "_queue"):
            self._free()

    def _free(self) -> None:
        self._queue.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    # --- tasks ---

    def submit(self, task: Task) -> int:
        """Queue a task; returns its number. One that was returned by ``wait`` may be submitted again.

        Raises:
            NotImplementedError: something is specified for it that cannot be honoured.
            ValueError: it is in the queue already, or something is specified that makes no sense.
        """
        if not isinstance(task, Task):
            raise TypeError(f"submit takes a task of hpcq.work_queue, not {type(task).__name__}")
        if self._tasks.get(task._id) is task:
            raise ValueError(f"task {task._id} is in the queue already; make a clone of it")
        task._forget()
        category = self._category(task.category)
        now = time.time()
        waits = task._start_time_min > now or category.is_full
        run = self._builder.build(task, category.added(), now)
        task._run, task._learned = run, category.learns and task._resources.keys() < {"memory", "disk"}
        if not waits:
            self._hand_on(task)
        task._id, self._next_id = self._next_id, self._next_id + 1
        self._tasks[task._id] = task
        if task._end_time:
            self._timed[task._id] = task
        category.submitted += 1
        if waits:
            self._hold(task, now)
        return task._id

    def _hold(self, task: Task, now: float) -> None:
        self._held[task._id] = task
        if task._start_time_min > now:
            heapq.heappush(self._dated, (task._start_time_min, task._id))
        else:
            self._lines.setdefault(task.category, deque()).append(task._id)

    def _hand_on(self, task: Task) -> None:
        self._queue.submit(task._run)
        self._category(task.category).out += 1

    def _produce(self, task: hpcq.Task) -> None:
        self._queue.submit_to(Mailbox(), task)

    def wait(self, timeout: float = c.WORK_QUEUE_WAITFORTASK) -> Task | None:
        """The next task that has ended; None after ``timeout`` seconds (-1: no limit), or when none is left."""
        return self.wait_for_tag(None, timeout)

    def wait_for_tag(self, tag: str | None, timeout: float = c.WORK_QUEUE_WAITFORTASK) -> Task | None:
        """The same for tasks with this tag only; None at once when no such task is left."""
        deadline = time.monotonic() + timeout if timeout >= 0 else math.inf
        while True:
            found = next((task for task in self._arrived.values() if tag in (None, task._tag)), None)
            if found is not None:
                return self._hand_over(found)
            if not self._left(tag):
                return None
            next_look = self._look_at_clock()
            left = min(deadline - time.monotonic(), next_look)
            if not self._receive(max(0.0, left)) and time.monotonic() >= deadline:
                return None

    def _left(self, tag: str | None) -> bool:
        if tag is None:
            return bool(self._tasks)
        return any(task._tag == tag for task in self._tasks.values())

    def _receive(self, seconds: float) -> bool:
        """Take one task that has ended from hpcq's queue, waiting so long at most; whether there was one."""
        timeout = None if seconds == math.inf else seconds
        if self._queue.empty():  # only tasks whose time has not come are left
            time.sleep(min(seconds, 3600.0))
            return False
        run: Any = self._queue.wait(timeout)
        if run is None:
            return False
        task: Task = run.owner
        if task._run is not run or task._id not in self._tasks:
            return True  # cancelled meanwhile
        self._ended(task)
        return True

    def _ended(self, task: Task) -> None:
        self._category(task.category).out -= 1
        settle(task, time.time())
        self._execution += task.cmd_execution_time
        self._cancelled.discard(task._id)
        self._arrived[task._id] = task
        self._release()

    def _hand_over(self, task: Task) -> Task:
        del self._arrived[task._id], self._tasks[task._id]
        self._timed.pop(task._id, None)
        category = self._category(task.category)
        category.done += 1
        category.failed += task._result != c.WORK_QUEUE_RESULT_SUCCESS
        return task

    def _look_at_clock(self) -> float:
        """Hand on the tasks whose time has come, end those whose time is over; returns the seconds until the next."""
        self._release()
        now = time.time()
        times = [self._dated[0][0]] if self._dated else []
        if self._timed:
            times += self._end_overdue(now)
        return max(0.0, min(times, default=math.inf) - now)

    def _release(self) -> None:
        now = time.time()
        while self._dated and (self._dated[0][0] <= now or self._dated[0][1] not in self._held):
            task = self._held.get(heapq.heappop(self._dated)[1])
            if task is not None:
                self._hold(task, now)
        for name in list(self._lines):
            line, category = self._lines[name], self._category(name)
            while line and not category.is_full:
                task = self._held.pop(line.popleft(), None)
                if task is not None:
                    self._hand_on(task)
            if not line:
                del self._lines[name]

    def _end_overdue(self, now: float) -> Iterator[float]:
        overdue = []
        for number, task in list(self._timed.items()):
            if number in self._arrived or number in self._cancelled:
                continue
            if task._end_time > now:
                yield task._end_time
            elif number in self._held:
                del self._held[number]
                task._result, task._return_status = c.WORK_QUEUE_RESULT_TASK_TIMEOUT, 9
                self._arrived[number] = task
                yield now
            else:
                self._cancelled.add(number)
                overdue.append(task._run.id)
        if overdue:
            self._queue.cancel_ids(overdue)

    def empty(self) -> bool:
        """Whether every task that was submitted has been returned or cancelled."""
        return not self._tasks

    def hungry(self) -> int:
        """How many more tasks it could well take: by free cores, and at least 1 while few wait."""
        status = self._queue.stats
        waiting = status["tasks"]["waiting"] + len(self._held)
        workers = status["pilots"]["ready"]
        few = waiting < max(self.hungry_minimum, HUNGRY_PER_WORKER * workers)
        return max(self._queue.hungry(), int(few))

    def cancel_by_taskid(self, id: int) -> Task | None:
        """Take a task out of the queue, ending it if it runs; returns it, None if it is not there."""
        task = self._tasks.pop(id, None)
        if task is None:
            return None
        self._timed.pop(id, None)
        category = self._category(task.category)
        category.cancelled += 1
        if id in self._arrived:
            del self._arrived[id]
        elif id in self._held:
            del self._held[id]
        else:
            self._queue.cancel_ids([task._run.id])
            category.out -= 1
            self._release()
        return task

    def cancel_by_tasktag(self, tag: str) -> Task | None:
        """The same for one task with this tag."""
        number = next((task._id for task in self._tasks.values() if task._tag == tag), None)
        return None if number is None else self.cancel_by_taskid(number)

    def cancel_by_category(self, category: str) -> list[Task]:
        """The same for all tasks of this category."""
        numbers = [task._id for task in self._tasks.values() if task.category == category]
        return [task for number in numbers if (task := self.cancel_by_taskid(number)) is not None]

    def cancel_all_tasks(self) -> list[Task]:
        """The same for all tasks."""
        return [task for number in list(self._tasks) if (task := self.cancel_by_taskid(number)) is not None]

    def task_state(self, taskid: int) -> int:
        """One of ``WORK_QUEUE_TASK_…``."""
        task = self._tasks.get(taskid)
        if task is None:
            known = 0 < taskid < self._next_id
            return c.WORK_QUEUE_TASK_DONE if known else c.WORK_QUEUE_TASK_UNKNOWN
        if taskid in self._arrived or task._run.done:
            return c.WORK_QUEUE_TASK_RETRIEVED
        running = taskid not in self._held and self._queue.running([task._run.id])
        return c.WORK_QUEUE_TASK_RUNNING if running else c.WORK_QUEUE_TASK_READY

    # --- many calls ---

    def map(self, fn: Callable[[Any], Any], seq: Iterable[Any], chunksize: int = 1) -> list[Any]:
        """The values of ``fn(item)``, in order. What ``fn`` raises is raised here."""
        return list(self._queue.map(fn, seq, chunksize))

    def pair(
        self, fn: Callable[[Any], Any], seq1: Iterable[Any], seq2: Iterable[Any], chunksize: int = 1, env: Any = None
    ) -> list[Any]:
        """The values of ``fn((x, y))`` for every x of ``seq1`` and y of ``seq2``, the last varying fastest."""
        if env:
            unsupported("pair(env=…)", "an environment belongs to a pilot: Factory.python_env")
        return list(self._queue.pair(fn, seq1, seq2, chunksize))

    def tree_reduce(self, fn: Callable[[Any], Any], seq: Iterable[Any], chunksize: int = 2) -> Any:
        """One value from many: ``fn`` of every ``chunksize`` neighbours, then of their values, until one is left."""
        return self._queue.tree_reduce(fn, seq, chunksize)

    def remote_map(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        unsupported("remote_map", "there are no coprocesses; use map, whose interpreters stay warm")

    def remote_pair(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        unsupported("remote_pair", "there are no coprocesses; use pair, whose interpreters stay warm")

    def remote_tree_reduce(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        unsupported("remote_tree_reduce", "there are no coprocesses; use tree_reduce, whose interpreters stay warm")

    # --- itself ---

    @property
    def name(self) -> str | None:
        """As given; None for a queue without a name."""
        return self._name

    @property
    def hpcq_queue(self) -> hpcq.Queue:
        """The `hpcq.Queue` below, for what Work Queue has no name for."""
        return self._queue

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._queue.connection.port

    @property
    def using_ssl(self) -> bool:
        """True."""
        return True

    def application_info(self) -> dict[str, Any] | None:
        """None; to be overridden."""
        return None

    def _category(self, name: str) -> Category:
        category = self._categories.get(name)
        if category is None:
            category = self._categories[name] = Category(name, self._new_mode)
            self._tell(category)
        return category

    def _tell(self, category: Category) -> None:
        check_mode(category.mode)
        if category.learns:
            self._queue.category(category.name, **category.learned())


def _ports(port: int | Sequence[int]) -> Sequence[int]:
    """The ports to be tried, in order."""
    if not isinstance(port, int):
        try:
            low, high = port
        except (TypeError, ValueError):
            raise ValueError("port should be a single integer, or a sequence of two integers") from None
        if low > high:
            raise TypeError(f"low_port {low} should be smaller than high_port {high}")
        return range(low, high + 1)
    with contextlib.suppress(ValueError, KeyError):
        if port == c.WORK_QUEUE_RANDOM_PORT:
            return [int(os.environ["WORK_QUEUE_PORT"])]
    return [port] if port > 0 else port_range()
