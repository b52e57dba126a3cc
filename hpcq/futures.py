"""`Executor`: a queue behind the interface of ``concurrent.futures``, for coffea, dask and whatever takes a pool.

::

    user's thread              manager's thread        the executor's thread
    Executor.submit --task-->  Queue, pilots
    future.cancel   --id---->      |
                                   +--finished tasks-->  sets futures, runs their callbacks, closes its own queue

Futures are set in a thread of their own, one for each executor, so that a slow callback of the user's holds up neither
the queue nor its pilots. Values are unpickled in the thread that asks for them.

Failure cases: a function that raised raises here, its remote traceback as the cause; what cannot be pickled is a
`SerializationError`; a task that was lost, killed or ran over its limit a `TaskFailedError`; each on its own future
only. When nothing can run any more every future gets `BrokenExecutorError`, and so does the next ``submit``: the queue
was closed, its manager failed, or all batch jobs of an executor's own pilots have ended.
May not live here: scheduling, pickling, batch commands, other ways of waiting.
"""

from __future__ import annotations

import atexit
import copy
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from itertools import chain
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar

from hpcq import flow
from hpcq.dispatch import Finished
from hpcq.errors import HpcqError, QueueClosedError, SerializationError, TaskFailedError, UsageError
from hpcq.options import DEFAULTS, Options, changed
from hpcq.outcome import Outcome
from hpcq.queue import Queue
from hpcq.task import PythonTask, Task

log = logging.getLogger("hpcq.futures")

P = ParamSpec("P")
T = TypeVar("T")

LOOK_AT_PILOTS = 5.0
"""Seconds without a finished task after which an executor looks whether its own pilots can still come; it is told of
each that ends, and looks at once, too."""

WORKERS = 256
"""Calls that libraries are told to keep going where the number of cores is not known."""


class BrokenExecutorError(HpcqError, futures.BrokenExecutor):
    """Nothing can run any more in this executor; says why."""


class _Call(PythonTask):
    """A task with its future, until it is done."""

    __slots__ = ("future",)

    def __init__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, desk: _Desk
    ) -> None:
        super().__init__(function, *args, **kwargs)
        self._options = options
        self.future: TaskFuture[Any] | None = TaskFuture(desk)


class TaskFuture(futures.Future[T]):
    """The future of one task of a queue.

    Unlike the futures of the standard library's pools, one whose task runs can be cancelled too: the task is killed
    (the pilot's other tasks go on) and `cancel` returns True. ``concurrent.futures.wait`` and ``as_completed`` count a
    cancelled one as done when the task has ended on its pilot.
    """

    def __init__(self, desk: _Desk) -> None:
        super().__init__()
        self._desk = desk
        self.task_id: int | None = None

    def running(self) -> bool:
        """Whether its pilot has told that the task has begun. The state is asked for, which takes about 0.1 ms."""
        return not self.done() and self._desk.begun(self.task_id)

    def cancel(self) -> bool:
        """Cancel it, queued or running; False when it is done."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self._desk.cancel([self.task_id])
        return True

    def result(self, timeout: float | None = None) -> T:
        """The function's value, waited for at most ``timeout`` seconds.

        Raises:
            TimeoutError: it is not done by then.
            CancelledError: it was cancelled.
            BaseException: what the function raised, its remote traceback as ``__cause__``.
            SerializationError: function, arguments or value cannot be pickled; says which.
            TaskFailedError: the task was lost, crashed or ran over its limit.
            BrokenExecutorError: nothing can run any more.
        """
        task: Any = super().result(timeout)
        value: T = task.result()
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result` would raise, or None; waits as it does."""
        error = super().exception(timeout)
        if error is not None:
            return error
        task: Any = super().result(0)
        try:
            task.result()
        except SerializationError as failure:  # the value cannot be rebuilt here
            return failure
        return None

    def settle(self, task: Task) -> None:
        """Its task is done. In the executor's thread only."""
        if task.outcome == Outcome.CANCELLED:
            super().cancel()
        if not self.set_running_or_notify_cancel():
            return
        if task.outcome == Outcome.SUCCESS:
            held: Any = task
            self.set_result(held)
        else:  # unpickled now: ``concurrent.futures.wait`` must know it for one
            self.set_exception(_error(task))

    def give_up(self, error: BaseException) -> None:
        """Its task will not be done. In the executor's thread only."""
        if self.set_running_or_notify_cancel():
            self.set_exception(error)


def _error(task: Task) -> BaseException:
    try:
        if task.exception is not None:
            return task.exception
    except Exception as error:  # classes of the user's may do anything when they are rebuilt
        return error
    if task.outcome == Outcome.UNSERIALIZABLE:
        return SerializationError(f"{task.label}: {task.message}")
    return TaskFailedError(f"{task.label} ended as {task.outcome}: {task.message}")


