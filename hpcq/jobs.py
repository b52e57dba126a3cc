"""The batch jobs of a queue, as its program follows them: submitted, asked about, and cancelled at the end.

One `JobTracker` for each batch system decides when to ask and what an answer means; this shell asks, in a worker
thread of the manager's loop, and logs what users must know: a job whose pilot never reported, with the end of its
output; a batch system that does not answer. Jobs submitted by ``hpcq submit-pilots`` are followed too: it tells us, and
what was submitted before we started is found on disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from hpcq import config
from hpcq.batch import records
from hpcq.batch.base import BatchJob, BatchSystem, JobState, PartlySubmittedError, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.batch.states import record_end, recorded_end
from hpcq.batch.tracker import Change, Ended, FailedStart, Forgotten, JobTracker, PollFailed, Requeued, StateChanged
from hpcq.errors import BatchError, HpcqError, UsageError
from hpcq.manager import Manager

log = logging.getLogger("hpcq.jobs")


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
        self.on_failed_start: Callable[[str], None] = lambda _story: None
        self.on_end: Callable[[], None] = lambda: None
        self.on_pilot_change: Callable[[], None] = lambda: None
        manager.answer_to("jobs_submitted", self._on_submitted)
        manager.on_pilot = self._on_pilot
        manager.on_pilot_gone = self._on_pilot_gone
        manager.call(self._find_submitted)

    def submit(self, count: int, *, batch: str | None, site: str | None = None, **options: Any) -> list[BatchJob]:
        """Submit ``count`` pilots; see `Queue.submit_pilots`."""
        if site is not None:
            options = dict(config.resolve({**options, "batch": batch}, site=site, origin="submit_pilots").values)
            options.pop("count")
            batch = options.pop("batch")
        batch = batch or "local"
        try:
            jobs = get_batch_system(batch).submit(pilot_request(self._queue, batch, count, options))
        except PartlySubmittedError as error:
            submitted = error.jobs
            self._manager.call(lambda: self.follow(submitted))
            raise
        self._manager.call(lambda: self.follow(jobs))
        return jobs

    # --- in the manager's thread ---

    def _on_submitted(self, _body: object) -> int:
        return self._find_submitted()

    def _find_submitted(self) -> int:
        return self.follow(job for job in records.load_jobs(self._queue) if recorded_end(job) is None)

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
            tracker.reported(job.id, now)

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
        try:
            statuses = await asyncio.to_thread(self._system(batch).status, tracker.jobs_to_ask())
        except HpcqError as error:
            self._tell(tracker.poll_failed(str(error), loop.time()))
        except RuntimeError as error:  # the program is ending and waits for its last tasks: Python starts no thread now
            log.info("jobs are not watched any more: %s", error)
            return
        else:
            self._tell(tracker.polled(statuses, loop.time()))
        finally:
            self._asking.discard(batch)
        self._set_timer(batch)

    def _tell(self, changes: Iterable[Change]) -> None:
        ended = False
        for change in changes:
            ended = ended or isinstance(change, FailedStart | Ended | Forgotten)
            if isinstance(change, FailedStart | Ended):
                record_end(change.job, change.status)
            if isinstance(change, FailedStart) and not _was_cancelled(change.job):
                self._last_failure = failed_start(change)
                log.warning("%s", self._last_failure)
                self.on_failed_start(self._last_failure)
            elif isinstance(change, Requeued):
                log.info("job %s was requeued: its pilot is gone, another one will come", change.job.id)
            elif isinstance(change, PollFailed):
                log.warning("the batch system does not answer (%d times running): %s", change.failures, change.error)
            elif isinstance(change, StateChanged):
                after = change.after
                log.info("job %s is %s %s", change.job.id, after.state.value, after.reason or after.hosts)
        if ended:
            self.on_end()

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
            try:
                self._cancel(self._systems[batch], jobs)
            except BatchError as error:
                log.warning("the %s jobs of queue %s may still be there: %s", batch, self._queue, error)
            else:
                if self._systems[batch].cancel_waits:
                    jobs.clear()

    def _cancel(self, system: BatchSystem, jobs: list[BatchJob]) -> None:
        if not jobs:
            return
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


def _was_cancelled(job: BatchJob) -> bool:
    """Whether ``hpcq cancel-pilots`` ended it, which not every batch system tells."""
    ending = recorded_end(job)
    return ending is not None and ending.state is JobState.CANCELLED


def failed_start(change: FailedStart) -> str:
    """The story of a job whose pilot never reported."""
    job, status = change.job, change.status
    code = "" if status.exit_code is None else f", exit status {status.exit_code}"
    lines = records.output_tail(job, 10)
    output = "\n".join(f"    {line}" for line in lines) if lines else "    (it wrote nothing)"
    return (
        f"job {job.id} ended ({status.raw_state or 'no longer listed'}{code}) and its pilot never reported; "
        f"script {job.script}; the end of its output {job.output}:\n{output}"
    )
