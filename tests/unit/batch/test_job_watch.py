"""The shell that follows a queue's jobs: what goes wrong once ends nothing, and nothing grows for ever."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace

import pytest

from hpcq import jobs as watching
from hpcq.batch import records
from hpcq.batch.base import BatchJob, JobState, JobStatus
from hpcq.batch.states import record_end, recorded_end
from hpcq.errors import BatchError
from hpcq.jobs import JobWatch


class Loop:
    """The part of a manager that is asked: its loop, which is the test's."""

    def __init__(self):
        self.tasks = []
        self.answers = {}

    def call(self, function):
        return function()

    def spawn(self, work, *args):
        self.tasks.append(asyncio.create_task(work(*args)))

    def answer_to(self, topic, function):
        self.answers[topic] = function


class Answers:
    """A batch system that says, or raises, what comes next."""

    min_gap = 0.0
    cancel_waits = False

    def __init__(self, *answers):
        self.answers = list(answers)

    def status(self, jobs):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {job.id: JobStatus(job.id, answer, raw_state=answer.name) for job in jobs}


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def submission(number: int = 1, count: int = 1, submitted_at: float = 5.0) -> list[BatchJob]:
    directory = records.new_directory("q")
    script = records.write_script(directory, "#!/bin/sh\n")
    names = [f"{number}_{index}" for index in range(count)]
    outputs = [records.output_path(directory, index) for index in range(count)]
    jobs = [
        BatchJob(name, "slurm", "q", directory, script, output, submitted_at)
        for name, output in zip(names, outputs, strict=True)
    ]
    records.save_submission(directory, jobs, {})
    return jobs


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), BatchError("down"), ValueError("?")])
def test_a_look_that_fails_is_followed_by_others(problem, caplog):
    async def main():
        [job] = submission()
        manager = Loop()
        watch = JobWatch("q", manager)
        watch._systems["slurm"] = Answers(problem, JobState.FAILED)
        told = []
        watch.on_failed_start = told.append
        await watch._poll("slurm")
        assert watch._timers["slurm"].when() > asyncio.get_running_loop().time()
        assert "does not answer (1 times running)" in caplog.text
        await watch._poll("slurm")
        assert recorded_end(job).state is JobState.FAILED
        assert f"job {job.id} ended (FAILED)" in told[0]
        watch._stop()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())


def test_records_are_written_and_read_beside_the_loop(monkeypatch):
    """Each is a file, perhaps on a slow disk, and they are thousands."""
    threads = set()

    def note(function):
        def noting(*args, **options):
            threads.add(threading.current_thread())
            return function(*args, **options)

        return noting

    async def main():
        manager = Loop()
        watch = JobWatch("q", manager)
        for name in ("record_end", "recorded_end"):
            monkeypatch.setattr(watching, name, note(getattr(watching, name)))
        jobs = submission(count=20)
        manager.answers["jobs_submitted"](None)
        await asyncio.gather(*manager.tasks)
        assert watch._all_jobs() == {"slurm": jobs}
        watch._systems["slurm"] = Answers(JobState.TIMEOUT)
        await watch._poll("slurm")
        assert watch.why_none_left()
        watch._stop()

    asyncio.run(main())
    assert threads
    assert threading.main_thread() not in threads


def test_submissions_that_are_over_are_not_read_again():
    [old] = submission(1)
    [new] = submission(2, submitted_at=5e9)
    for job in (old, new):
        record_end(job, JobStatus(job.id, JobState.DONE))
    watch = asyncio.run(watch_of())
    assert watch._over == {old.directory}
    records._ending_path(new).unlink()  # more of it may still be put on record
    assert watch._submitted() == [new]


async def watch_of() -> JobWatch:
    return JobWatch("q", Loop())


def test_of_those_that_ended_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(watching, "KEPT", 3)

    async def main():
        jobs = submission(count=8)
        watch = JobWatch("q", Loop())
        watch._systems["slurm"] = Answers(JobState.DONE)
        await watch._poll("slurm")
        assert set(watch._jobs) == {job.id for job in jobs[-3:]}
        assert watch._trackers["slurm"].status(jobs[0].id) is None
        watch._stop()

    asyncio.run(main())


def test_a_pilot_of_an_unknown_batch_system_keeps_no_other_job_from_being_cancelled():
    cancelled = []

    async def main():
        [job] = submission()
        watch = JobWatch("q", Loop())
        watch._on_pilot("condor", "17.0")
        system = Answers(JobState.RUNNING)
        system.cancel = cancelled.extend
        watch._systems["slurm"] = system
        watch._trackers = dict(reversed(watch._trackers.items()))
        watch.stop()
        watch.cancel_all()
        assert cancelled == [job]

    asyncio.run(main())


def test_an_end_in_the_words_of_another_version_is_an_end():
    [job] = submission()
    records.save_ending(job, records.Ending(state="hibernated", seen_at=1.0))
    assert recorded_end(replace(job)).state is JobState.UNKNOWN


def test_what_was_submitted_before_an_interrupt_is_followed(monkeypatch):
    class Interrupted(Answers):
        def submit(self, _request):
            submission(7)
            raise KeyboardInterrupt

    async def main():
        watch = JobWatch("q", Loop())
        monkeypatch.setattr(watching, "get_batch_system", lambda _name: Interrupted())
        with pytest.raises(KeyboardInterrupt):
            watch.submit(1, batch="slurm")
        assert [job.id for job in watch._all_jobs()["slurm"]] == ["7_0"]
        watch._stop()

    asyncio.run(main())
