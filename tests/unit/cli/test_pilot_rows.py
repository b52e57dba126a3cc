"""From the manager's pilots and the batch systems' jobs to rows. Pure."""

from pathlib import Path

import pytest

from hpcq.batch.base import BatchJob, JobState, JobStatus
from hpcq.cli.pilot_rows import HEADS, cells, explanation, merge, story

HERE = Path("/state/q/jobs/x")
JOB = BatchJob("4711_0", "slurm", "q", HERE, HERE / "script.sh", HERE / "output_0.txt", 0.0)
READY = {
    "name": "n1-1",
    "batch": "slurm",
    "job_id": "4711_0",
    "state": "ready",
    "hostname": "n1",
    "cores": 16,
    "cores_busy": 3,
    "tunnel_mode": "auto",
    "tunnel_kind": "relay",
    "tunnel_seconds": 1.5,
    "tasks_done": 7,
    "message": "",
    "failed_layer": "",
}


def row(state: JobState, pilots, *, reported=False, **status):
    statuses = {"4711_0": JobStatus("4711_0", state, raw_state=status.pop("raw_state", state.name), **status)}
    [found] = merge([JOB], statuses, pilots, {JOB.id} if reported else set())
    return found


def test_a_pilot_at_work():
    found = row(JobState.RUNNING, [READY], hosts="n1")
    assert cells(found) == ("4711_0", "ready", "-", "n1", "3/16", "relay", "-", "-", "7", "-")
    assert len(cells(found)) == len(HEADS)


def test_modes_that_were_passed_over_are_told_with_the_reason():
    line = "relay passed over: nobody listens"
    found = row(JobState.RUNNING, [READY | {"tunnel_passed_over": [line]}], hosts="n1")
    assert found.tunnel_passed_over == [line]
    assert f"  auto       {line}" in story(JOB, [found], "", [])
    assert not row(JobState.RUNNING, [READY], hosts="n1").tunnel_passed_over


def test_a_waiting_job():
    found = row(JobState.PENDING, [], reason="Priority")
    assert cells(found) == ("4711_0", "pending", "Priority", "-", "-", "-", "-", "-", "-", "-")


def test_what_its_tunnel_has_carried():
    found = row(JobState.RUNNING, [READY | {"bytes_sent": 999, "bytes_received": 2_345_000, "bytes_unattributed": 0}])
    assert cells(found)[HEADS.index("IN/OUT")] == "2.3 MB/999 B"
    assert (found.bytes_sent, found.bytes_received, found.bytes_unattributed) == (999, 2_345_000, 0)


@pytest.mark.parametrize(
    ("pilot", "job", "shown"),
    [
        ("starting", JobState.RUNNING, "starting"),
        ("ready", JobState.PENDING, "ready"),  # the manager knows sooner
        ("ready", JobState.UNKNOWN, "ready"),
        ("ready", JobState.NODE_FAIL, "node_fail"),  # the batch system knows sooner
        ("gone", JobState.DONE, "done"),
        ("gone", JobState.RUNNING, "running"),
        ("gone", JobState.UNKNOWN, "gone"),
        ("failed", JobState.FAILED, "failed"),
        ("failed", JobState.DONE, "failed"),
        ("draining", JobState.RUNNING, "draining"),
    ],
)
def test_whose_word_counts(pilot, job, shown):
    raw_state = "" if job is JobState.UNKNOWN else job.name
    found = row(job, [{**READY, "state": pilot}], raw_state=raw_state)
    assert found.state == shown
    assert not found.failed_start


@pytest.mark.parametrize("state", [s for s in JobState if s.is_final])
def test_an_end_without_a_report(state):
    assert row(state, []).failed_start == (state is not JobState.CANCELLED)
    assert not row(state, [], reported=True).failed_start


def test_no_end_is_no_failed_start():
    for state in JobState:
        if not state.is_final:
            assert not row(state, []).failed_start


def test_states_we_have_no_word_for_are_shown_as_they_are():
    assert row(JobState.UNKNOWN, [], raw_state="POWER_UP_NODE").state == "power_up_node"
    assert row(JobState.UNKNOWN, [], raw_state="").state == "unknown"


def test_the_layer_that_failed_is_named():
    found = row(JobState.FAILED, [{**READY, "state": "failed", "failed_layer": "cvmfs", "message": "no\nmount"}])
    assert cells(found)[-1] == "cvmfs: no mount"


def test_pilots_without_a_job_and_several_of_one_job():
    again = {**READY, "hostname": "n2"}
    stranger = {**READY, "job_id": "", "name": "laptop-1", "batch": ""}
    rows = merge([JOB], {"4711_0": JobStatus("4711_0", JobState.RUNNING)}, [READY, again, stranger])
    assert [(r.job_id, r.hostname) for r in rows] == [("4711_0", "n1"), ("4711_0", "n2"), ("laptop-1", "n1")]


def test_the_story_of_a_failed_start():
    found = row(JobState.FAILED, [], exit_code=127)
    assert explanation(found) == [
        "4711_0 ended (exit status 127) and its pilot never reported; its script: /state/q/jobs/x/script.sh",
        "    it printed nothing to /state/q/jobs/x/output_0.txt",
    ]


def test_a_requeued_job_says_so_and_what_its_pilot_said_last():
    gone = READY | {"state": "gone", "message": "connection closed by the other side"}
    found = row(JobState.PENDING, [gone], reason="BeginTime")
    assert (found.state, found.reason, found.hostname) == ("pending", "BeginTime", "n1")
    assert found.message == "requeued; its pilot on n1 has ended: connection closed by the other side"
    assert "requeued; its pilot on n1 has ended: it said nothing" in cells(row(JobState.HELD, [gone | {"message": ""}]))
