"""The batch jobs of a queue, as its program follows them: submitted, asked about, and cancelled at the end.

One `JobTracker` for each batch system decides when to ask and what an answer means; this shell asks, in a worker
thread of the manager's loop, and logs what users must know: a job whose pilot never reported, with the end of its
output; a batch system that does not answer. Jobs submitted by ``hpcq submit-pilots`` are followed too: it tells us, and
what was submitted before we started is found on disk.

Records of jobs are read and written in worker threads: a queue has thousands of them over the months, and home
directories are slow.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcq import config, servers
from hpcq.batch import records
from hpcq.batch.base import BatchJob, BatchSystem, JobState, JobStatus, PartlySubmittedError, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.batch.states import record_end, recorded_end
from hpcq.batch.tracker import Change, Ended, FailedStart, Forgotten, JobTracker, PollFailed, Requeued, StateChanged
from hpcq.errors import HpcqError, UsageError
from hpcq.manager import Manager

log = logging.getLogger("hpcq.jobs")

KEPT = 10_000
"""Jobs that have ended which are remembered, for reports that come late: a program may live for months."""
SETTLED = 3600.0
"""Seconds after which a submission has put all its jobs on record: those of some batch systems come one by one."""


class JobWatch:
    """Follows all jobs of one queue."""

    def __init__(self, queue: str, manager: Manager) -> None:
        self._queue = queue
        self._manager = manager
        self._trackers: dict[str, JobTracker] = {}
        self._systems: dict[str, BatchSystem] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._asking: set[str] = set()
        self._stopped = False
        self._last_failure = ""
        self._jobs: dict[str, BatchJob] = {}
        self._ended: deque[BatchJob] = deque()
        self._over: set[Path] = set()  # submissions of which nothing is left: their records are not read again
        self.on_failed_start: Callable[[str], None] = lambda _story: None
        self.on_end: Callable[[], None] = lambda: None
        self.on_pilot_change: Callable[[], None] = lambda: None
        manager.answer_to("jobs_submitted", self._on_submitted)
        manager.on_pilot = self._on_pilot
        manager.on_pilot_gone = self._on_pilot_gone
        found = self._submitted()
        manager.call(lambda: self.follow(found))

    def submit(self, count: int, *, batch: str | None, site: str | None = None, **options: Any) -> list[BatchJob]:
        """Submit ``count`` pilots; see `Queue.submit_pilots`."""
        if site is not None:
            options = dict(config.resolve({**options, "batch": batch}, site=site, origin="submit_pilots").values)
            options.pop("count")
            batch = options.pop("batch")
        batch = batch or "local"
        try:
            request = pilot_request(self._queue, batch, count, options)
            servers.keep(self._queue, options)
            jobs = get_batch_system(batch).submit(request)
        except (PartlySubmittedError, KeyboardInterrupt):  # what was submitted is on record
            found = self._submitted()
            self._manager.call(lambda: self.follow(found))
            raise
        self._manager.call(lambda: self.follow(jobs))
        return jobs

    def _submitted(self) -> list[BatchJob]:
        """Jobs on record that are not known to have ended. Not in the manager's thread: it may read many files."""
        found: list[BatchJob] = []
        recorded = records.load_jobs(self._queue, passed_over=self._over)
        for directory, jobs in itertools.groupby(recorded, lambda job: job.directory):
            members = list(jobs)
            left = [job for job in members if recorded_end(job) is None]
            if not left and time.time() - members[0].submitted_at > SETTLED:
                self._over.add(directory)
            found += left
        return found

    # --- in the manager's thread ---

    def _on_submitted(self, _body: object) -> None:
        self._manager.spawn(self._find_submitted)

    async def _find_submitted(self) -> None:
        self.follow(await asyncio.to_thread(self._submitted))

    def awaited(self, batch: str) -> list[tuple[BatchJob, JobState]]:
        """Jobs of a batch system that may still bring a pilot and have not yet, in the order of their submission, and
        what it says of each.
        """
        tracker = self._trackers.get(batch)
        if tracker is None:
            return []
        unreported = [job for job in tracker.jobs_to_ask() if not tracker.has_reported(job.id)]
        known = ((job, tracker.status(job.id)) for job in unreported)
        return [(job, status.state if status else JobState.UNKNOWN) for job, status in known]

    def follow(self, jobs: Iterable[BatchJob]) -> int:
        """Ask about these jobs from now on; returns how many."""
        loop = asyncio.get_running_loop()
        count = 0
        for job in jobs:
            with suppress(UsageError):  # a batch system of another version of hpcq
                self._system(job.batch)
                self._follow_one(job, loop.time())
                count += 1
        for batch in self._trackers:
            self._set_timer(batch)
        return count

    def _follow_one(self, job: BatchJob, now: float) -> None:
        tracker = self._tracker(job.batch)
        tracker.submitted(job, now)
        self._jobs[job.id] = job
        if tracker.has_reported(job.id):
            records.mark_reported(job)
        elif records.has_reported(job):
            tracker.recorded(job.id)

    def _system(self, name: str) -> BatchSystem:
        if name not in self._systems:
            self._systems[name] = get_batch_system(name)
        return self._systems[name]

    def _on_pilot(self, batch: str, job_id: str) -> None:
        self.on_pilot_change()
        if batch and job_id:
            self._tell(self._tracker(batch).reported(job_id, asyncio.get_running_loop().time()))
            if job_id in self._jobs:
                records.mark_reported(self._jobs[job_id])

    def _on_pilot_gone(self, batch: str, job_id: str) -> None:
        if batch in self._trackers:
            self._trackers[batch].pilot_gone(job_id, asyncio.get_running_loop().time())
            self._set_timer(batch)
        self.on_pilot_change()
        self.on_end()  # its job may be known to have ended before it hung up

    def _tracker(self, batch: str) -> JobTracker:
        if batch not in self._trackers:
            gap = BatchSystem.min_gap
            with suppress(UsageError):  # a batch system of another version of hpcq
                gap = self._system(batch).min_gap
            self._trackers[batch] = JobTracker(gap)
        return self._trackers[batch]

    def _set_timer(self, batch: str) -> None:
        loop = asyncio.get_running_loop()
        due = self._trackers[batch].next_poll(loop.time())
        previous = self._timers.pop(batch, None)
        if previous is not None:
            previous.cancel()
        if due is not None and not self._stopped and batch not in self._asking:  # one at a time
            self._timers[batch] = loop.call_at(due, self._manager.spawn, self._poll, batch)

    async def _poll(self, batch: str) -> None:
        tracker, loop = self._trackers[batch], asyncio.get_running_loop()
        self._asking.add(batch)
        jobs = tracker.jobs_to_ask()
        silent = {job.id for job in jobs if not tracker.has_reported(job.id)}
        try:
            statuses, stories = await asyncio.to_thread(_look, self._system(batch), jobs, silent)
        except Exception as error:
            if isinstance(error, RuntimeError) and "shutdown" in str(error):  # Python starts no thread any more
                log.info("jobs are not watched any more: %s", error)
                return
            if not isinstance(error, HpcqError):  # a fault, or no memory: the next look may do better
                log.exception("looking for the %s jobs of queue %s failed", batch, self._queue)
            self._tell(tracker.poll_failed(str(error), loop.time()))
        else:
            self._tell(tracker.polled(statuses, loop.time()), stories)
        finally:
            self._asking.discard(batch)
        self._set_timer(batch)

    def _tell(self, changes: Iterable[Change], stories: Mapping[str, str] | None = None) -> None:
        """Say what changed; ``stories`` as `_look` gives them."""
        ended = False
        for change in changes:
            if isinstance(change, FailedStart | Ended | Forgotten):
                ended = True
                self._remember(change.job)
            if isinstance(change, FailedStart) and (story := _story_of(change, stories or {})):
                self._last_failure = story
                log.warning("%s", story)
                self.on_failed_start(story)
            elif isinstance(change, Requeued):
                log.info("job %s was requeued: its pilot is gone, another one will come", change.job.id)
            elif isinstance(change, PollFailed):
                log.warning("the batch system does not answer (%d times running): %s", change.failures, change.error)
            elif isinstance(change, StateChanged):
                after = change.after
                log.info("job %s is %s %s", change.job.id, after.state.value, after.reason or after.hosts)
        if ended:
            self.on_end()

    def _remember(self, job: BatchJob) -> None:
        """Note that a job has ended, and forget who ended long before it."""
        self._ended.append(job)
        while len(self._ended) > KEPT:
            old = self._ended.popleft()
            if self._trackers[old.batch].drop(old.id):
                self._jobs.pop(old.id, None)

    def _all_jobs(self) -> dict[str, list[BatchJob]]:
        return {batch: tracker.jobs_to_ask() for batch, tracker in self._trackers.items()}

    def why_none_left(self) -> str:
        """Why no job can bring a pilot any more, empty while one may. In the manager's thread only."""
        if any(tracker.jobs_to_ask() for tracker in self._trackers.values()):
            return ""
        return self._last_failure or ("all its batch jobs have ended" if self._trackers else "it has no batch jobs")

    def _stop(self) -> None:
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    # --- in the user's thread, at the end ---

    def stop(self) -> None:
        """Ask no more; what is known stays known."""
        self._left = self._manager.call(self._all_jobs)
        self._manager.call(self._stop)

    _left: Mapping[str, list[BatchJob]] = {}

    def cancel_all(self) -> None:
        """Cancel every job that has not ended; what cannot be cancelled is logged."""
        for batch, jobs in self._left.items():
            if not jobs:  # nor, perhaps, a batch system of that name: pilots say which theirs is
                continue
            try:
                self._cancel(self._systems[batch], jobs)
            except (HpcqError, OSError) as error:
                log.warning("the %s jobs of queue %s may still be there: %s", batch, self._queue, error)
            else:
                if self._systems[batch].cancel_waits:
                    jobs.clear()

    def _cancel(self, system: BatchSystem, jobs: list[BatchJob]) -> None:
        statuses = system.status(jobs)
        for job in jobs:
            if statuses[job.id].state.is_final:
                record_end(job, statuses[job.id])
        there = [job for job in jobs if statuses[job.id].is_listed and not statuses[job.id].state.is_final]
        if there:
            system.cancel(there)

    @property
    def any_left(self) -> bool:
        """Whether there are jobs that are not known to have ended: what they write still has its place here."""
        return any(self._left.values())


