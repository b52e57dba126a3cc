"""`Queue`: what users submit tasks to and wait on. The thin side in the user's own threads.

Here tasks are pickled (so that their arguments are as they were at ``submit``), numbered and handed to the manager's
thread; finished ones come back through a `Mailbox`. May not live here: scheduling, sockets, batch commands.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from hpcq import lock, serialize, state_dir
from hpcq.credentials import GatewayCredentials
from hpcq.errors import QueueClosedError, SerializationError, UsageError
from hpcq.jobs import JobWatch
from hpcq.manager import Finished, Manager, Submission
from hpcq.messages import TaskSpec
from hpcq.roster import PilotView
from hpcq.scheduler import NewTask
from hpcq.task import Attempt, Options, Outcome, PythonTask, Task


class Mailbox:
    """Finished tasks on their way to the user; any number of threads may wait, each for what it wants."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: dict[int, Task] = {}
        self._by_tag: dict[str, dict[int, None]] = {}
        self._failure: BaseException | None = None

    def put(self, tasks: Iterable[Task]) -> None:
        """Add finished tasks."""
        with self._changed:
            for task in tasks:
                assert task.id is not None
                self._tasks[task.id] = task
                if task.options.tag is not None:
                    self._by_tag.setdefault(task.options.tag, {})[task.id] = None
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Wake everybody: nothing more will come."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def take(self, find: Callable[[], int | None], timeout: float | None) -> Task | None:
        """The first task that ``find`` names, or None after ``timeout`` seconds (None: no limit).

        Raises:
            QueueClosedError: nothing more will come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while (number := find()) is None:
                if self._failure is not None:
                    raise QueueClosedError(f"the queue has ended: {self._failure}") from self._failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            return self._remove(number)

    def peek(self, find: Callable[[], int | None]) -> int | None:
        """What ``find`` names now."""
        with self._changed:
            return find()

    def _remove(self, number: int) -> Task:
        task = self._tasks.pop(number)
        if task.options.tag is not None:
            tagged = self._by_tag[task.options.tag]
            del tagged[number]
            if not tagged:
                del self._by_tag[task.options.tag]
        return task

    def first(self) -> int | None:
        """The id of the task that finished first."""
        return next(iter(self._tasks), None)

    def first_tagged(self, tag: str) -> int | None:
        """The same among those with ``tag``."""
        return next(iter(self._by_tag.get(tag, ())), None)

    def has(self, number: int) -> int | None:
        """``number`` if that task is here."""
        return number if number in self._tasks else None

    def __len__(self) -> int:
        return len(self._tasks)


class Queue:
    """Tasks go in with `submit`, come out of `wait` when they are done; pilots do the work meanwhile.

    Listens at once, encrypted and authenticated, and writes a connection file that pilots and the command line find
    by the queue's name. Use it as a context manager: at the end its pilots are sent away and its batch jobs cancelled
    (unless ``keep_pilots``), also when the program is interrupted.

    Args:
        name: how ``hpcq submit-pilots --name`` calls it: letters, digits and ``._-``; made up when not given.
        address: the address to listen on; all of this host's when not given.
        port: the port; any free one when 0.
        keep_pilots: leave batch jobs alone at the end; their pilots wait for a program with the same queue name.

    Raises:
        UsageError: the name cannot be used, or another running program serves that queue.
        HpcqError: the address cannot be listened on.
    """

    def __init__(
        self, name: str | None = None, *, address: str | None = None, port: int = 0, keep_pilots: bool = False
    ) -> None:
        self._temporary = name is None
        self.name = name or f"queue-{os.getpid()}-{secrets.token_hex(3)}"
        self.keep_pilots = keep_pilots
        self._mailbox = Mailbox()
        self._functions = serialize.FunctionCache()
        self._numbering = threading.Lock()
        self._next_id = 1
        self._open: dict[int, Task] = {}
        self._closed = False
        self._lock = lock.QueueLock(state_dir.ensure_queue_dir(self.name) / "manager.lock")
        self._lock.take(self.name)
        try:
            self._manager = Manager(self.name, self._deliver, self._mailbox.fail, GatewayCredentials())
            self.connection = self._manager.start(address, port)
            self._jobs = JobWatch(self.name, self._manager)
        except BaseException:
            self._lock.release()
            raise
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- submitting ---

    def submit(self, task: Task) -> int:
        """Queue a task; returns its id. Arguments are taken as they are now.

        A function or arguments that cannot be pickled end the task as ``unserializable`` at once.

        Raises:
            QueueClosedError: the queue was closed.
            UsageError: not a task, or one that was submitted before; an input made by a task that was not.
        """
        if self._closed:
            raise QueueClosedError(f"queue {self.name!r} is closed")
        if not isinstance(task, Task):
            raise UsageError(f"submit takes a Task or PythonTask, not {type(task).__name__}")
        with self._numbering:
            if task.id is not None:
                raise UsageError(f"{task.label} was already submitted; make a new one")
            task.id = number = self._next_id
            self._next_id += 1
        task.submitted_at = time.time()
        self._open[number] = task
        try:
            submission = self._submission(task, number)
        except SerializationError as error:
            self._deliver([Finished(number, Attempt(Outcome.UNSERIALIZABLE, str(error)))])
            return number
        except UsageError:  # its files cannot be as they are: as if it had never been submitted
            task.id = task.submitted_at = None
            del self._open[number]
            raise
        self._manager.submit(submission)
        return number

    def _submission(self, task: Task, number: int) -> Submission:
        options = task.options
        if isinstance(task, PythonTask):
            key, body = self._functions.body(task.function)
            payload = serialize.dump_arguments(task.args, task.kwargs)
            kind = options.category or key.hex()
        else:
            key, body, payload, kind = b"", b"", task.command.encode(), options.category or "shell"
        spec = TaskSpec(
            number, key, payload, options.cores, options.memory, options.walltime or 0.0, options.network,
            dict(options.env) if options.env else None,
        )  # fmt: skip
        files = self._files(task, options) if options.inputs or options.outputs else None
        needs = NewTask(number, options.cores, options.memory, options.network, options.priority, options.retries, kind)
        return Submission(needs, spec, body, files)

    def _files(self, task: Task, options: Options) -> Any:
        from hpcq.files.plan import make_plan  # noqa: PLC0415 - only tasks with files need it

        return make_plan(task, options)

    def cancel(self, *, id: int | None = None, tag: str | None = None, category: str | None = None) -> int:
        """End tasks by id, tag or category, queued or running; each still comes out of `wait`, as ``cancelled``.

        Returns how many were asked to end. With no argument, all.
        """
        chosen = [
            number
            for number, task in list(self._open.items())
            if (id is None or number == id)
            and (tag is None or task.options.tag == tag)
            and (category is None or task.options.category == category)
        ]
        if chosen:
            self._manager.cancel(chosen)
        return len(chosen)

    # --- waiting ---

    def _deliver(self, finished: list[Finished]) -> None:
        tasks = []
        for number, attempt in finished:
            task = self._open.pop(number)
            task._finish(attempt)
            tasks.append(task)
        self._mailbox.put(tasks)

    def wait(self, timeout: float | None = None) -> Task | None:
        """The next task that is done, in order of finishing; None when none was within ``timeout`` seconds.

        Without a timeout it waits until a task is done; None at once when there is nothing left to wait for.

        Raises:
            QueueClosedError: the queue was closed with tasks unfinished, or its manager failed.
        """
        return self._wait(self._mailbox.first, timeout)

    def wait_for_tag(self, tag: str, timeout: float | None = None) -> Task | None:
        """As `wait`, for tasks with this tag only; None at once when no task with it is left."""
        return self._wait(lambda: self._mailbox.first_tagged(tag), timeout, lambda task: task.options.tag == tag)

    def wait_for_id(self, id: int, timeout: float | None = None) -> Task | None:
        """As `wait`, for one task; None at once when it was already waited for or never submitted."""
        return self._wait(lambda: self._mailbox.has(id), timeout, lambda task: task.id == id)

    def _wait(
        self, find: Callable[[], int | None], timeout: float | None, relevant: Callable[[Task], bool] | None = None
    ) -> Task | None:
        if self._mailbox.peek(find) is None and not self._anything_left(relevant):
            timeout = 0  # nothing can come: look once more, since it may have come just now
        return self._mailbox.take(find, timeout)

    def _anything_left(self, relevant: Callable[[Task], bool] | None) -> bool:
        if relevant is None:
            return bool(self._open)
        return any(map(relevant, list(self._open.values())))

    def empty(self) -> bool:
        """Whether every submitted task has been returned by a `wait`."""
        return not self._open and not len(self._mailbox)

    def hungry(self) -> int:
        """How many more one-core tasks would keep the pilots that are ready busy."""
        return self._manager.call(lambda: self._manager.free_places)

    # --- pilots ---

    def submit_pilots(self, count: int = 1, *, batch: str = "local", **options: Any) -> list[Any]:
        """Put ``count`` pilots through a batch system; returns its jobs.

        Takes what ``hpcq submit-pilots`` takes: ``cores``, ``memory`` (MB or ``"32GB"``), ``walltime`` (s or
        ``"8:00:00"``), ``partition``, ``account``, ``qos``, ``constraint``, ``options``, ``template``, ``vpn``,
        ``gateway``, ``require``, ``scratch``, ``manager_timeout``.

        Raises:
            UsageError: an unknown or bad option.
            TemplateError: the template cannot be rendered.
            BatchError: the batch system refused or did not answer.
        """
        return self._jobs.submit(count, batch=batch, **options)

    def pilots(self) -> list[PilotView]:
        """Every pilot that has connected so far, ended ones included."""
        return self._manager.pilots()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of tasks by state and outcome, of pilots by state, and of cores."""
        return self._manager.call(self._manager.status)

    # --- end ---

    def close(self) -> None:
        """Send the pilots away, cancel the batch jobs (unless ``keep_pilots``), stop listening. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            with contextlib.suppress(OSError):
                state_dir.connection_file(self.name).unlink()
            self._jobs.stop()
            if self.keep_pilots:
                self._manager.stop(0)
            else:
                self._manager.stop()
                self._jobs.cancel_all()
        finally:
            self._mailbox.fail(QueueClosedError("it was closed"))
            self._lock.release()
            self._remove_if_temporary()

    def _remove_if_temporary(self) -> None:
        if self._temporary and not self.keep_pilots and not self._jobs.any_left:
            shutil.rmtree(state_dir.queue_dir(self.name), ignore_errors=True)

    def __repr__(self) -> str:
        return f"<hpcq.Queue {self.name!r} port {self.connection.port} {'closed' if self._closed else 'open'}>"
