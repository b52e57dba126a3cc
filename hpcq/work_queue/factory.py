"""`Factory`: keeps as many workers for a queue as its tasks need, between a minimum and a maximum.

A thread looks every `CYCLE` seconds, and at once when something is changed: it asks the queue's program for its tasks
and pilots, submits pilots through the batch system, and cancels those that have been idle for ``timeout`` seconds. The
queue may be this program's or another's: it is found by its name, as by ``hpcq submit-pilots``.

Failure cases: a batch system that refuses, or a queue that cannot be reached, is logged and tried again at the next
look; ``factory_timeout`` seconds without the queue end the factory. The first look is made by `Factory.start`, whose
errors are the caller's. At the end its jobs are cancelled. May not live here: how many (see `demand`).
"""

from __future__ import annotations

import atexit
import logging
import shlex
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from hpcq import client, state_dir
from hpcq import connection as conn
from hpcq.batch.base import BatchJob, BatchSystem, batch_system_names, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.errors import HpcqError
from hpcq.work_queue.constants import unsupported
from hpcq.work_queue.debug import cctools_debug_config_file, set_debug_flag
from hpcq.work_queue.demand import Idleness, Limits

if TYPE_CHECKING:
    from hpcq.work_queue.queue import WorkQueue

log = logging.getLogger("hpcq.work_queue")

CYCLE = 30.0
"""Seconds between two looks, as in Work Queue."""

NUMBERS = ("min_workers", "max_workers", "workers_per_cycle", "tasks_per_worker", "timeout", "cores")
WHILE_RUNNING = frozenset((*NUMBERS, "memory", "disk", "gpus", "factory_timeout"))
OPTIONS = WHILE_RUNNING | {
    "batch_type", "batch_options", "manager_name", "scratch_dir", "python_env", "python_package", "debug", "debug_file",
    "password", "ssl", "wrapper",
}  # fmt: skip
"""Attributes that are honoured."""

ELSEWHERE = {
    "amazon_config": "Amazon is no batch system of hpcq",
    "autosize": "say how many cores a worker has",
    "capacity": "max_workers bounds the workers",
    "catalog": "there is no catalog",
    "condor_requirements": "HTCondor is no batch system of hpcq",
    "config_file": "set the attributes; they may be changed while it runs",
    "debug_file_size": "the debug log is not rotated",
    "env": "use submit_pilots(variables=…) of the queue's hpcq_queue",
    "extra_options": "workers are pilots of hpcq; use hpcq submit-pilots for their options",
    "foremen_name": "there are no foremen",
    "k8s_image": "Kubernetes is no batch system of hpcq",
    "k8s_worker_image": "Kubernetes is no batch system of hpcq",
    "mesos_master": "Mesos is no batch system of hpcq",
    "mesos_path": "Mesos is no batch system of hpcq",
    "mesos_preload": "Mesos is no batch system of hpcq",
    "run_factory_as_manager": "a factory is a thread of its program",
    "runos": "use a template: hpcq submit-pilots --template",
    "worker_binary": "workers are pilots of hpcq",
    "wrapper_input": "use a template: hpcq submit-pilots --template",
}
"""Attributes of Work Queue's factory that are not honoured, and why."""


