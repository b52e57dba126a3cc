"""What is kept of a submission, and that broken or half-written records do no harm."""

import errno
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from hpcq.batch import records
from hpcq.batch.pilot_command import pilot_argv
from hpcq.errors import StateError


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


def submission(job_id: str = "4711", count: int = 2) -> list[records.BatchJob]:
    directory = records.new_directory("q")
    script = records.write_script(directory, "#!/bin/sh\n")
    jobs = [
        records.BatchJob(f"{job_id}_{k}", "slurm", "q", directory, script, records.output_path(directory, k), 5.0, "c2")
        for k in range(count)
    ]
    records.save_submission(directory, jobs, {"count": count})
    return jobs


def test_jobs_come_back_and_can_be_found_by_id():
    jobs = submission()
    assert records.load_jobs("q") == jobs
    link = jobs[0].directory.parent / "4711"
    assert link.resolve() == jobs[0].directory.resolve()


def test_no_queue_no_jobs():
    assert records.load_jobs("other") == []


def test_interrupted_and_broken_submissions_are_left_out(caplog):
    jobs = submission()
    records.write_script(records.new_directory("q"), "#!/bin/sh\n")
    broken = records.new_directory("q")
    records.write_script(broken, "")
    (broken / "job.json").write_text('{"batch": 3}')
    with caplog.at_level(logging.WARNING):
        assert records.load_jobs("q") == jobs
    assert str(broken) in caplog.text


def test_an_output_name_cannot_point_elsewhere():
    jobs = submission()
    path = jobs[0].directory / "job.json"
    path.write_text(path.read_text().replace("output_0.txt", "../../../secret"))
    assert records.load_jobs("q")[0].output.parent == jobs[0].directory


def test_endings():
    job = submission()[0]
    assert records.load_ending(job) is None
    records.save_ending(job, records.Ending(state="failed", reason="x", seen_at=1.0))
    records.save_ending(job, records.Ending(state="done", seen_at=2.0))
    assert records.load_ending(job).state == "failed"


def test_output_tail():
    job = submission()[0]
    assert records.output_tail(job) == []
    job.output.write_bytes(b"first\n" + b"x" * 200_000 + b"\n\xff\x1b[1mbold\n\n   \nlast")
    assert records.output_tail(job, 2) == ["��[1mbold", "last"]
    assert records.output_tail(replace(job, output=job.directory)) == []


def test_pilot_argv():
    assert pilot_argv(Path("/c"), batch="local", python=("py",)) == (
        "py", "-P", "-m", "hpcq.pilot", "--connection", "/c", "--batch", "local",
    )  # fmt: skip
    full = pilot_argv(
        Path("/c"),
        batch="slurm",
        cores=2,
        memory_mb=5,
        walltime_s=60,
        tunnel=("--vpn", "relay"),
        gateway="login",
        require=("cvmfs:a", "root://b"),
        scratch=Path("/scratch"),
        manager_timeout_s=600,
        python=("py",),
    )
    assert " ".join(full[6:]) == (
        "--cores 2 --memory 5 --walltime 60 --vpn relay --gateway login --require cvmfs:a --require root://b "
        "--scratch /scratch --manager-timeout 600 --batch slurm"
    )


def test_what_cannot_be_put_on_record_is_logged_and_stops_nobody(monkeypatch, caplog):
    [job, _] = submission()

    def full(*_, **__):
        raise StateError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(records.state_dir, "write_private", full)
    monkeypatch.setattr(Path, "touch", full)
    records.save_ending(job, records.Ending(state="done", seen_at=1.0))
    records.mark_reported(job)
    assert [record.message.partition(" is not on record")[0] for record in caplog.records] == [
        "how job 4711_0 ended",
        "that the pilot of job 4711_0 has reported",
    ]