def _look(
    system: BatchSystem, jobs: Sequence[BatchJob], silent: Collection[str]
) -> tuple[dict[str, JobStatus], dict[str, str]]:
    """What a batch system says of jobs; and, for those that ended without their pilots having been heard of
    (``silent``), their stories. Ends are put on record. In a worker thread.
    """
    statuses = system.status(jobs)
    ended = [FailedStart(job, statuses[job.id]) for job in jobs if statuses[job.id].state.is_final]
    for one in ended:
        record_end(one.job, one.status)
    return statuses, {one.job.id: _story(one) for one in ended if one.job.id in silent}


def _story_of(change: FailedStart, stories: Mapping[str, str]) -> str:
    """Its story; empty for what was cancelled. One that the batch system has forgotten has none yet, nor a record."""
    if change.job.id not in stories:
        record_end(change.job, change.status)
        return _story(change)
    return stories[change.job.id]


def _story(change: FailedStart) -> str:
    return "" if _was_cancelled(change.job) else failed_start(change)


def _was_cancelled(job: BatchJob) -> bool:
    """Whether ``hpcq cancel-pilots`` ended it, which not every batch system tells."""
    ending = recorded_end(job)
    return ending is not None and ending.state is JobState.CANCELLED


def failed_start(change: FailedStart) -> str:
    """The story of a job whose pilot, or that of its last start, never reported."""
    job, status = change.job, change.status
    code = "" if status.exit_code is None else f"exit status {status.exit_code}"
    how = ", ".join(filter(None, (status.raw_state, status.reason, code))) if status.raw_state else "no longer listed"
    lines = records.output_tail(job, 10)
    output = "\n".join(f"    {line}" for line in lines) if lines else "    (it wrote nothing)"
    who = "its next pilot, after it was requeued," if records.has_reported(job) else "its pilot"
    return (
        f"job {job.id} ended ({how}) and {who} never reported; "
        f"script {job.script}; the end of its output {job.output}:\n{output}"
    )
