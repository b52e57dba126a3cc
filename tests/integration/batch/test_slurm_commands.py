"""Slurm's adapter against programs on PATH that behave like Slurm's on a chatty site."""

import os
import re
import signal
import subprocess
import sys

import pytest

from hpcq.batch import records
from hpcq.batch.base import JobState, PilotRequest, get_batch_system, load_jobs
from hpcq.batch.command import CommandRunner
from hpcq.batch.slurm import SlurmBatch
from hpcq.errors import BatchError, TemplateError


def request(**values) -> PilotRequest:
    return PilotRequest(**{"queue": "q", "pilot_argv": ("true",), **values})


def test_one_pilot(fake_slurm, state):
    [job] = get_batch_system("slurm").submit(request())
    assert job.id == "4711"
    assert job.script.read_text() == fake_slurm.submitted()
    [call] = fake_slurm.calls("sbatch")
    assert call["argv"] == ["sbatch", "--parsable", f"--output={job.output}", str(job.script)]
    assert (state / "q" / "jobs" / "4711" / "job.json").exists()
    assert load_jobs("q") == [job]


def test_several_are_one_array_and_one_question(fake_slurm):
    slurm = get_batch_system("slurm")
    jobs = slurm.submit(request(count=3))
    assert [job.id for job in jobs] == ["4711_0", "4711_1", "4711_2"]
    assert len({job.output for job in jobs}) == 3
    fake_slurm.set_jobs({"4711_0": "RUNNING|n1|None", "4711_1": "PENDING||Resources"})
    statuses = slurm.status(jobs)
    assert [statuses[job.id].state for job in jobs] == [JobState.RUNNING, JobState.PENDING, JobState.UNKNOWN]
    assert statuses["4711_1"].reason == "Resources"
    assert len(fake_slurm.calls("squeue")) == 1


def test_all_ids_gone_is_unknown_not_an_error(fake_slurm):
    jobs = get_batch_system("slurm").submit(request(count=2))
    fake_slurm.set_jobs({})
    statuses = get_batch_system("slurm").status(jobs)
    assert {status.state for status in statuses.values()} == {JobState.UNKNOWN}
    assert not any(status.is_listed for status in statuses.values())


def test_accounts_tell_of_jobs_that_left_the_listing(fake_slurm):
    slurm = get_batch_system("slurm")
    jobs = slurm.submit(request(count=4))
    fake_slurm.set_jobs({"4711_0": "RUNNING|n1|None"})
    accounts = {"4711_0": "FAILED|1:0|n1|None", "4711_1": "CANCELLED by 1000|0:0|None assigned|None"}
    fake_slurm.set_accounts({**accounts, "4711_2": "OUT_OF_MEMORY|0:125|n2|None", "4712_3": "COMPLETED|0:0|n1|None"})
    statuses = slurm.status(jobs)
    assert [(statuses[job.id].state, statuses[job.id].exit_code) for job in jobs] == [
        (JobState.RUNNING, None),
        (JobState.CANCELLED, 0),
        (JobState.OUT_OF_MEMORY, -125),
        (JobState.UNKNOWN, None),
    ]
    fake_slurm.set_jobs({job.id: "RUNNING|n1|None" for job in jobs})
    slurm.status(jobs)
    assert len(fake_slurm.calls("sacct")) == 1  # not while squeue has them all


def test_a_site_without_accounts_is_asked_once(fake_slurm):
    slurm = get_batch_system("slurm")
    jobs = slurm.submit(request())
    fake_slurm.set_jobs({})
    for _ in range(2):
        assert slurm.status(jobs)["4711"].state is JobState.UNKNOWN
    assert len(fake_slurm.calls("sacct")) == 1


def test_accounts_that_do_not_answer_are_no_error(fake_slurm):
    slurm = SlurmBatch(CommandRunner(time_limit=5))  # in which squeue must have answered
    jobs = slurm.submit(request())
    fake_slurm.set_jobs({})
    for mood in ({"hang": True}, {"status": 1, "stderr": "sacct: error: Problem talking to the database\n"}):
        fake_slurm.behave({"sacct": mood})
        assert slurm.status(jobs)["4711"].state is JobState.UNKNOWN
    assert len(fake_slurm.calls("sacct")) == 2


def test_a_controller_that_is_down_is_an_error_in_its_words(fake_slurm):
    jobs = get_batch_system("slurm").submit(request())
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n"
    fake_slurm.behave({"squeue": {"status": 1, "stderr": words}})
    with pytest.raises(BatchError, match=r"^squeue refused: .*Unable to contact slurm controller"):
        get_batch_system("slurm").status(jobs)


def test_a_refused_submission_leaves_no_job_but_its_script(fake_slurm):
    words = "sbatch: error: invalid partition specified: nope\n"
    fake_slurm.behave({"sbatch": {"status": 1, "stderr": words}})
    with pytest.raises(BatchError) as caught:
        get_batch_system("slurm").submit(request(partition="nope"))
    pattern = r'sbatch refused: "invalid partition specified: nope" \(host \S+, script \S+/script\.sh\)'
    assert re.fullmatch(pattern, str(caught.value))
    assert "99% full" in caught.value.__notes__[0]
    assert load_jobs("q") == []
    [directory] = records._submissions("q")
    assert "--partition=nope" in (directory / "script.sh").read_text()


