"""`Queue`: what users submit tasks to and wait on. The thin side in the user's own threads.

Here tasks are pickled (so that their arguments are as they were at ``submit``), numbered and handed to the manager's
thread; finished ones come back through a `Mailbox`. Other ways of waiting (`hpcq.futures`, `hpcq.flow`) bring their own
`Receiver`, and their tasks never come out of `Queue.wait`. May not live here: scheduling, sockets, batch commands.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from hpcq import addresses, config, flow, lock
from hpcq import state_dir as places
from hpcq.credentials import GatewayCredentials
from hpcq.dispatch import Finished
from hpcq.errors import QueueClosedError, SerializationError, UsageError
from hpcq.inquiry import Inquiry
from hpcq.jobs import JobWatch
from hpcq.journal import Journal, default_path
from hpcq.mailbox import Mailbox, Receiver
from hpcq.manager import Manager
from hpcq.options import whole_number
from hpcq.outcome import Attempt, Outcome
from hpcq.packing import Packer
from hpcq.roster import PilotView
from hpcq.scaling import Scaling
from hpcq.scheduler import MODES, CategorySet, HostBlocked, HostUnblocked, SpeculationSet
from hpcq.task import Task

T = TypeVar("T")
R = TypeVar("R")


class Queue:
    """Tasks go in with `submit`, come out of `wait` when they are done; pilots do the work meanwhile.

    Listens at once, encrypted and authenticated, and writes a connection file that pilots and the command line find
    by the queue's name. Use it as a context manager: at the end its pilots are sent away and its batch jobs cancelled
    (unless ``keep_pilots``), also when the program is interrupted.

    Args:
        name: how ``hpcq submit-pilots --name`` calls it: letters, digits and ``._-``; made up when not given.
        address: the address or name to listen on; all of this host's when not given, and pilots try them in turn.
            This, ``interface``, ``port``, ``journal``, ``state_dir`` can be set in ``config.toml`` too, or by
            ``HPCQ_ADDRESS`` …
        interface: the network interface (``"ib0"``) whose address to listen on, instead.
        port: the port, or a range (``"20000-20100"``) of which the first free one is taken; any free one when 0.
        journal: note what becomes of each task and pilot, for ``hpcq report``: True (in the queue's directory: give it
            a name) or a path. Not unless it is asked for.
        state_dir: a directory that the compute nodes see; the queue's files go to ``state_dir/name``, else to
            ``~/.local/state/hpcq/name``. The command line is told by ``--state-dir``.
        keep_pilots: leave batch jobs alone at the end; their pilots wait for a program with the same queue name.
        speculate: give a task that has run this many times longer than others of its category (or function) did a copy
            on another pilot, where there is room; the first result counts. Never by default: a task may run twice.

    Raises:
        UsageError: the name cannot be used, or another running program serves that queue; no such address or interface.
        HpcqError: the address cannot be listened on.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        address: str | None = None,
        interface: str | None = None,
        port: int | str | Sequence[int] | None = None,
        journal: bool | str | os.PathLike[str] | None = None,
        state_dir: str | os.PathLike[str] | None = None,
        keep_pilots: bool = False,
        speculate: float | None = None,
    ) -> None:
        _check_speculate(speculate)
        given = {"address": address, "interface": interface, "port": port, "journal": journal, "state_dir": state_dir}
        settings = config.resolve_queue(given).values
        where = addresses.place(settings.get("address"), settings.get("interface"))
        candidates = addresses.ports(settings["port"])
        self._temporary = name is None
        self.name = name or f"queue-{os.getpid()}-{secrets.token_hex(3)}"
        self.keep_pilots = keep_pilots
        self._mailbox = Mailbox()
        self._numbering = threading.Lock()
        self._next_id = 1
        self._elsewhere: dict[int, Receiver] = {}  # for the tasks that do not go to the mailbox
        self._failure: BaseException | None = None
        self._closed = False
        self._journal: Journal | None = None
        self._owner = os.getpid()
        self._place = lock.Place(self.name, settings.get("state_dir"))
        try:
            self._manager = Manager(self.name, self._deliver, self._fail, GatewayCredentials(self.name), speculate)
            self._packer = Packer(self._manager.depot.shelf)
            self.connection = self._manager.start(*where, candidates)
            try:
                self._jobs = JobWatch(self.name, self._manager)
                self._scaling = Scaling(self.name, self._manager, self._jobs)
                self._inquiry = Inquiry(
                    self.name, self._manager, self._scaling, self._jobs, self._unfinished, lambda: self._next_id - 1
                )
                self._keep_journal(settings["journal"])
            except BaseException:
                self._manager.stop(0)
                raise
        except BaseException:
            self._place.leave()
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
        return self._submit(task, None)

    def submit_to(self, receiver: Receiver, task: Task) -> int:
        """As `submit`; when it is done the task goes to ``receiver``, not to any `wait`."""
        return self._submit(task, receiver)

    def _submit(self, task: Task, receiver: Receiver | None) -> int:
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
        try:
            submission = self._packer.pack(task, number)
        except SerializationError as error:
            self._expect(number, task, receiver)
            self._deliver([Finished(number, Attempt(Outcome.UNSERIALIZABLE, str(error)))])
            return number
        except UsageError:  # its files cannot be as they are: as if it had never been submitted
            task.id = task.submitted_at = None
            raise
        self._expect(number, task, receiver)
        self._manager.submit(submission)
        return number

    def _expect(self, number: int, task: Task, receiver: Receiver | None) -> None:
        if receiver is None:
            self._mailbox.expect(number, task)
            return
        receiver.expect(number, task)
        self._elsewhere[number] = receiver
        if self._failure is not None:  # it came between: the receiver was not told
            receiver.fail(self._failure)

    def category(
        self, name: str, mode: str = "fixed", *, memory: int = 0, disk: int = 0, max_memory: int = 0, max_disk: int = 0
    ) -> None:
        """Say how tasks of a category get memory and disk that they do not ask for themselves. Call it before submit.

        Args:
            name: the category.
            mode: ``"fixed"``: as given here; ``"max"``: the most that its tasks were seen to use; ``"max_throughput"``:
                what finishes most tasks for the memory there is. With the latter two, a task that ends as
                ``resources`` runs again with more, at last on a whole pilot.
            memory: MB for each task, or the first guess until enough tasks have ended (0: no limit).
            disk: the same for disk.
            max_memory: MB that no task gets more of (0: all that a pilot has).
            max_disk: the same for disk.

        Raises:
            UsageError: an unknown mode or a bad value.
        """
        if not isinstance(name, str) or not name:
            raise UsageError(f"a category's name must be a string, not {name!r}")
        if mode not in MODES:
            raise UsageError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
        sizes = [("memory", memory), ("disk", disk), ("max_memory", max_memory), ("max_disk", max_disk)]
        self._manager.tell(CategorySet(name, mode, *(whole_number(option, value, 0) for option, value in sizes)))

    def cancel(self, *, id: int | None = None, tag: str | None = None, category: str | None = None) -> int:
        """End tasks by id, tag or category, queued or running; each still comes out of `wait`, as ``cancelled``.

        Tasks of an `Executor` or a `map` on this queue are among them. Returns how many were asked to end. With no
        argument, all.
        """
        boxes = [self._mailbox, *set(self._elsewhere.copy().values())]
        return self.cancel_ids(
            number
            for box in boxes
            for number, task in box.expected().items()
            if (id is None or number == id)
            and (tag is None or task.options.tag == tag)
            and (category is None or task.options.category == category)
        )

    def cancel_ids(self, ids: Iterable[int]) -> int:
        """End these tasks, those that are done already left out; returns how many were asked to end."""
        chosen = [number for number in ids if number in self._elsewhere or self._mailbox.expects(number)]
        if chosen and not self._closed:
            self._manager.cancel(chosen)
        return len(chosen)

    # --- many at once ---

    def map(self, fn: Callable[[T], R], seq: Iterable[T], chunksize: int = 1, **options: Any) -> Iterator[R]:
        """The values of ``fn(item)`` in the order of ``seq``, ``chunksize`` items to a task; ``options`` as `Task.set`.

        Begins at once and yields values as they come. However long ``seq`` is, only some thousand tasks are out at a
        time: it is read as values are taken. Other tasks of the queue go on beside; `wait` sees none of these. When one
        fails, its exception is raised in its place and the rest are cancelled; so they are when the iterator is closed
        or dropped.

        Raises:
            UsageError: ``chunksize`` is less than 1, or an unknown or bad option.
            BaseException: from the iterator: what ``fn`` raised, its remote traceback as ``__cause__``.
            TaskFailedError: from the iterator: a task ended in another way than success.
            QueueClosedError: the queue was closed before all was done.
        """
        return flow.map_over(self, fn, seq, chunksize, options)

    def pair(
        self, fn: Callable[[tuple[Any, Any]], R], a: Iterable[Any], b: Iterable[Any], chunksize: int = 1, **options: Any
    ) -> Iterator[R]:
        """The values of ``fn((x, y))`` for every x of ``a`` and y of ``b``, the last varying fastest; else as `map`.

        As in Work Queue, ``fn`` takes the pair as one argument.
        """
        return flow.map_over(self, fn, itertools.product(a, b), chunksize, options)

    def tree_reduce(self, fn: Callable[[list[T]], T], seq: Iterable[T], chunksize: int = 2, **options: Any) -> T:
        """One value from many: ``fn`` of every ``chunksize`` neighbours, then of their values, until one is left.

        As in Work Queue, ``fn`` takes a list (as ``sum`` and ``max`` do); it must be associative. A value left over at
        the end of a round is passed on as it is. Waits for the value; errors as in `map`.

        Raises:
            UsageError: ``chunksize`` is less than 2, ``seq`` is empty, or an unknown or bad option.
        """
        return flow.tree_reduce(self, fn, seq, chunksize, options)

    # --- waiting ---

    def _keep_journal(self, where: bool | str | os.PathLike[str]) -> None:
        if where is not False:
            path = default_path(self.name) if where is True else Path(where)
            self._journal = Journal(path, self.pilots, lambda: self._next_id - 1)
            self._jobs.on_pilot_change = self._journal.pilot_changed

    def _deliver(self, finished: list[Finished]) -> None:
        if self._journal is not None:
            self._journal.finished((self._unfinished(number), attempt) for number, attempt in finished)
        if not self._elsewhere:
            self._mailbox.put(finished)
            return
        boxes: dict[Receiver, list[Finished]] = {}
        for one in finished:
            boxes.setdefault(self._elsewhere.pop(one.id, self._mailbox), []).append(one)
        for box, theirs in boxes.items():
            box.put(theirs)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._mailbox.fail(error)
        for receiver in set(self._elsewhere.copy().values()):
            receiver.fail(error)

    def wait(self, timeout: float | None = None) -> Task | None:
        """The next task that is done, in order of finishing; None when none was within ``timeout`` seconds.

        Without a timeout it waits until a task is done; None at once when there is nothing left to wait for.

        Raises:
            QueueClosedError: the queue was closed with tasks unfinished, or its manager failed.
        """
        return self._mailbox.take(self._mailbox.first, self._mailbox.expects_any, timeout)

    def wait_for_tag(self, tag: str, timeout: float | None = None) -> Task | None:
        """As `wait`, for tasks with this tag only; None at once when no task with it is left."""
        box = self._mailbox
        return box.take(lambda: box.first_tagged(tag), lambda: box.expects_tagged(tag), timeout)

    def wait_for_id(self, id: int, timeout: float | None = None) -> Task | None:
        """As `wait`, for one task; None at once when it was already waited for or never submitted."""
        box = self._mailbox
        return box.take(lambda: box.has(id), lambda: box.expects(id), timeout)

    def empty(self) -> bool:
        """Whether every submitted task has been returned by a `wait`; tasks that do not come out of it do not count."""
        return self._mailbox.empty

    def hungry(self) -> int:
        """How many more one-core tasks would keep the pilots busy: their cores that no waiting task can use."""
        return self._manager.call(lambda: self._manager.free_places)

    def explain(self, id: int) -> str:
        """Why a task is not running: what no pilot meets, how many wait before it; or where it runs and since when."""
        return self._inquiry.explain(id)

    def _unfinished(self, number: int) -> Task | None:
        receiver = self._elsewhere.get(number)
        return self._mailbox.expected_task(number) if receiver is None else receiver.expected().get(number)

    def running(self, ids: Collection[int]) -> set[int]:
        """Those of these tasks that have begun, as far as their pilots have told."""
        return set() if self._closed else self._inquiry.running(ids)

    # --- pilots ---

    def submit_pilots(self, count: int = 1, *, batch: str | None = None, **options: Any) -> list[Any]:
        """Put ``count`` jobs with pilots through a batch system (``"local"`` by default); returns them.

        Takes what ``hpcq submit-pilots`` takes: ``nodes`` (a pilot on each), ``cores``, ``memory`` and ``disk`` (MB or
        ``"32GB"``), ``gpus``, ``walltime`` (s or ``"8:00:00"``), ``partition``, ``account``, ``qos``, ``constraint``,
        ``reservation``, ``exclusive``, ``mail``, ``options``, ``modules``, ``setup``, ``epilogue``, ``template``,
        ``environment``, ``variables`` (set in the script), ``vpn``, ``gateway`` (``"a,b"``), ``require``, ``scratch``,
        ``direct`` (networks reached from the node itself), ``dtls``, ``mtu``, ``tls`` and ``probe_interval`` (s) of
        the tunnel; ``server``, ``user``, ``servercert``, ``password_file``, ``certificate``, ``sslkey``: a VPN server
        of your own;
        ``cvmfs`` (``"cms.cern.ch,…"`` or a list), ``cvmfs_image``, ``cvmfs_proxy``, ``cvmfs_server``, ``cvmfs_key``,
        ``cvmfs_cache``, ``cvmfs_quota``, ``connection`` (``"inline"``: nodes need not see our files), ``cache_size``,
        ``manager_timeout``, ``drain_timeout``; and ``site``, a name whose settings stand behind what is given here (see
        ``hpcq config``).

        Raises:
            UsageError: an unknown or bad option.
            TemplateError: the template cannot be rendered.
            BatchError: the batch system refused or did not answer.
        """
        return self._jobs.submit(count, batch=batch, **options)

    def autoscale(
        self,
        batch: str | None = None,
        *,
        min: int = 0,
        max: int = 10,
        step: int = 5,
        interval: float = 30.0,
        backlog: int = 20,
        idle_timeout: float = 300.0,
        site: str | None = None,
        **options: Any,
    ) -> None:
        """Submit pilots as the waiting tasks need them, and send idle ones away, from now on. May be called again.

        Which and how many tasks wait counts, what they take and how long their kind lasts. When ten submissions in a
        row are refused, or three pilots in a row never come to serve, it pauses and says why in the log, in `explain`
        and to ``hpcq autoscale``; setting the limits again, here or by ``hpcq autoscale set``, resumes it.

        Args:
            batch: the batch system, ``"local"`` by default.
            min: pilots kept, with or without work.
            max: pilots there are at most.
            step: jobs submitted in ``interval`` seconds at most.
            interval: seconds.
            backlog: jobs of its own that wait in the batch system at most.
            idle_timeout: seconds without work after which a pilot is sent away.
            site: a name whose settings stand behind the options.
            options: as in `submit_pilots`.

        Raises:
            UsageError: an unknown or bad option.
            TemplateError: the template cannot be rendered.
        """
        limits = {"min": min, "max": max, "step": step, "interval": interval, "backlog": backlog}
        self._scaling.start(batch, site, {**limits, "idle_timeout": idle_timeout}, options)

    def wait_for_pilots(self, count: int = 1, timeout: float | None = None) -> list[PilotView]:
        """Wait until ``count`` pilots are ready; returns those that are, fewer after ``timeout`` seconds.

        Raises:
            PilotFailedError: a pilot says that it cannot serve, and why.
            QueueClosedError: the queue was closed.
        """
        ready = self._manager.when_ready(count)
        try:
            ready.result(timeout)
        except TimeoutError:
            ready.cancel()
        return [pilot for pilot in self.pilots() if pilot.state == "ready"]

    def block_host(self, host: str, seconds: float | None = None) -> None:
        """Place nothing more on a host, for so many seconds or for good; what runs there may finish.

        Hosts where tasks crash or pilots fail to start several times in a row, while others do fine, are blocked for
        a quarter of an hour without being asked; `pilots` and `explain` say so.

        Raises:
            UsageError: not a host's name, or a time that is not positive.
        """
        _check_host(host)
        if seconds is not None and not (isinstance(seconds, int | float) and seconds > 0):
            raise UsageError(f"seconds must be a positive number or None, not {seconds!r}")
        self._manager.tell(HostBlocked(host, math.inf if seconds is None else float(seconds)))

    def speculate(self, times: float | None) -> None:
        """From now on what ``Queue(speculate=times)`` does; None: no more copies.

        Raises:
            UsageError: not a number of times.
        """
        _check_speculate(times)
        self._manager.tell(SpeculationSet(times))

    def unblock_host(self, host: str) -> None:
        """Use a host again."""
        _check_host(host)
        self._manager.tell(HostUnblocked(host))

    def pilots(self) -> list[PilotView]:
        """Every pilot that has connected so far, ended ones included."""
        return self._manager.pilots()

    @property
    def cores(self) -> int:
        """Cores of the pilots that are connected and ready."""
        return self._manager.call(lambda: self._manager.cores)

    def on_pilot_end(self, told: Callable[[], None]) -> None:
        """Have ``told`` called, in the manager's thread, when a pilot hung up or a batch job has ended."""
        self._jobs.on_end = told

    def why_deserted(self) -> str:
        """Why no pilot is there or, as far as the batch systems have told, will come; empty while one may.

        Pilots that are submitted elsewhere only count once they, or ``hpcq submit-pilots``, have reported.
        """
        return self._inquiry.why_deserted()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of tasks by state and outcome, of pilots by state, and of cores."""
        return self._manager.call(self._manager.status)

    # --- end ---

    def close(self) -> None:
        """Send the pilots away, cancel the batch jobs (unless ``keep_pilots``), stop listening. May be called twice."""
        if self._closed or os.getpid() != self._owner:  # a fork of the program has no manager and owns nothing
            return
        if self._manager.is_this_thread:  # as when the garbage collector finds who was to close us: we wait for it
            threading.Thread(target=self.close, name=f"hpcq-{self.name}-close").start()
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            with contextlib.suppress(OSError):
                places.connection_file(self.name).unlink()
            self._scaling.stop()
            self._jobs.stop()
            if self._journal is not None:
                self._journal.close()
            if self.keep_pilots:
                self._manager.stop(0)
            else:
                self._manager.stop()
                self._jobs.cancel_all()
        finally:
            self._fail(QueueClosedError("it was closed"))
            self._place.leave()
            self._remove_if_temporary()

    def _remove_if_temporary(self) -> None:
        if self._temporary and not self.keep_pilots:
            if not self._jobs.any_left:
                shutil.rmtree(places.queue_dir(self.name), ignore_errors=True)
            places.identity_file(self.name).unlink(missing_ok=True)  # nobody will trust its keys again

    def __repr__(self) -> str:
        return f"<hpcq.Queue {self.name!r} port {self.connection.port} {'closed' if self._closed else 'open'}>"


def _check_speculate(times: object) -> None:
    if times is not None and not (isinstance(times, int | float) and 1 < times < math.inf):
        raise UsageError(f"speculate must be a number of times more than 1, or None, not {times!r}")


def _check_host(host: object) -> None:
    if not isinstance(host, str) or not host:
        raise UsageError(f"a host's name must be a string, not {host!r}")
