"""The tracker: what to ask, when, and which pilots failed to start. No clock, no processes."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.batch import records
from hpcq.batch.base import BatchJob, JobState, JobStatus
from hpcq.batch.tracker import (
    FIRST_LOOK,
    FORGOTTEN_AFTER,
    LOOKS_AFTER_PILOT,
    MAX_BACKOFF,
    MIN_GAP,
    POLL_INTERVAL,
    Ended,
    FailedStart,
    Forgotten,
    JobTracker,
    PollFailed,
    PollRecovered,
    Requeued,
    StartConfirmed,
    StateChanged,
)
from hpcq.jobs import failed_start


def job(job_id: str = "1") -> BatchJob:
    here = Path("/state/jobs/x")
    return BatchJob(job_id, "slurm", "q", here, here / "script.sh", here / "output.txt", 0.0)


def status(state: JobState, job_id: str = "1", **values: str) -> dict[str, JobStatus]:
    return {job_id: JobStatus(job_id, state, raw_state=state.name, **values)}


@pytest.fixture
def tracker() -> JobTracker:
    tracker = JobTracker()
    assert tracker.submitted(job(), 100.0) == []
    return tracker


def kinds(changes: list[object]) -> list[type]:
    return [type(change) for change in changes]


def test_nothing_to_ask_about():
    assert JobTracker().next_poll(0.0) is None


def test_first_look_soon_then_every_interval(tracker):
    assert tracker.next_poll(100.0) == 100.0 + FIRST_LOOK
    tracker.polled(status(JobState.PENDING), 102.0)
    assert tracker.next_poll(102.0) == 102.0 + POLL_INTERVAL


def test_many_submissions_do_not_make_many_polls(tracker):
    tracker.polled({}, 102.0)
    tracker.submitted(job("2"), 103.0)
    assert tracker.next_poll(103.0) == 102.0 + MIN_GAP
    tracker.submitted(job("3"), 109.0)
    assert tracker.next_poll(109.0) == 102.0 + MIN_GAP


def test_first_look_survives_a_poll_that_came_too_early_for_it(tracker):
    tracker.polled({}, 102.0)
    tracker.submitted(job("2"), 131.0)
    tracker.polled({}, 132.0)
    assert tracker.next_poll(132.0) == 132.0 + MIN_GAP


def test_a_pilot_that_hung_up_is_looked_after_soon_and_a_few_times(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.reported("1", 103.0)
    tracker.pilot_gone("1", 120.0)
    now, early = tracker.next_poll(120.0), []
    assert now == 120.0 + FIRST_LOOK
    while True:
        tracker.polled(status(JobState.COMPLETING), now)
        due = tracker.next_poll(now)
        if due == now + POLL_INTERVAL:
            break
        early.append(due - now)
        now = due
    assert early == [MIN_GAP] * (LOOKS_AFTER_PILOT - 1)


def test_where_looks_cost_nobody_anything_there_are_more_of_them():
    """The end of a local job is on record when a disk, however slow, has it."""
    tracker = JobTracker(0.2)
    tracker.submitted(job("1"), 0.0)
    tracker.reported("1", 1.0)
    tracker.polled(status(JobState.RUNNING), 2.0)
    tracker.pilot_gone("1", 10.0)
    now, looks = tracker.next_poll(10.0), 0
    while now < 25.0:
        tracker.polled(status(JobState.COMPLETING), now)
        now, looks = tracker.next_poll(now), looks + 1
    assert looks == pytest.approx(75, abs=2)
    tracker.polled(status(JobState.DONE), now)
    assert tracker.next_poll(now) is None


def test_a_pilot_that_comes_again_needs_no_more_looks(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.pilot_gone("1", 103.0)
    tracker.reported("1", 104.0)
    tracker.polled(status(JobState.RUNNING), 112.0)
    assert tracker.next_poll(112.0) == 112.0 + POLL_INTERVAL


def test_a_batch_system_that_asks_nobody_else_is_asked_at_once():
    tracker = JobTracker(0.2)
    tracker.submitted(job(), 100.0)
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.pilot_gone("1", 102.5)
    assert tracker.next_poll(102.5) == pytest.approx(102.7)


def test_the_pilot_of_an_unknown_or_ended_job_changes_nothing(tracker):
    tracker.polled(status(JobState.DONE), 102.0)
    tracker.pilot_gone("1", 103.0)
    tracker.pilot_gone("2", 103.0)
    assert tracker.next_poll(103.0) is None


def test_failures_back_off_and_recover(tracker):
    now, gaps = 102.0, []
    for number in range(1, 12):
        assert tracker.poll_failed("slurm_load_jobs error", now) == [PollFailed("slurm_load_jobs error", number)]
        gaps.append(tracker.next_poll(now) - now)
        now = tracker.next_poll(now)
    assert gaps[:4] == [60.0, 120.0, 240.0, 480.0]
    assert gaps[4:] == [MAX_BACKOFF] * 7
    assert tracker.polled(status(JobState.RUNNING), now)[0] == PollRecovered(11)
    assert tracker.next_poll(now) == now + POLL_INTERVAL


def test_pending_running_reported_done(tracker):
    changes = tracker.polled(status(JobState.PENDING, reason="Priority"), 102.0)
    assert kinds(changes) == [StateChanged]
    assert tracker.polled(status(JobState.PENDING, reason="Priority"), 132.0) == []
    assert kinds(tracker.polled(status(JobState.RUNNING, hosts="n1"), 162.0)) == [StateChanged]
    assert tracker.reported("1", 163.0) == []
    assert kinds(tracker.polled(status(JobState.DONE), 192.0)) == [StateChanged, Ended]
    assert tracker.jobs_to_ask() == []
    assert tracker.next_poll(193.0) is None


@pytest.mark.parametrize("state", [s for s in JobState if s.is_final and s is not JobState.CANCELLED])
def test_an_end_without_a_report_is_a_failed_start(tracker, state):
    assert kinds(tracker.polled(status(state), 102.0)) == [StateChanged, FailedStart]


def test_a_cancelled_job_is_no_failed_start(tracker):
    assert kinds(tracker.polled(status(JobState.CANCELLED), 102.0)) == [StateChanged, Ended]


def test_one_job_ending_leaves_the_others_alone(tracker):
    tracker.submitted(job("2"), 100.0)
    tracker.polled({**status(JobState.FAILED), **status(JobState.RUNNING, "2")}, 102.0)
    tracker.polled(status(JobState.RUNNING, "2"), 132.0)
    assert [j.id for j in tracker.jobs_to_ask()] == ["2"]


def test_a_late_report_takes_a_failed_start_back(tracker):
    tracker.polled(status(JobState.FAILED), 102.0)
    assert tracker.reported("1", 103.0) == [StartConfirmed(job())]
    assert [j.id for j in tracker.jobs_to_ask()] == ["1"]
    assert kinds(tracker.polled(status(JobState.FAILED), 132.0)) == [Ended]
    assert tracker.reported("1", 133.0) == []


def test_a_report_before_the_submission_is_known_counts():
    tracker = JobTracker()
    assert tracker.reported("1", 99.0) == []
    tracker.submitted(job(), 100.0)
    assert tracker.has_reported("1")
    assert kinds(tracker.polled(status(JobState.DONE), 102.0)) == [StateChanged, Ended]


def test_missing_from_the_listing_changes_nothing_until_it_is_forgotten(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    assert tracker.polled({}, 132.0) == []
    assert tracker.polled(status(JobState.UNKNOWN) | {}, 132.0 + FORGOTTEN_AFTER - 1) == []  # listed: in an odd state
    assert tracker.polled({}, 1000.0) == []
    assert tracker.status("1").state is JobState.RUNNING
    changes = tracker.polled({}, 1000.0 + FORGOTTEN_AFTER)
    assert kinds(changes) == [FailedStart]
    assert changes[0].status.state is JobState.UNKNOWN
    assert tracker.next_poll(3000.0) is None


def test_one_missing_after_a_long_silence_is_not_forgotten(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    for _ in range(5):
        tracker.poll_failed("down", 50_000.0)
    assert kinds(tracker.polled({}, 60_000.0)) == [PollRecovered]


def test_a_job_with_a_report_is_forgotten_not_failed(tracker):
    tracker.reported("1", 101.0)
    tracker.polled({}, 102.0)
    assert tracker.polled({}, 102.0 + FORGOTTEN_AFTER) == [Forgotten(job())]
    assert tracker.reported("1", 2000.0) == [StartConfirmed(job())]


def test_requeued_job_is_followed_on(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    assert kinds(tracker.polled(status(JobState.PENDING, reason="BeginTime"), 132.0)) == [
        StateChanged,
        Requeued,
    ]
    assert tracker.jobs_to_ask() == [job()]


def test_the_next_pilot_of_a_requeued_job_has_to_report_too(tracker):
    tracker.reported("1", 101.0)
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.pilot_gone("1", 120.0)
    tracker.polled(status(JobState.PENDING, reason="BeginTime"), 132.0)
    assert not tracker.has_reported("1")
    ended = status(JobState.FAILED, reason="JobLaunchFailure")
    assert kinds(tracker.polled(ended, 162.0)) == [StateChanged, FailedStart]


def test_the_next_pilot_of_a_requeued_job_reports(tracker):
    tracker.reported("1", 101.0)
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.pilot_gone("1", 120.0)
    tracker.polled(status(JobState.PENDING), 132.0)
    assert tracker.reported("1", 140.0) == []
    tracker.pilot_gone("1", 150.0)
    assert kinds(tracker.polled(status(JobState.DONE), 162.0)) == [StateChanged, Ended]


def test_an_answer_that_is_older_than_the_word_of_the_next_pilot(tracker):
    tracker.reported("1", 101.0)
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.reported("1", 130.0)
    tracker.pilot_gone("1", 131.0)  # the first one's last results came after it
    assert kinds(tracker.polled(status(JobState.PENDING), 132.0)) == [StateChanged, Requeued]
    assert tracker.has_reported("1")


def test_a_job_that_is_requeued_and_held_is_not_waited_for(tracker):
    tracker.reported("1", 101.0)
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.pilot_gone("1", 120.0)
    assert kinds(tracker.polled(status(JobState.HELD), 132.0)) == [StateChanged, Requeued]
    assert tracker.has_reported("1")


def test_a_pilot_on_record_is_none_that_is_connected(tracker):
    tracker.recorded("1")
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.polled(status(JobState.PENDING), 132.0)
    assert not tracker.has_reported("1")


@pytest.mark.parametrize(("hangs_up", "is_there"), [(True, False), (False, True)])
def test_a_pilot_that_reports_before_its_job_is_known(hangs_up, is_there):
    tracker = JobTracker()
    tracker.reported("1", 99.0)
    if hangs_up:
        tracker.pilot_gone("1", 99.5)
    tracker.submitted(job(), 100.0)
    assert tracker.has_reported("1")
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.polled(status(JobState.PENDING), 132.0)
    assert tracker.has_reported("1") == is_there


def test_the_story_of_a_start_that_failed_after_a_requeue(tmp_path):
    one = dataclasses.replace(job(), directory=tmp_path, output=tmp_path / "output.txt")
    change = FailedStart(one, JobStatus("1", JobState.FAILED, "JobLaunchFailure", raw_state="FAILED"))
    assert failed_start(change).startswith("job 1 ended (FAILED, JobLaunchFailure) and its pilot never reported; ")
    records.mark_reported(one)
    assert failed_start(change).startswith(
        "job 1 ended (FAILED, JobLaunchFailure) and its next pilot, after it was requeued, never reported; script "
    )


def test_submitting_twice_and_dropping(tracker):
    tracker.polled(status(JobState.RUNNING), 102.0)
    tracker.submitted(job(), 103.0)
    assert tracker.status("1").state is JobState.RUNNING
    assert not tracker.drop("1")  # it runs
    tracker.polled(status(JobState.DONE), 132.0)
    assert tracker.drop("1")
    assert tracker.drop("nonsense")
    assert tracker.status("1") is None
    assert tracker.next_poll(133.0) is None


events = st.lists(
    st.tuples(
        st.sampled_from(["submit", "report", "gone", "poll", "fail", "drop"]),
        st.sampled_from(["1", "2", "3"]),
        st.one_of(st.none(), st.sampled_from(list(JobState))),
        st.floats(min_value=0, max_value=700),
    ),
    max_size=60,
)


@given(events)
def test_whatever_happens(history):
    """Ends are told once, UNKNOWN never ends a job by itself, and polls keep their distance."""
    tracker, now, last_poll, failures = JobTracker(), 0.0, None, 0
    open_jobs: set[str] = set()
    for kind, job_id, state, wait in history:
        now += wait
        changes = []
        if kind == "submit":
            if tracker.status(job_id) is None:
                open_jobs.add(job_id)
            changes = tracker.submitted(job(job_id), now)
        elif kind == "report":
            changes = tracker.reported(job_id, now)
        elif kind == "gone":
            tracker.pilot_gone(job_id, now)
        elif kind == "drop":
            assert tracker.drop(job_id) == (job_id not in open_jobs)
        elif kind == "poll":
            changes = tracker.polled({} if state is None else status(state, job_id), now)
            last_poll, failures = now, 0
        else:
            changes = tracker.poll_failed("no", now)
            last_poll, failures = now, failures + 1
        for change in changes:
            if isinstance(change, Ended | FailedStart | Forgotten):
                assert kind == "poll"
                assert change.job.id in open_jobs
                open_jobs.remove(change.job.id)
                if isinstance(change, FailedStart):
                    assert not tracker.has_reported(change.job.id)
            elif isinstance(change, StartConfirmed):
                open_jobs.add(change.job.id)
            elif isinstance(change, StateChanged):
                assert change.after.state is not JobState.UNKNOWN
        assert {j.id for j in tracker.jobs_to_ask()} == open_jobs
        due = tracker.next_poll(now)
        assert (due is None) == (not open_jobs)
        if due is not None and last_poll is not None:
            assert last_poll + MIN_GAP <= due <= last_poll + MAX_BACKOFF
            if failures:
                assert due >= last_poll + POLL_INTERVAL
