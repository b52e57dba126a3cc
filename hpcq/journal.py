"""What a queue's programs did, on disk: one row for each run, pilot and finished task, for ``hpcq report``.

A thread of its own writes what has come, every `INTERVAL` seconds in one transaction, so a program that is killed loses
the last moment of it and nothing before. Tasks cost the manager one tuple each. A journal that cannot be written (disk
full, quota) is tried again and logged once; tasks do not wait for it. It holds no values, arguments or output.

SQLite in its plain mode, without shared memory: state directories are on network file systems. Who may read the file is
up to its directory and its mode, 0600. A task costs about 30 µs of CPU time and 300 bytes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcq import state_dir
from hpcq.errors import HpcqError, UsageError
from hpcq.outcome import Attempt
from hpcq.roster import PilotView
from hpcq.task import PythonTask, Task

log = logging.getLogger("hpcq.journal")

INTERVAL = 1.0
"""Seconds between two writes."""
PILOTS_INTERVAL = 10.0
"""Seconds between two looks at the pilots, while none comes or ends."""
KEPT = 1_000_000
"""Rows kept in memory while they cannot be written; the oldest are dropped."""
LAST_WRITE = 20.0
"""Seconds the last write may take at the end."""
MESSAGE = 500
"""Characters of a message that are kept."""
MOST = (1 << 63) - 1
"""What SQLite has as an integer."""
VERSION = 1
_TABLES = """
create table if not exists runs (
    id integer primary key, began real, seen real, ended real, hostname text, pid integer, submitted integer);
create table if not exists tasks (
    run integer, id integer, kind text, tag text, outcome text, attempts integer, pilot text, hostname text,
    cores integer, submitted real, started real, finished real, cpu real, memory real, disk real,
    exit_code integer, message text);
create table if not exists pilots (
    run integer, name text, batch text, job text, hostname text, cores integer, came real, seen real, state text,
    tunnel text, tasks integer, message text, primary key (run, name)) without rowid;
