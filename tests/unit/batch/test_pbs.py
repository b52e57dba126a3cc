"""PBS's argvs, parsers and golden scripts, and what is refused. No processes but ``bash -n``."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.batch import records
from hpcq.batch.base import BatchJob, JobState, PilotRequest
from hpcq.batch.pbs import PbsBatch, TorqueBatch
from hpcq.batch.pbs_listing import STATES, NotJsonError, parse_json, parse_text
from hpcq.batch.pbs_options import split_option
from hpcq.batch.ranges import ranges
from hpcq.errors import TemplateError, UsageError

HERE = Path(__file__).parent
DIRECTORY = Path("/state/hpcq/analysis/jobs/20250101T000000-abcdef")
BANNER = "*** Scheduled downtime on Tuesday ***\n{ not JSON }\n"


def request(**values: object) -> PilotRequest:
    return PilotRequest(**{"queue": "analysis", "pilot_argv": ("python", "-m", "hpcq.pilot"), **values})


EVERYTHING = {
    "count": 20,
    "nodes": 2,
    "cores": 16,
    "gpus": 2,
    "memory_mb": 32768,
    "walltime_s": 100000,
    "partition": "cms",
    "account": "t3_us",
    "constraint": "model=bro",
    "exclusive": True,
    "mail": "alice@example.org",
    "options": ("-l site=a:b", "-V"),
    "modules": ("gcc", "python/3.11"),
    "setup": ("ulimit -n 8192",),
    "environment": {"B": "$(date)", "A": "it's"},
    "epilogue": ("rm -rf $TMPDIR/mine",),
}


@pytest.mark.parametrize(
    ("system", "values", "golden"),
    [
        (PbsBatch(), {}, "golden_pbs.sh"),
        (PbsBatch(), EVERYTHING, "golden_pbs_everything.sh"),
        (TorqueBatch(), EVERYTHING, "golden_torque_everything.sh"),
    ],
)
def test_golden_scripts(system, values, golden):
    assert system.render(request(**values), DIRECTORY).script == (HERE / golden).read_text()


def test_the_command():
    script = f"{DIRECTORY}/script.sh"
    command = PbsBatch().render(request(count=20), DIRECTORY).command
    assert command == ("qsub", "-f", "-J", "0-19", "-j", "oe", "-o", str(DIRECTORY), script)
    command = TorqueBatch().render(request(count=20), DIRECTORY).command
    assert command == ("qsub", "-j", "oe", "-o", f"{DIRECTORY}/messages_0.txt", script)


def test_reservations_are_queues():
    assert "#PBS -q R123\n" in PbsBatch().render(request(reservation="R123")).script
    with pytest.raises(UsageError, match="leave partition out"):
        PbsBatch().render(request(reservation="R123", partition="x"))
    with pytest.raises(UsageError, match="advres"):
        TorqueBatch().render(request(reservation="R123"))
    with pytest.raises(UsageError, match="qos means nothing to PBS"):
        PbsBatch().render(request(qos="x"))


@pytest.mark.parametrize("value", ["a b; rm -rf /", "$(x)", "é", "#", "a|b", "`x`"])
def test_hostile_values_stay_values(value):
    script = PbsBatch().render(request(partition=value, account=value, mail=value)).script
    quoted = f"'{value}'"
    assert [line for line in script.splitlines() if quoted in line] == [
        f"#PBS -q {quoted}",
        f"#PBS -A {quoted}",
        f"#PBS -M {quoted}",
    ]


@pytest.mark.parametrize("value", ["a'b", 'a"b'])
def test_quotes_are_refused_where_pbs_may_read_them_otherwise(value):
    with pytest.raises(TemplateError, match="holds a quote"):
        PbsBatch().render(request(partition=value))


def test_torque_is_careful_with_paths():
    with pytest.raises(UsageError, match="HPCQ_STATE_DIR"):
        TorqueBatch().render(request(), Path("/home/a b"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-l software=root", ("-l", "software=root")),
        ("-V", ("-V",)),
        ("-pa", ("-p", "a")),
        ("-W x=a b", ("-W", "x=a b")),
    ],
)
def test_options_that_may_be_added(option, words):
    assert split_option(option) == words


@pytest.mark.parametrize(
    "option",
    ["", "-", "l x=y", "--constraint=knl", "-J 0-3", "-t 1", "-o x", "-l select=2", "-l mem=5,walltime=1", "-I", "-z",
     "-l x=1,ncpus=2", "-W block=true", "; ls", "-l nodes=1:ppn=2"],
)  # fmt: skip
def test_options_that_may_not(option):
    with pytest.raises(UsageError, match="option "):
        split_option(option)


def document(**jobs: object) -> str:
    return json.dumps({"timestamp": 1, "pbs_server": "pbs1", "Jobs": jobs}, indent="\t")


def test_listings_among_banners():
    shown = (
        BANNER
        + document(**{"7.pbs1": {"job_state": "R", "exec_host": "n1/0*8+n2/0*8", "comment": "Job\nrun"}})
        + "\nBye\n"
    )
    [status] = parse_json(shown).values()
    assert (status.id, status.state, status.hosts, status.reason) == ("7.pbs1", JobState.RUNNING, "n1,n2", "Job run")


def test_no_jobs_at_all():
    assert parse_json('{\n\t"timestamp":\t1,\n\t"pbs_server":\t"pbs1"\n}\n') == {}


@pytest.mark.parametrize("text", ["", "x", "{", "}\n{", "{\n\t'a'\n}", '{\n\t"Jobs":\t[]\n}', "{\n" * 2000 + "}\n"])
def test_what_is_no_document(text):
    with pytest.raises(NotJsonError):
        parse_json(text)


@pytest.mark.parametrize(
    ("attributes", "state", "code"),
    [
        ({"job_state": "F", "substate": 92, "Exit_status": 0}, JobState.DONE, 0),
        ({"job_state": "X", "substate": 92, "Exit_status": 0}, JobState.DONE, 0),
        ({"job_state": "F", "substate": 93, "Exit_status": 5}, JobState.FAILED, 5),
        ({"job_state": "F", "substate": 93, "Exit_status": 143}, JobState.FAILED, 143),
        ({"job_state": "F", "substate": 93, "Exit_status": -29}, JobState.TIMEOUT, None),
        ({"job_state": "F", "substate": 93, "Exit_status": 271}, JobState.FAILED, -15),
        ({"job_state": "F", "substate": 91, "Exit_status": 271}, JobState.CANCELLED, -15),
        ({"job_state": "F", "substate": 91}, JobState.CANCELLED, None),
        ({"job_state": "C", "exit_status": "0"}, JobState.DONE, 0),
        ({"job_state": "C"}, JobState.DONE, None),  # Slurm's qstat says no more
        ({"job_state": "C", "exit_status": "271"}, JobState.FAILED, -15),
        ({"job_state": 1e5}, JobState.UNKNOWN, None),
        ({}, JobState.UNKNOWN, None),
        ({"job_state": "F", "Exit_status": "odd", "substate": None}, JobState.CANCELLED, None),
    ],
)
def test_ends(attributes, state, code):
    [status] = parse_json(document(**{"7.pbs1": attributes})).values()
    assert (status.state, status.exit_code) == (state, code)
    assert status.is_listed


@pytest.mark.parametrize("letter", list("QWTHRBSUEM"))
def test_every_state_is_known(letter):
    [status] = parse_json(document(**{"7.pbs1": {"job_state": letter}})).values()
    assert status.state is STATES[letter]
    assert not status.state.is_final


TORQUE = """Site news
Job Id: 12.server.example.org
    Job_Name = x
    job_state = R
    exec_host = n1/0+n1/1
    Variable_List = A=1,