class _Desk:
    """What the handles of one executor share: its queue, the calls that are out, and the thread that sets futures."""

    def __init__(self, queue: Queue, owns_queue: bool, has_pilots: bool) -> None:
        self.queue = queue
        self._owns_queue = owns_queue
        self._look = LOOK_AT_PILOTS if has_pilots else None
        self._lock = threading.Lock()
        self._out: dict[int, _Call] = {}
        self._news: SimpleQueue[list[Finished] | BaseException | Literal["look"] | None] = SimpleQueue()
        self._closing = False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name=f"hpcq-{queue.name}-futures", daemon=True)
        self._thread.start()
        if has_pilots:
            queue.on_pilot_end(lambda: self._news.put("look"))
        atexit.register(self.at_exit)

    # --- in the user's threads ---

    def submit(self, call: _Call) -> TaskFuture[Any]:
        """Queue a call; returns its future."""
        future = call.future
        assert future is not None
        with self._lock:  # all through: a shutdown in between must find the call or come before it
            if self._broken is not None:
                raise BrokenExecutorError(str(self._broken)) from self._broken
            if self._closing:
                raise RuntimeError("cannot schedule new futures after shutdown")
            try:
                future.task_id = self.queue.submit_to(self, call)
            except QueueClosedError as error:
                raise BrokenExecutorError(str(error)) from error
        call.args, call.kwargs = (), {}  # pickled: what is queued need not hold them twice
        return future

    def begun(self, number: int | None) -> bool:
        """Whether that task runs."""
        return number is not None and number in self.queue.running([number])

    def cancel(self, numbers: Iterable[int | None]) -> None:
        """End these tasks."""
        self.queue.cancel_ids(number for number in numbers if number is not None)

    def shutdown(self, wait: bool, cancel_futures: bool, kill: bool = False) -> None:
        """Take nothing more; see `Executor.shutdown`. ``kill`` cancels what runs too."""
        with self._lock:
            self._closing = True
        if cancel_futures or kill:
            self._cancel_all(spare_running=not kill)
        self._news.put(None)
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _cancel_all(self, spare_running: bool) -> None:
        calls = self._out.copy()
        spared = self.queue.running(calls.keys()) if spare_running else set()
        self.cancel(calls.keys() - spared)  # in one message; each future's own would send another
        for number, call in calls.items():
            if number not in spared and call.future is not None:
                futures.Future.cancel(call.future)

    def at_exit(self) -> None:
        """The interpreter ends: as the pools of the standard library do, finish what was begun."""
        self.shutdown(wait=True, cancel_futures=False)

    # --- in the manager's thread ---

    def expect(self, number: int, task: Task) -> None:
        """A call that will be `put` some time. In the user's threads."""
        assert isinstance(task, _Call)
        self._out[number] = task

    def expected(self) -> dict[int, Task]:
        """The calls that are out."""
        return dict(self._out.copy())

    def put(self, finished: list[Finished]) -> None:
        """These are done."""
        self._news.put(finished)

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        self._news.put(error)

    # --- in the executor's thread ---

    def _serve(self) -> None:
        try:
            while not (self._closing and not self._out):
                try:
                    self._turn()
                except Exception as error:  # a fault of ours, or of a class of the user's: nobody waits for ever
                    log.exception("the executor on queue %s failed", self.queue.name)
                    self._break(error)
        finally:
            atexit.unregister(self.at_exit)
            if self._owns_queue:
                self.queue.close()

    def _turn(self) -> None:
        try:
            news = self._news.get(timeout=self._look)
        except Empty:
            self._look_at_pilots()
            return
        if news == "look":
            self._look_at_pilots()
        elif isinstance(news, BaseException):
            self._break(news)
        else:
            self._settle(news or ())

    def _look_at_pilots(self) -> None:
        reason = self.queue.why_deserted() if self._out else ""
        if reason:
            self._break(BrokenExecutorError(f"no pilot of queue {self.queue.name} is left: {reason}"))

    def _settle(self, finished: Iterable[Finished]) -> None:
        for number, attempt in finished:
            call = self._out.pop(number, None)
            if call is None:  # given up before
                continue
            call._finish(attempt)
            future, call.future = call.future, None
            if future is not None:
                future.settle(call)

    def _break(self, error: BaseException) -> None:
        with self._lock:
            self._broken = error
            calls, self._out = self._out, {}
        self.cancel(calls)
        for call in calls.values():
            future, call.future = call.future, None
            if future is not None:
                cause = BrokenExecutorError(f"{call.label} cannot run any more: {error}")
                cause.__cause__ = error
                future.give_up(cause)


class _Handle:
    """Goes when the last `Executor` that shares a desk does."""


