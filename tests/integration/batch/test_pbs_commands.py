"""The adapter of PBS against programs on PATH that answer as a recorded OpenPBS server did."""

import json

import pytest

from hpcq.batch.base import JobState, PilotRequest, get_batch_system, load_jobs
from hpcq.batch.command import CommandRunner
from hpcq.batch.pbs import PbsBatch
from hpcq.batch.tracker import FailedStart, Forgotten, JobTracker, PollFailed, PollRecovered, Requeued, StateChanged
from hpcq.errors import BatchError


def request(**values) -> PilotRequest:
    return PilotRequest(**{"queue": "q", "pilot_argv": ("true",), **values})


def pbs() -> PbsBatch:
    system = get_batch_system("pbs")
    assert isinstance(system, PbsBatch)
    return system


def states(system, jobs):
    statuses = system.status(jobs)
    return [statuses[job.id].state for job in jobs]


def test_ids_begin_at_nought(fake_pbs, state):
    fake_pbs.set(banner=True)
    [first] = pbs().submit(request())
    [second] = pbs().submit(request())
    assert (first.id, second.id) == ("0.pbs1", "1.pbs1")
    script = str(first.script)
    assert fake_pbs.calls("qsub")[0] == ["qsub", "-f", "-j", "oe", "-o", str(first.directory), script]
    assert load_jobs("q") == [first, second]
    assert (state / "q" / "jobs" / "0.pbs1").resolve() == first.directory.resolve()


def test_several_are_one_array_whose_subjobs_are_followed_one_by_one(fake_pbs):
    fake_pbs.set(slots=2)
    system = pbs()
    jobs = system.submit(request(count=4))
    assert [job.id for job in jobs] == [f"0[{index}].pbs1" for index in range(4)]
    assert [job.output.name for job in jobs] == [f"output_{index}.txt" for index in range(4)]
    assert states(system, jobs) == [JobState.RUNNING] * 2 + [JobState.PENDING] * 2
    status = system.status(jobs)
    assert status["0[0].pbs1"].hosts == "n1"
    assert status["0[3].pbs1"].reason.startswith("Not Running: ")
    system.cancel(jobs[1:3])
    assert states(system, jobs) == [JobState.RUNNING, JobState.RUNNING, JobState.CANCELLED, JobState.PENDING]
    fake_pbs.later(10)
    assert states(system, jobs) == [JobState.RUNNING, JobState.CANCELLED, JobState.CANCELLED, JobState.RUNNING]
    assert {tuple(call) for call in fake_pbs.calls("qstat")} == {
        ("qstat", "-x", "-t", "-f", "-F", "json", "0[].pbs1"),
    }
    assert fake_pbs.calls("qdel") == [["qdel", "0[1-2].pbs1"]]


@pytest.mark.parametrize(
    ("settings", "seconds", "state", "code"),
    [
        ({"runs": 5}, 5, JobState.DONE, 0),
        ({"runs": 5, "exit": 3}, 5, JobState.FAILED, 3),
        ({"runs": 5, "exit": 271}, 5, JobState.FAILED, -15),
        ({"runs": 5, "exit": 265}, 5, JobState.FAILED, -9),
        ({"runs": 5, "exit": -27}, 5, JobState.OUT_OF_MEMORY, None),
        ({}, 70, JobState.TIMEOUT, None),
    ],
)
def test_how_jobs_end(fake_pbs, settings, seconds, state, code):
    fake_pbs.set(**settings)
    system = pbs()
    [job] = system.submit(request(walltime_s=60))
    assert states(system, [job]) == [JobState.RUNNING]
    fake_pbs.later(seconds)
    status = system.status([job])[job.id]
    assert (status.state, status.exit_code) == (state, code)


def test_a_cancelled_job_runs_on_for_ten_seconds(fake_pbs):
    system = pbs()
    [job] = system.submit(request())
    system.status([job])
    system.cancel([job])
    fake_pbs.later(9)
    assert states(system, [job]) == [JobState.RUNNING]
    fake_pbs.later(1)
    assert states(system, [job]) == [JobState.CANCELLED]
    system.cancel([job])  # exit status 35: it has finished


