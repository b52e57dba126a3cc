"""What ``hpcq pilots`` asks whom, and in which order."""

import json
from pathlib import Path

from click.testing import CliRunner

from hpcq.batch.base import BatchJob, JobState, JobStatus
from hpcq.cli import pilots
from hpcq.cli.main import cli

HERE = Path("/state/q/jobs/x")
JOB = BatchJob("4711_0", "slurm", "q", HERE, HERE / "script.sh", HERE / "output_0.txt", 0.0)


def test_a_pilot_that_fails_while_we_ask_is_shown_with_its_layer(monkeypatch):
    """It tells the manager and then ends: whoever asks the manager first may see neither the word nor a running job."""
    pilot = {"name": "n1-1", "job_id": JOB.id, "state": "starting"}

    def states(_):
        pilot.update(state="failed", failed_layer="cvmfs", message="no cvmfs2")
        return {JOB.id: JobStatus(JOB.id, JobState.FAILED)}, []

    monkeypatch.setattr(pilots, "load_jobs", lambda _: [JOB])
    monkeypatch.setattr(pilots, "job_states", states)
    monkeypatch.setattr(pilots.records, "has_reported", lambda _: True)
    monkeypatch.setattr(pilots, "ask_manager", lambda *_: [dict(pilot)])
    monkeypatch.setattr(pilots, "require_queue", lambda _: "q")
    done = CliRunner().invoke(cli, ["pilots", "--name", "q", "--json"])
    [row] = json.loads(done.output)
    assert (row["state"], row["failed_layer"], row["message"]) == ("failed", "cvmfs", "no cvmfs2")