class Executor(futures.Executor):
    """A pool whose workers are pilots: ``hpcq.Executor(pilots=4, batch="slurm", cores=16, walltime="2:00:00")``.

    Made without a queue it opens one of its own, submits pilots, and closes both when it is shut down. Made with a
    queue it leaves that open, and the queue's `wait` sees none of its tasks. A function whose pilot went away runs
    again on another (``retries``; 3 times), so it should bear that; ``with_options(retries=0)`` forbids it.

    What the standard library's pools do, it does: one that is dropped without `shutdown` finishes what was submitted,
    and the interpreter waits for that at its end. A function is pickled at ``submit``, so later changes to its
    arguments do not show; a lock or an open file on an argument is an error on the future.

    Args:
        queue: the queue to use.
        max_workers: cores to have, divided over the pilots; for a queue of yours only what dask and others are told to
            keep going at a time.
        pilots: how many pilots to submit (1); 0 when ``hpcq submit-pilots`` brings them.
        batch: through which batch system (``"local"``).
        **options: those of `Queue` (``name``, ``port``, …) and of `Queue.submit_pilots` (``walltime``, ``partition``,
            …). ``cores`` is for each pilot: by default this machine's for local pilots, else 1.

    Raises:
        UsageError: an unknown or bad option, or options for a queue or pilots together with ``queue``.
        BatchError: the batch system refused or did not answer.
        ValueError: ``max_workers`` is less than 1.
    """

    def __init__(
        self,
        queue: Queue | None = None,
        *,
        max_workers: int | None = None,
        pilots: int | None = None,
        batch: str | None = None,
        **options: Any,
    ) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        self._workers = max_workers
        self._options = DEFAULTS
        self._handle = _Handle()
        if queue is None:
            self._desk = self._open(1 if pilots is None else pilots, batch or "local", options)
        else:
            given = [*options, *(name for name, value in (("pilots", pilots), ("batch", batch)) if value is not None)]
            if given:
                raise UsageError(f"{given[0]} is an option for an executor's own queue; this one was given a queue")
            self._desk = _Desk(queue, owns_queue=False, has_pilots=False)
        weakref.finalize(self._handle, self._desk.shutdown, wait=False, cancel_futures=False).atexit = False

    def _open(self, pilots: int, batch: str, options: Mapping[str, Any]) -> _Desk:
        names = inspect.signature(Queue).parameters
        pilot_options = {name: value for name, value in options.items() if name not in names}
        pilot_options.setdefault("cores", _cores(self._workers, pilots, batch))
        queue = Queue(**{name: value for name, value in options.items() if name in names})
        try:
            if pilots:
                queue.submit_pilots(pilots, batch=batch, **pilot_options)
                self._workers = self._workers or 2 * pilots * int(pilot_options["cores"])  # the next call waits there
            return _Desk(queue, owns_queue=True, has_pilots=pilots > 0)
        except BaseException:
            queue.close()
            raise

    @property
    def queue(self) -> Queue:
        """The queue it submits to."""
        return self._desk.queue

    @property
    def _max_workers(self) -> int:
        """What dask asks a pool for: how many calls to keep going at a time."""
        return self._workers or max(WORKERS, self.queue.cores)

    def with_options(self, **options: Any) -> Self:
        """The same executor with task options, as `Task.set` takes them, for what is submitted through it.

        ``executor.with_options(cores=4, tag="fit").submit(fit, data)``. Everything else is shared: shutting one down
        shuts down all.

        Raises:
            UsageError: an unknown option or bad value, by name.
        """
        other = copy.copy(self)
        other._options = changed(self._options, options)
        return other

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> TaskFuture[T]:
        """Queue ``fn(*args, **kwargs)``; returns its future.

        Raises:
            UsageError: ``fn`` is not a function.
            RuntimeError: the executor was shut down.
            BrokenExecutorError: nothing can run any more.
        """
        return self._desk.submit(_Call(fn, args, kwargs, self._options, self._desk))

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
        **more: Any,
    ) -> Iterator[T]:  # fmt: skip
        """The values of ``fn`` of each item of the iterables, in order; ``chunksize`` items go in one task.

        As in the standard library all are submitted at once and values waited for as they are taken; `Queue.map` reads
        its input as values are taken. ``buffersize`` works where the interpreter has it (3.14).

        Raises:
            ValueError: ``chunksize`` is less than 1.
            TimeoutError: from the iterator: a value was not there ``timeout`` seconds after the call.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **more)
        lists = flow.chunks(zip(*iterables, strict=False), chunksize)
        return chain.from_iterable(super().map(_each_of(fn), lists, timeout=timeout, **more))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take nothing more; when all is done, end the pilots and close the queue, if they are its own.

        ``wait`` waits for that; otherwise it happens in the background. ``cancel_futures`` cancels what has not begun.
        May be called again.
        """
        self._desk.shutdown(wait, cancel_futures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As `shutdown`; when the block was interrupted (Ctrl-C, SystemExit), everything is cancelled."""
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._desk.shutdown(wait=True, cancel_futures=interrupted, kill=interrupted)

    def __repr__(self) -> str:
        return f"<hpcq.Executor on {self.queue!r}>"


def _cores(workers: int | None, pilots: int, batch: str) -> int:
    if workers is not None:
        return -(-workers // max(1, pilots))
    return max(1, len(os.sched_getaffinity(0)) // max(1, pilots)) if batch == "local" else 1


def _each_of(function: Callable[..., T]) -> Callable[[list[tuple[Any, ...]]], list[T]]:
    """``function`` of each tuple of arguments of a list."""

    def call(items: list[tuple[Any, ...]]) -> list[T]:
        return [function(*arguments) for arguments in items]

    return call