def test_one_question_for_all_jobs_and_an_unknown_one_among_them(fake_pbs):
    system = pbs()
    jobs = [job for _ in range(3) for job in system.submit(request())]
    fake_pbs.set(next=0, jobs={})
    assert states(system, jobs) == [JobState.UNKNOWN] * 3
    jobs += system.submit(request())
    statuses = system.status(jobs)
    assert [statuses[job.id].is_listed for job in jobs] == [True, False, False, True]  # 0.pbs1 is there again
    assert len(fake_pbs.calls("qstat")) == 2


def test_a_server_without_history_forgets(fake_pbs):
    fake_pbs.set(history=False, runs=5)
    system = pbs()
    [job] = system.submit(request())
    assert states(system, [job]) == [JobState.RUNNING]
    fake_pbs.later(5)
    status = system.status([job])[job.id]
    assert (status.state, status.is_listed) == (JobState.UNKNOWN, False)  # absence is no end
    assert len(fake_pbs.calls("qstat")) == 3  # that -x cannot be used is found out once


def test_json_that_is_none(fake_pbs):
    fake_pbs.set(broken_json=True, banner=True)
    system = pbs()
    [job] = system.submit(request())
    assert states(system, [job]) == [JobState.RUNNING]
    assert states(system, [job]) == [JobState.RUNNING]
    assert ["json" in call for call in fake_pbs.calls("qstat")] == [True, False, False]


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        ({}, {"partition": "nosuchq"}, "Unknown queue.*qstat -Q"),
        ({"disabled": ["short"]}, {"partition": "short"}, "Queue is not enabled"),
        ({"forbidden": ["priv"]}, {"partition": "priv"}, "Unauthorized Request"),
        ({"max_walltime": 60}, {"walltime_s": 3600}, "violates queue and/or server resource limits"),
        ({"per_user": 0}, {}, "per-user limit.*submit fewer"),
        ({}, {"options": ("-l nosuch=1",)}, "Unknown resource Resource_List.nosuch"),
        ({}, {"constraint": "nosuch=1"}, "Unknown resource: nosuch"),
        ({}, {"job_name": "a b"}, "illegal -N value"),
        ({"max_array": 10}, {"count": 20}, "Array job exceeds .*in parts"),
        ({"down": True}, {}, r"cannot connect to server pbs1 \(errno=15010\).*the server is down"),
    ],
)
def test_refusals_are_in_its_words(fake_pbs, settings, values, words):
    fake_pbs.set(**settings, banner=True)
    with pytest.raises(BatchError, match=f"^qsub refused: .*{words}") as caught:
        pbs().submit(request(**values))
    assert "usage:" not in str(caught.value)
    assert "99% full" not in str(caught.value)
    assert load_jobs("q") == []


@pytest.mark.parametrize(
    ("directive", "words"),
    [
        ("-l walltime=abc", "Illegal attribute or resource value Resource_List.walltime.*see --option"),
        ("-l select=1:ncpus=abc", "Illegal attribute or resource value select.ncpus"),
        ("-l select=1 -l ncpus=1", 'cannot be used with "select"'),
        ("-Z", "invalid option -- 'Z'"),
    ],
)
def test_a_template_with_mistakes_of_its_own(fake_pbs, tmp_path, directive, words):
    template = tmp_path / "mine.sh.j2"
    template.write_text(f"#!/bin/bash\n#PBS {directive}\nexec {{{{ pilot_argv }}}}\n")
    with pytest.raises(BatchError, match=f"^qsub refused: .*{words}"):
        pbs().submit(request(template=template))


def test_a_server_that_is_down(fake_pbs):
    system = pbs()
    jobs = system.submit(request())
    fake_pbs.set(down=True)
    with pytest.raises(BatchError, match=r"^qstat refused: .*cannot connect"):
        system.status(jobs)
    with pytest.raises(BatchError, match=r"^qdel refused: .*Couldn't connect to cluster"):
        system.cancel(jobs)


@pytest.mark.parametrize("command", ["qsub", "qstat", "qdel"])
def test_a_server_that_hangs(fake_pbs, command):
    jobs = pbs().submit(request())
    fake_pbs.set(hang=[command])
    system = PbsBatch(CommandRunner(time_limit=4))  # in which bash must have looked at the script
    with pytest.raises(BatchError, match=rf"^{command} on .* did not answer within 4 s"):
        {"qsub": lambda: system.submit(request()), "qstat": lambda: system.status(jobs)}.get(
            command, lambda: system.cancel(jobs)
        )()