def test_success_without_an_id_is_an_error(fake_slurm):
    fake_slurm.behave({"sbatch": {"stdout": "Job queued!"}})
    with pytest.raises(BatchError, match=r"sbatch reported no job id .*Job queued!"):
        get_batch_system("slurm").submit(request())


def test_the_cluster_is_remembered_and_named(fake_slurm):
    fake_slurm.behave({"sbatch": {"stdout": "4711;c2"}})
    get_batch_system("slurm").submit(request())
    [job] = load_jobs("q")
    get_batch_system("slurm").status([job])
    get_batch_system("slurm").cancel([job])
    assert "--clusters=c2" in fake_slurm.calls("squeue")[0]["argv"]
    assert "--clusters=c2" in fake_slurm.calls("scancel")[0]["argv"]


def test_variables_of_the_site_and_of_the_user(fake_slurm, monkeypatch):
    for name in ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_ARRAY_INX", "SQUEUE_STATES", "SCANCEL_STATE"):
        monkeypatch.setenv(name, "x")
    slurm = get_batch_system("slurm")
    jobs = slurm.submit(request(account="mine"))
    slurm.status(jobs)
    slurm.cancel(jobs)
    seen = fake_slurm.calls("sbatch")[0]["environment"]
    assert "SBATCH_PARTITION" in seen
    assert not {"SBATCH_ACCOUNT", "SBATCH_ARRAY_INX"} & seen.keys()
    assert "SQUEUE_STATES" not in fake_slurm.calls("squeue")[0]["environment"]
    assert "SCANCEL_STATE" not in fake_slurm.calls("scancel")[0]["environment"]


@pytest.mark.parametrize("words", ["Invalid job id specified", "Job/step already completing or completed"])
def test_cancelling_what_has_ended_is_no_error(fake_slurm, words):
    jobs = get_batch_system("slurm").submit(request(count=2))
    fake_slurm.behave(
        {"scancel": {"status": 1, "stderr": f"scancel: error: Kill job error on job id 4711_0: {words}\n"}}
    )
    get_batch_system("slurm").cancel(jobs)
    assert fake_slurm.calls("scancel")[0]["argv"] == ["scancel", "--quiet", "4711_[0-1]"]


def test_a_cancel_that_is_refused(fake_slurm):
    jobs = get_batch_system("slurm").submit(request())
    words = "scancel: error: Kill job error on job id 4711: Access/permission denied\n"
    fake_slurm.behave({"scancel": {"status": 1, "stderr": words}})
    with pytest.raises(BatchError, match=r"scancel refused: .*permission denied"):
        get_batch_system("slurm").cancel(jobs)


def test_a_hanging_sbatch(fake_slurm):
    fake_slurm.behave({"sbatch": {"hang": True}})
    with pytest.raises(BatchError, match=r"sbatch on .* did not answer within 4 s.*; a job 'hpcq-q' may be there all"):
        SlurmBatch(CommandRunner(time_limit=4)).submit(request())


def test_a_script_that_is_no_shell_is_not_submitted(fake_slurm):
    with pytest.raises(TemplateError, match=r"slurm\.sh\.j2: the rendered script is not valid shell: .*line"):
        get_batch_system("slurm").submit(request(setup=("if true",)))
    assert fake_slurm.calls("sbatch") == []
    assert load_jobs("q") == []


def test_a_directive_after_a_command_is_not_submitted(fake_slurm, tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text("#!/bin/bash\nmodule load x\n#SBATCH --mem=1\nexec {{ pilot_argv }}\n")
    with pytest.raises(TemplateError, match=r"mine\.j2: line 3 .*after the first command \(line 2\)"):
        get_batch_system("slurm").submit(request(template=template))
    assert fake_slurm.calls("sbatch") == []


def test_ctrl_c_while_sbatch_is_at_work_loses_no_job(fake_slurm, tmp_path):
    """It has the job already, and is about to say so."""
    for name in ("began", "go"):
        os.mkfifo(tmp_path / name)
    (fake_slurm.bin / "sbatch").write_text(f"#!/bin/sh\necho >{tmp_path}/began\nread _ <{tmp_path}/go\necho 4711\n")
    script = (
        "from hpcq.batch.base import PilotRequest, get_batch_system\n"
        "get_batch_system('slurm').submit(PilotRequest(queue='q', pilot_argv=('true',)))\n"
    )
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True) as program:
        (tmp_path / "began").read_text()
        program.send_signal(signal.SIGINT)
        assert "waiting for the batch system's answer" in program.stderr.readline()
        (tmp_path / "go").write_text("\n")
        said = program.communicate(timeout=90)[1]
    assert "1 pilots had been submitted: 4711 to 4711" in said
    assert "KeyboardInterrupt" in said
    assert [job.id for job in load_jobs("q")] == ["4711"]


def test_pilots_get_the_users_locale_and_commands_that_are_read_the_c_one(fake_slurm, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    slurm = get_batch_system("slurm")
    slurm.status(slurm.submit(request()))
    assert fake_slurm.calls("sbatch")[0]["environment"]["LC_ALL"] == "C.UTF-8"
    assert fake_slurm.calls("squeue")[0]["environment"]["LC_ALL"] == "C"
    monkeypatch.delenv("LC_ALL")
    slurm.submit(request())
    assert "LC_ALL" not in fake_slurm.calls("sbatch")[1]["environment"]
