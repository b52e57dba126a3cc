"""Which batch jobs to ask about and when, what changed, and which pilots failed to start. Pure: time is
passed in.

Per job, from what the batch system says and from the pilot's own report:

    submitted ──poll──▶ pending ⇄ running ──poll──▶ ended   final; with no report before: a *failed start*
                           │         │
                           └─────────┴── not listed for ``FORGOTTEN_AFTER`` seconds ──▶ forgotten

UNKNOWN changes nothing: a job missing from a listing has neither ended nor failed. Only when poll after poll
does not list it is it *forgotten*: no longer asked about, its end never seen. A report counts for good, and
takes back a failed start or a forgetting that came before it. A job that is to start again under its id (requeued)
is followed on, and its next pilot has to report as the first had to.

Polls are for all jobs at once: ``FIRST_LOOK`` seconds after a submission, then every ``POLL_INTERVAL``; sooner, a few
times, when a pilot hung up, for its job has mostly ended with it; never two within ``min_gap``; after failures, less
and less often.

What may not be here: reading a clock, running a command, deciding to submit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcq.batch.base import BatchJob, BatchSystem, JobState, JobStatus

FIRST_LOOK = 2.0
"""Seconds from a submission to the first poll: most refusals of a job show at once."""
POLL_INTERVAL = 30.0
"""Seconds between polls."""
MIN_GAP = BatchSystem.min_gap
"""Seconds that two polls are apart at least, however often jobs are submitted; a batch system may have its own."""
LOOKS_AFTER_PILOT = 3
"""Polls that come early after a pilot hung up, while its job is not seen to end."""
LOOKING = 20.0
"""Seconds of them with a batch system whose ``min_gap`` is less than `FIRST_LOOK`: nobody minds that it is asked."""
MAX_BACKOFF = 600.0
"""Seconds between polls after many failures."""
FORGOTTEN_AFTER = 600.0
"""Seconds from the first answer that does not list a job to the one with which it is given up."""


@dataclass(frozen=True)
class StateChanged:
    """The batch system's word for a job changed (its state, reason or hosts)."""

    job: BatchJob
    before: JobStatus
    after: JobStatus


@dataclass(frozen=True)
class Ended:
    """A job ended after its pilot had reported, or was cancelled."""

    job: BatchJob
    status: JobStatus


@dataclass(frozen=True)
class FailedStart:
    """A job ended, or was forgotten by the batch system (state UNKNOWN), and its pilot never reported."""

    job: BatchJob
    status: JobStatus


@dataclass(frozen=True)
class Forgotten:
    """The batch system stopped listing a job whose pilot had reported; how it ended is not known."""

    job: BatchJob


@dataclass(frozen=True)
class Requeued:
    """A job that had run waits again under its id: its pilot is gone, another one will start."""

    job: BatchJob
    status: JobStatus


@dataclass(frozen=True)
class StartConfirmed:
    """A pilot reported after its job had been called a failed start or forgotten: take that back."""

    job: BatchJob


@dataclass(frozen=True)
class PollFailed:
    """The batch system did not answer, ``failures`` times running; states are as they were."""

    error: str
    failures: int


@dataclass(frozen=True)
class PollRecovered:
    """The batch system answers again, after ``failures`` failures."""

    failures: int


Change = StateChanged | Ended | FailedStart | Forgotten | Requeued | StartConfirmed | PollFailed | PollRecovered


@dataclass
class _Entry:
    job: BatchJob
    status: JobStatus
    missing_since: float | None = None  # the first of the answers in a row that did not list it
    reported: bool = False
    connected: int = 0  # pilots of it that have reported and not hung up
    looks: int = 0  # polls that come early, since its pilot hung up