def test_a_request_larger_than_the_machine_says_so(fake_pbs):
    system = pbs()
    [job] = system.submit(request(cores=64))
    status = system.status([job])[job.id]
    assert (status.state, status.reason[:15]) == (JobState.PENDING, "Can Never Run: ")


def test_variables_that_would_mislead_qsub(fake_pbs, monkeypatch):
    monkeypatch.setenv("PBS_DPREFIX", "#XYZ")
    monkeypatch.setenv("HPCQ_JOB_ID", "local-1")
    pbs().submit(request())
    assert not {"PBS_DPREFIX", "HPCQ_JOB_ID"} & fake_pbs.environment().keys()


def test_a_thousand_are_one_array_and_one_question(fake_pbs):
    fake_pbs.set(slots=10**6)
    system = pbs()
    jobs = system.submit(request(count=1000))
    assert set(states(system, jobs)) == {JobState.RUNNING}
    assert (len(fake_pbs.calls("qsub")), len(fake_pbs.calls("qstat"))) == (1, 1)
    assert len(json.dumps(fake_pbs.calls("qstat"))) < 200


def test_torque_gets_a_job_for_each_pilot(fake_pbs):
    """Its dialect in argv and listing; the real commands of that kind are tried on the simulated site."""
    fake_pbs.set(per_user=2)
    system = get_batch_system("torque")
    with pytest.raises(BatchError, match=r"^2 of 3 pilots are submitted \(0\.pbs1 to 1\.pbs1\), then: .*per-user"):
        system.submit(request(count=3))
    jobs = load_jobs("q")
    assert [job.output.name for job in jobs] == ["output_0.pbs1.txt", "output_1.pbs1.txt"]
    assert states(system, jobs) == [JobState.RUNNING] * 2
    assert fake_pbs.calls("qstat") == [["qstat", "-f", "0.pbs1", "1.pbs1"]]
    system.cancel(jobs)
    assert fake_pbs.calls("qdel") == [["qdel", "0.pbs1", "1.pbs1"]]


def test_the_life_of_an_array_as_it_is_followed(fake_pbs):
    """The tracker's polls on the server's own clock: what waits, runs, ends unheard of, or is forgotten."""
    fake_pbs.set(slots=2, history=False)
    system, tracker = pbs(), JobTracker()
    jobs = system.submit(request(count=3))
    for job in jobs:
        tracker.submitted(job, 0.0)

    def poll():
        now = fake_pbs.now()
        due = tracker.next_poll(now)
        fake_pbs.later(max(0.0, due - now))
        return [type(change) for change in tracker.polled(system.status(tracker.jobs_to_ask()), fake_pbs.now())]

    assert poll() == [StateChanged] * 3
    assert fake_pbs.now() == 2
    tracker.reported(jobs[0].id, fake_pbs.now())
    assert poll() == []
    assert fake_pbs.now() == 32
    fake_pbs.set(runs=0, exit=1)
    assert poll() == []  # all have ended, and the server says nothing more of them
    fake_pbs.set(down=True)
    with pytest.raises(BatchError):
        poll()
    assert [type(change) for change in tracker.poll_failed("down", fake_pbs.now())] == [PollFailed]
    fake_pbs.set(down=False)
    assert poll() == [PollRecovered]
    seen = [change for _ in range(30) if tracker.jobs_to_ask() for change in poll()]
    assert seen == [Forgotten, FailedStart, FailedStart]
    assert tracker.next_poll(fake_pbs.now()) is None


@pytest.mark.parametrize("count", [1, 2])
def test_a_job_that_is_run_again_is_followed_on_under_its_id(fake_pbs, count):
    system, tracker = pbs(), JobTracker()
    [job, *_] = jobs = system.submit(request(count=count))
    for one in jobs:
        tracker.submitted(one, 0)
    tracker.polled(system.status(jobs), 1)
    tracker.reported(job.id, 2)
    fake_pbs.set(start_after=60)
    CommandRunner().run(["qrerun", job.id])
    changes = tracker.polled(system.status(jobs), 30)
    assert [change.job.id for change in changes if isinstance(change, Requeued)] == [job.id]
    assert job in tracker.jobs_to_ask()
    fake_pbs.later(60)
    [change] = tracker.polled(system.status(jobs), 90)
    assert isinstance(change, StateChanged)
    assert change.after.state is JobState.RUNNING