class Factory:
    """Workers for a queue, through a batch system. See the table in `hpcq.work_queue`.

    Args:
        batch_type: a batch system of hpcq (``local``, ``slurm``, …).
        manager: the `WorkQueue` of this program; or else
        manager_host_port: ``HOST:PORT`` of a queue of this user's, found by its connection file; or else
        manager_name: the name of a queue.
        factory_binary: refused.
        worker_binary: refused.
        log_file: a file for hpcq's debug messages.

    Raises:
        ValueError: no queue is named, or an unknown batch system.
        NotImplementedError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        batch_type: str = "local",
        manager: WorkQueue | None = None,
        manager_host_port: str | None = None,
        manager_name: str | None = None,
        factory_binary: str | None = None,
        worker_binary: str | None = None,
        log_file: str | None = None,
    ) -> None:
        if not (manager or manager_host_port or manager_name):
            raise ValueError("Either manager, manager_host_port, or manager_name or manager should be specified.")
        for what, value in (("factory_binary", factory_binary), ("worker_binary", worker_binary)):
            if value is not None:
                unsupported(f"Factory({what}=…)", "workers are pilots of hpcq")
        if batch_type not in batch_system_names():
            if batch_type == "torque" and "pbs" in batch_system_names():
                batch_type = "pbs"
            else:
                known = ", ".join(batch_system_names())
                unsupported(f"batch_type={batch_type!r}", f"the batch systems are {known}")
        if log_file not in (None, "/dev/null"):
            cctools_debug_config_file(log_file)
        self._manager = manager
        self._host_port = manager_host_port
        self._options: dict[str, Any] = {"batch_type": batch_type, "manager_name": manager_name}
        self._jobs: dict[str, BatchJob] = {}
        self._idleness = Idleness()
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._reached_at = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._options:
            return self._options[name]
        if name in Limits._field_defaults:
            return Limits._field_defaults[name]
        if name in OPTIONS:
            raise KeyError(f"{name} is a valid factory attribute, but has not been set yet.")
        return self._refuse(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        if name not in OPTIONS:
            self._refuse(name)
        if self._thread is not None and name not in WHILE_RUNNING:
            raise AttributeError(f"{name} cannot be changed once the factory is running.")
        if name == "wrapper":
            unsupported("Factory.wrapper", "use a template: hpcq submit-pilots --template")
        if name == "debug":
            set_debug_flag(*str(value).split(","))
        elif name == "debug_file":
            cctools_debug_config_file(value)
        self._options[name] = value
        self._changed.set()

    def _refuse(self, name: str) -> NoReturn:
        if name in ELSEWHERE:
            unsupported(f"Factory.{name}", ELSEWHERE[name])
        raise AttributeError(f"{name} is not a supported option")

    def specify_environment(self, env: str) -> None:
        """The workers' Python environment: a directory they see, or an archive of ``hpcq pack-environment``."""
        self.python_env = env

    specify_package = specify_environment

    # --- its life ---

    def start(self) -> Self:
        """Submit the first workers and go on in a thread; when it runs already, look again at once.

        Raises:
            HpcqError: the queue is not known, the batch system refused, or an attribute cannot be used.
        """
        if self._thread is not None:
            self._changed.set()
            return self
        self._stopping.clear()
        self._reached_at = time.monotonic()
        self._look()
        self._thread = threading.Thread(target=self._run, name="hpcq-factory", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)
        return self

    def stop(self) -> None:
        """End the thread and cancel the workers it submitted.

        Raises:
            RuntimeError: it was not started.
        """
        if self._thread is None:
            raise RuntimeError("Factory not yet started")
        self._stopping.set()
        self._changed.set()
        self._thread.join()
        self._thread = None
        atexit.unregister(self._at_exit)
        self._cancel(list(self._jobs))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _at_exit(self) -> None:
        with suppress(RuntimeError):
            self.stop()

    def _run(self) -> None:
        while True:
            self._changed.wait(CYCLE)
            self._changed.clear()
            if self._stopping.is_set():
                return
            try:
                self._look()
            except HpcqError as error:
                log.warning("the factory could not look after its workers: %s", error)
                limit = self._options.get("factory_timeout")
                if limit and time.monotonic() - self._reached_at > float(limit):
                    log.warning("the factory ends: its queue could not be reached for %s s", limit)
                    return
            except Exception:
                log.exception("the factory failed; it tries again in %.0f s", CYCLE)

    # --- one look ---

    def _look(self) -> None:
        queue = self.queue_name
        tasks, busy = self._ask(queue)
        limits = Limits(**{name: self._options[name] for name in NUMBERS if name in self._options})
        system = self._system()
        if self._jobs:
            for number, status in system.status(list(self._jobs.values())).items():
                if status.state.is_final:
                    del self._jobs[number]
        now = time.monotonic()
        self._idleness.look({job: busy[job] for job in self._jobs if job in busy}, now)
        self._cancel(self._idleness.to_end(limits, len(self._jobs), now))
        count = limits.to_submit(tasks, len(self._jobs))
        if count:
            request = pilot_request(queue, system.name, count, self._pilot_options(limits))
            self._jobs.update((job.id, job) for job in system.submit(request))
            with suppress(HpcqError):  # a queue whose program starts later finds them itself
                client.ask(queue, "jobs_submitted")

    def _ask(self, queue: str) -> tuple[int, dict[str, bool]]:
        """How many tasks wait, run or are still to come; and which jobs have something to do."""
        from hpcq.work_queue.queue import RUNNING  # noqa: PLC0415 - queues know nothing of factories

        info = conn.read(conn.create(queue))
        if not info.port:
            return 0, {}  # its program has not been started yet
        counts = client.ask(queue, "status")["tasks"]
        pilots = client.ask(queue, "pilots")
        self._reached_at = time.monotonic()
        beside = RUNNING.get(queue)
        extra = beside.tasks_left if beside is not None else 0
        busy = {pilot["job_id"]: pilot["cores_busy"] > 0 for pilot in pilots}
        return counts["waiting"] + counts["sent"] + counts["running"] + extra, busy

    def _pilot_options(self, limits: Limits) -> dict[str, Any]:
        given = self._options
        environment = given.get("python_env") or given.get("python_package")
        options = {name: given.get(name) for name in ("memory", "disk", "gpus")}
        options |= {"cores": limits.cores, "scratch": given.get("scratch_dir"), "environment": environment}
        if given.get("batch_options"):
            options["options"] = shlex.split(given["batch_options"])
        return options

    def _system(self) -> BatchSystem:
        return get_batch_system(self._options["batch_type"])

    def _cancel(self, numbers: list[str]) -> None:
        jobs = [self._jobs[number] for number in numbers]
        if not jobs:
            return
        try:
            self._system().cancel(jobs)
        except HpcqError as error:
            log.warning("workers could not be cancelled: %s", error)
            return
        for number in numbers:
            del self._jobs[number]

    @property
    def queue_name(self) -> str:
        """The name of its queue as hpcq knows it.

        Raises:
            HpcqError: no queue of this user's listens on that port.
        """
        if self._manager is not None:
            return self._manager.hpcq_queue.name
        if self._options.get("manager_name"):
            return str(self._options["manager_name"])
        return _queue_on(str(self._host_port))


def _queue_on(host_port: str) -> str:
    """The queue whose connection file names this port."""
    host, _, port = host_port.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("manager_host_port is not of the form HOST:PORT")
    for name in state_dir.known_queues():
        with suppress(HpcqError):
            if conn.find(name).port == int(port):
                return name
    raise HpcqError(f"no queue here listens on port {port}; give Factory the WorkQueue itself, or its name")