"""


class TaskRow(NamedTuple):
    """A finished task. Times are wall-clock seconds, those of its attempt by the pilot's clock; MB and CPU seconds.

    ``kind`` is its category, else the function's name or the command's first word.
    """

    id: int
    kind: str
    tag: str | None
    outcome: str
    attempts: int
    pilot: str | None
    hostname: str | None
    cores: int
    submitted: float | None
    started: float | None
    finished: float | None
    cpu: float
    memory: float
    disk: float
    exit_code: int | None
    message: str


class PilotRow(NamedTuple):
    """A pilot; ``seen`` is when it was last there, within `PILOTS_INTERVAL` seconds."""

    name: str
    batch: str
    job: str
    hostname: str
    cores: int
    came: float
    seen: float
    state: str
    tunnel: str
    tasks: int
    message: str


class Run(NamedTuple):
    """One program. ``ended`` is None while it runs, and for good if it was killed; ``seen``: its last sign of life."""

    id: int
    began: float
    seen: float
    ended: float | None
    hostname: str
    pid: int
    submitted: int
    tasks: Sequence[TaskRow] = ()
    pilots: Sequence[PilotRow] = ()


def task_row(task: Task, attempt: Attempt) -> TaskRow:
    """What is kept of a task."""
    options = task.options
    if options.category:
        kind = options.category
    elif isinstance(task, PythonTask):
        kind = task.summary
    else:
        kind = (task.command.split(None, 1) or [""])[0][:60]
    message = attempt.message[:MESSAGE]
    return TaskRow(
        task.id or 0, kind, options.tag, attempt.outcome.value, attempt.attempts, attempt.pilot, attempt.hostname,
        options.cores, task.submitted_at, attempt.started_at, attempt.finished_at,
        attempt.cpu, attempt.memory, attempt.disk, attempt.exit_code, message,
    )  # fmt: skip


def default_path(queue: str) -> Path:
    """Where the journal of a queue is, unless its program says otherwise."""
    return state_dir.queue_dir(queue) / "journal.sqlite"


class Journal:
    """Writes one run. ``pilots`` gives those there are, ``submitted`` how many tasks have been.

    Raises:
        UsageError: the file cannot be made, or is something else.
    """

    def __init__(self, path: Path, pilots: Callable[[], Sequence[PilotView]], submitted: Callable[[], int]) -> None:
        self.path = path
        self._pilots = pilots
        self._submitted = submitted
        self._rows: list[TaskRow] = []
        self._known: dict[str, PilotRow] = {}
        self._lock = threading.Lock()
        self._look = threading.Event()
        self._over = threading.Event()
        self._failed = False
        try:
            self._run = self._begin()
        except (sqlite3.Error, OSError) as error:
            raise UsageError(f"the journal {path} cannot be written: {error}") from error
        self._thread = threading.Thread(target=self._write_on, name="hpcq-journal", daemon=True)
        self._thread.start()

    def _begin(self) -> int:
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with _opened(self.path) as database:
            if not database.execute("select count(*) from sqlite_master").fetchone()[0]:
                database.executescript(_TABLES)
                database.execute(f"pragma user_version = {VERSION}")
            _check_version(database, self.path)
            now = time.time()
            made = database.execute(
                "insert into runs (began, seen, hostname, pid, submitted) values (?, ?, ?, ?, 0)",
                (now, now, socket.gethostname(), os.getpid()),
            )
            return int(made.lastrowid or 0)

    def finished(self, tasks: Iterable[tuple[Task | None, Attempt]]) -> None:
        """These tasks have ended. Does not wait."""
        rows = [task_row(task, attempt) for task, attempt in tasks if task is not None]
        with self._lock:
            self._rows += rows

    def pilot_changed(self) -> None:
        """A pilot has come or ended: have a look soon. Does not wait."""
        self._look.set()

    def close(self) -> None:
        """Write the rest. Nothing may come any more."""
        self._over.set()
        self._thread.join(LAST_WRITE)

    # --- in its own thread ---

    def _write_on(self) -> None:
        looked = 0.0
        while not self._over.wait(INTERVAL):
            due = self._look.is_set() or time.monotonic() - looked > PILOTS_INTERVAL
            if due or self._rows:
                looked = time.monotonic() if due else looked
                self._try(due)
        self._try(look=True, last=True)

    def _try(self, look: bool, *, last: bool = False) -> None:
        with self._lock:
            rows, self._rows = self._rows, []
        try:
            self._write(rows, self._changed() if look else [], last)
        except (sqlite3.Error, OSError) as error:
            if not self._failed:
                log.warning("the journal %s cannot be written, trying again from now on: %s", self.path, error)
            self._failed = True
            with self._lock:
                self._rows = (rows + self._rows)[-KEPT:]
        except Exception:  # a fault of ours: what it was about is left out, what follows is not
            log.exception("the journal %s leaves out %d tasks", self.path, len(rows))
        else:
            self._failed = False

    def _changed(self) -> list[PilotRow]:
        """Pilots of whom there is news."""
        self._look.clear()
        now, changed = time.time(), []
        try:
            views = self._pilots()
        except HpcqError:  # the manager has failed
            views = ()
        for view in views:
            known = self._known.get(view.name)
            ended = view.state in ("gone", "failed")
            row = PilotRow(
                view.name, view.batch, view.job_id, view.hostname, view.cores, view.connected_at,
                known.seen if known and known.state == view.state and ended else now, view.state,
                view.tunnel_kind or view.tunnel_mode, view.tasks_done, f"{view.failed_layer} {view.message}".strip(),
            )  # fmt: skip
            if row != known:
                changed.append(row)
                self._known[view.name] = row
        return changed

    def _write(self, rows: Sequence[TaskRow], pilots: Sequence[PilotRow], last: bool) -> None:
        now = time.time()
        with _opened(self.path) as database:
            marks = ",".join("?" * (len(TaskRow._fields) + 1))
            of_tasks = ((self._run, *map(_storable, row)) for row in rows)
            database.executemany(f"insert into tasks values ({marks})", of_tasks)  # noqa: S608
            marks = ",".join("?" * (len(PilotRow._fields) + 1))
            of_pilots = ((self._run, *map(_storable, row)) for row in pilots)
            database.executemany(f"insert or replace into pilots values ({marks})", of_pilots)  # noqa: S608
            database.execute(
                "update runs set seen = ?, ended = ?, submitted = ? where id = ?",
                (now, now if last else None, self._submitted(), self._run),
            )


def _storable(value: Any) -> Any:
    """As SQLite can have it: text in UTF-8, whatever is in file names, and integers of 64 bits."""
    if type(value) is str and not value.isascii():
        return value.encode(errors="backslashreplace").decode()
    if type(value) is int and value > MOST:
        return MOST
    return value


def read(path: Path, run: int | None = None) -> Run:
    """A run by its number, or the last one.

    Raises:
        UsageError: no journal there, no such run, or a file that is something else.
    """
    if not path.exists():
        raise UsageError(f"there is no journal {path}: a program keeps one with Queue(journal=True) or HPCQ_JOURNAL=1")
    try:
        with _opened(path) as database:
            _check_version(database, path)
            chosen = "(select max(id) from runs)" if run is None else "?"
            found = database.execute(f"select * from runs where id = {chosen}", () if run is None else (run,))  # noqa: S608
            row = found.fetchone()
            if row is None:
                raise UsageError(f"the journal {path} has no run {'' if run is None else run}".rstrip())
            tasks = database.execute("select * from tasks where run = ?", row[:1])
            pilots = database.execute("select * from pilots where run = ? order by came", row[:1])
            rows = [TaskRow(*one[1:]) for one in tasks]
            return Run(*row)._replace(tasks=rows, pilots=[PilotRow(*one[1:]) for one in pilots])
    except sqlite3.Error as error:
        raise UsageError(f"the journal {path} cannot be read: {error}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, for one transaction."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as database, database:
        yield database


def _check_version(database: sqlite3.Connection, path: Path) -> None:
    version = database.execute("pragma user_version").fetchone()[0]
    if version != VERSION:
        raise UsageError(f"{path} is no journal, or one of another version of hpcq ({version}); name another file")