@dataclass
class JobTracker:
    """See the module. Feed it every event with the time it happened; ``now`` never goes back."""

    min_gap: float = MIN_GAP
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _open: dict[str, _Entry] = field(default_factory=dict)  # those that have not ended and are not forgotten
    _early: dict[str, int] = field(default_factory=dict)  # pilots connected of those not submitted as far as we know
    _look_due: float | None = None
    _last_poll: float | None = None
    _failures: int = 0

    def submitted(self, job: BatchJob, now: float) -> list[Change]:
        """Follow ``job`` from now on; one that is followed already is left as it is."""
        if job.id not in self._entries:
            early = self._early.pop(job.id, None)
            unknown = JobStatus(job.id, JobState.UNKNOWN)
            entry = _Entry(job, unknown, reported=early is not None, connected=early or 0)
            self._entries[job.id] = self._open[job.id] = entry
            self._look_soon(now + FIRST_LOOK)
        return []

    def reported(self, job_id: str, now: float) -> list[Change]:
        """A pilot says that it runs in job ``job_id``; this may come before ``submitted``."""
        entry = self._entries.get(job_id)
        if entry is None:
            self._early[job_id] = self._early.get(job_id, 0) + 1
            return []
        entry.connected += 1
        return self.recorded(job_id)

    def recorded(self, job_id: str) -> list[Change]:
        """It is on record that a pilot of job ``job_id``, which was submitted, has reported."""
        entry = self._entries[job_id]
        was_closed, was_reported = job_id not in self._open, entry.reported
        entry.reported, entry.looks = True, 0
        if not was_closed or (was_reported and entry.status.state.is_final):
            return []  # the word of a pilot that is just ending does not make its job run again
        entry.missing_since = None
        self._open[job_id] = entry
        return [StartConfirmed(entry.job)]

    def pilot_gone(self, job_id: str, now: float) -> None:
        """A pilot of job ``job_id`` hung up: the job has ended with it, or is about to, or it will come again."""
        if job_id in self._early:
            self._early[job_id] = max(0, self._early[job_id] - 1)
        if job_id in self._entries:
            self._entries[job_id].connected = max(0, self._entries[job_id].connected - 1)
        if job_id in self._open:
            self._open[job_id].looks = self._looks_after_pilot()
            self._look_soon(now + min(FIRST_LOOK, self.min_gap))

    def polled(self, statuses: Mapping[str, JobStatus], now: float) -> list[Change]:
        """Take in the answer to a poll; a job that is not in it is as if it were UNKNOWN."""
        changes: list[Change] = [PollRecovered(self._failures)] if self._failures else []
        self._note_poll(now, failures=0)
        for job_id, entry in list(self._open.items()):
            news = _take_in(entry, statuses.get(job_id), now)
            changes += news
            if news and isinstance(news[-1], Ended | FailedStart | Forgotten):
                del self._open[job_id]
            elif entry.looks:
                entry.looks -= 1
                if entry.looks:
                    self._look_soon(now + min(FIRST_LOOK, self.min_gap))
        return changes

    def poll_failed(self, error: str, now: float) -> list[Change]:
        """Take in that a poll gave no answer. Nothing is concluded about any job."""
        self._note_poll(now, self._failures + 1)
        return [PollFailed(error, self._failures)]

    def jobs_to_ask(self) -> list[BatchJob]:
        """Return the jobs that a poll should ask about, in the order of their submission."""
        return [entry.job for entry in self._open.values()]

    def next_poll(self, now: float) -> float | None:
        """Return when to poll next (in the past: at once), or None while there is nothing to ask about."""
        if not self._open:
            return None
        if self._last_poll is None:
            return self._look_due if self._look_due is not None else now
        regular = self._last_poll + self._interval()
        if self._look_due is None or self._failures:
            return regular
        return min(regular, max(self._look_due, self._last_poll + self.min_gap))

    def status(self, job_id: str) -> JobStatus | None:
        """Return the last that is known of a job, or None if it was never submitted."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.status

    def has_reported(self, job_id: str) -> bool:
        """Whether the pilot of that job has reported, or one has since it was requeued."""
        entry = self._entries.get(job_id)
        return entry is not None and entry.reported

    def drop(self, job_id: str) -> bool:
        """Forget a job that has ended, so that a manager that lives for months does not keep them all; whether it was
        forgotten: one that runs again is not.
        """
        if job_id in self._open:
            return False
        self._entries.pop(job_id, None)
        self._early.pop(job_id, None)
        return True

    def _note_poll(self, now: float, failures: int) -> None:
        self._last_poll = now
        self._failures = failures
        if self._look_due is not None and self._look_due <= now:
            self._look_due = None

    def _looks_after_pilot(self) -> int:
        """A few, or for some time where they cost nobody anything: that an end is on record may take a slow disk's."""
        return LOOKS_AFTER_PILOT if self.min_gap >= FIRST_LOOK else round(LOOKING / max(self.min_gap, 0.1))

    def _look_soon(self, due: float) -> None:
        self._look_due = due if self._look_due is None else min(self._look_due, due)

    def _interval(self) -> float:
        # The exponent is bounded: after a night of failures 2.0**failures would overflow.
        return min(MAX_BACKOFF, POLL_INTERVAL * 2.0 ** min(self._failures, 10))


def _take_in(entry: _Entry, status: JobStatus | None, now: float) -> list[Change]:
    """Apply one job's line of a listing."""
    if status is None or status.state is JobState.UNKNOWN:
        return _miss(entry, now, listed=status is not None and status.is_listed)
    before, entry.status, entry.missing_since = entry.status, status, None
    changes: list[Change] = []
    if (before.state, before.reason, before.hosts) != (status.state, status.reason, status.hosts):
        changes.append(StateChanged(entry.job, before, status))
    if _had_started(before.state) and status.state in (JobState.PENDING, JobState.HELD):
        changes.append(Requeued(entry.job, status))
        # The answer may be older than the word of its next pilot. One that is held comes when somebody releases it:
        # nobody should wait for it.
        entry.reported = entry.reported and (entry.connected > 0 or status.state is JobState.HELD)
    if status.state.is_final:
        # A job that was cancelled did as it was told, whether or not it had started.
        planned = entry.reported or status.state is JobState.CANCELLED
        changes.append(Ended(entry.job, status) if planned else FailedStart(entry.job, status))
    return changes


def _miss(entry: _Entry, now: float, *, listed: bool) -> list[Change]:
    """Apply an answer that says nothing of a job, or (``listed``) nothing that we have a word for."""
    if listed:
        entry.missing_since = None
        return []
    if entry.missing_since is None:
        entry.missing_since = now
    if now - entry.missing_since < FORGOTTEN_AFTER:
        return []
    if entry.reported:
        return [Forgotten(entry.job)]
    reason = "no longer known to the batch system"
    return [FailedStart(entry.job, JobStatus(entry.job.id, JobState.UNKNOWN, reason))]


def _had_started(state: JobState) -> bool:
    return state in (JobState.RUNNING, JobState.SUSPENDED, JobState.COMPLETING) or state.is_final