\tjob_state = C,B=2
C=3
    comment = Not Running:
\t no node
Job Id:\t13
\tJob_Name = y
\tjob_state = Q

Job Id: none
    job_state = C
"""


def test_text_of_torque_and_of_slurms_imitation():
    listed = parse_text(TORQUE)
    assert {job_id: status.state for job_id, status in listed.items()} == {
        "12.server.example.org": JobState.RUNNING,
        "13": JobState.PENDING,
    }
    assert (listed["12.server.example.org"].hosts, listed["12.server.example.org"].reason) == (
        "n1",
        "Not Running: no node",
    )


@given(st.text())
def test_any_text_can_be_read(text):
    assert isinstance(parse_text(text), dict)
    assert isinstance(parse_text("Job Id: 1.x\n" + text), dict)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=10,
)
NAMES = st.sampled_from(["job_state", "substate", "comment", "exec_host", "Exit_status", "Job_Name"])


@given(
    st.dictionaries(st.from_regex(r"\d{1,6}(\[\d{0,3}\])?\.pbs1", fullmatch=True), JSON | st.dictionaries(NAMES, JSON))
)
def test_whatever_is_in_a_document_has_a_state(jobs):
    listed = parse_json(document(**jobs))
    assert all(isinstance(status.state, JobState) for status in listed.values())
    assert listed.keys() <= jobs.keys()


@given(st.sets(st.integers(0, 200)))
def test_ranges_say_each_number_once(numbers):
    said = []
    for part in ranges(numbers):
        first, _, last = part.partition("-")
        said += range(int(first), int(last or first) + 1)
    assert said == sorted(numbers)


def job(job_id: str) -> BatchJob:
    return BatchJob(job_id, "pbs", "q", DIRECTORY, DIRECTORY / "script.sh", DIRECTORY / "output.txt", 0.0)


def test_what_a_job_may_be_called():
    assert records.base_id("18[3].pbs1.example.org") == "18[].pbs1.example.org"
    assert records.base_id("18.pbs1_x") == "18.pbs1_x"
    assert records.names(job("18[3].pbs1")) == {"18[3].pbs1", "18[3]", "18[].pbs1", "18[]", "18"}
    assert records.names(job("18.pbs1")) == {"18.pbs1", "18"}


def test_output_is_followed_by_what_pbs_said(tmp_path):
    one = BatchJob(
        "1.pbs1", "pbs", "q", tmp_path, tmp_path / "s", tmp_path / "output.txt", 0.0, messages=tmp_path / "1.pbs1.OU"
    )
    assert records.output_tail(one) == []
    (tmp_path / "output.txt").write_text("a\nb\n")
    (tmp_path / "1.pbs1.OU").write_text("=>> PBS: job killed: walltime 10 exceeded limit 5\n")
    assert records.output_tail(one, 2) == ["b", "=>> PBS: job killed: walltime 10 exceeded limit 5"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("#!/bin/bash\nmodule load x\n#PBS -l mem=1gb\nexec {{ pilot_argv }}\n", r"line 3 .*after the first command"),
        ("#!/bin/bash\n#PBS -q {{ queue_name }}\nexec {{ pilot_argv }}\n", "line 2: 'queue_name' is undefined"),
        ("#!/bin/bash\n#PBS -q {{ partition }}\nexec {{ pilot_argv }}\n", "line 2: partition was not given"),
        ("#!/bin/bash\nif true\nexec {{ pilot_argv }}\n", "is not valid shell"),
        ("#PBS -q x\nexec {{ pilot_argv }}\n", "must begin with #!"),
        ("#!/bin/bash\n#PBS -q x\n", "no pilot would start"),
    ],
)
def test_templates_with_mistakes(tmp_path, source, words):
    template = tmp_path / "mine.sh.j2"
    template.write_text(source)
    with pytest.raises(TemplateError, match=words):
        PbsBatch().render(request(template=template))


@pytest.mark.parametrize("system", [PbsBatch(), TorqueBatch()])
def test_a_state_directory_that_qsub_would_misread(system, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "a:b"))
    with pytest.raises(UsageError, match="set HPCQ_STATE_DIR to a directory without a colon"):
        system.render(request())
