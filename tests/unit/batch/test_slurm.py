"""Slurm's argvs and parsers, the golden script, and what is refused. No processes but ``bash -n``."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq.batch.base import BatchJob, JobState, PilotRequest, batch_system_names, get_batch_system
from hpcq.batch.command import CommandResult, refusal
from hpcq.batch.slurm import (
    STATES,
    SlurmBatch,
    account_argv,
    cancel_argv,
    hidden_variables,
    parse_accounts,
    parse_statuses,
    parse_submitted,
    status_argv,
    submit_argv,
)
from hpcq.batch.slurm_options import check_option
from hpcq.errors import BatchError, TemplateError, UsageError

GOLDEN = Path(__file__).with_name("golden_slurm.sh")
DIRECTORY = Path("/state/hpcq/analysis/jobs/20250101T000000-abcdef")

BANNER = "*** Scheduled downtime on Tuesday ***\n12 users logged in\n"


def request(**values: object) -> PilotRequest:
    return PilotRequest(**{"queue": "analysis", "pilot_argv": ("python", "-m", "hpcq.pilot"), **values})


def job(job_id: str, cluster: str = "") -> BatchJob:
    script, output = DIRECTORY / "script.sh", DIRECTORY / "output.txt"
    return BatchJob(job_id, "slurm", "analysis", DIRECTORY, script, output, 0.0, cluster)


def test_golden_script():
    rendered = SlurmBatch().render(
        request(
            count=20,
            cores=16,
            memory_mb=32768,
            walltime_s=28800,
            partition="cms long",
            account="t3_us",
            qos="normal",
            constraint="[knl|hsw]",
            options=("--licenses=cvmfs:1", "-xnode[1-3]"),
            setup=("module load python/3.11",),
            environment={"B": "$(date)", "A": "it's"},
            pilot_argv=("/opt/py thon/bin/python", "-m", "hpcq.pilot", "--require", "cvmfs:cms.cern.ch"),
        ),
        DIRECTORY,
    )
    assert rendered.script == GOLDEN.read_text()
    assert rendered.command == (
        "sbatch",
        "--parsable",
        "--array=0-19",
        f"--output={DIRECTORY}/output_%a.txt",
        f"{DIRECTORY}/script.sh",
    )


def test_the_least_script_leaves_the_rest_to_the_site():
    script = SlurmBatch().render(request()).script
    for word in ("--mem", "--time", "--partition", "--account", "--qos", "--constraint", "export"):
        assert word not in script
    assert "#SBATCH --job-name=hpcq-analysis\n" in script
    assert script.endswith("\nexec python -m hpcq.pilot\n")


def test_a_short_walltime_leaves_time_before_the_warning():
    assert "#SBATCH --signal=B:TERM@60\n" in SlurmBatch().render(request(walltime_s=240)).script


@pytest.mark.parametrize("value", ["a b; rm -rf /", "$(x)", "é", "x" * 5000, "a'b", "#", '"', "a|b"])
def test_hostile_values_stay_values(value):
    script = SlurmBatch().render(request(partition=value, account=value, job_name=value)).script
    assert script.count("#SBATCH --") >= 7


def test_a_backslash_is_refused_where_sbatch_would_drop_it():
    with pytest.raises(TemplateError, match="backslash"):
        SlurmBatch().render(request(partition="a\\b"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partition": "a\nb"}, "partition holds a newline"),
        ({"options": ("--x", "--y\x00")}, r"options\[1\] holds a control character"),
        ({"setup": ("a\nb",)}, r"setup\[0\] holds a newline"),
        ({"environment": {"A": "\n"}}, r"environment\.A holds a newline"),
        ({"environment": {"A-B": "x"}}, "'A-B' is not a variable's name"),
        ({"count": 0}, "count 0 is out of range"),
        ({"count": True}, "count True is not a whole number"),
        ({"cores": 0}, "cores 0 is out of range"),
        ({"cores": 10**9}, "out of range"),
        ({"walltime_s": 0}, "walltime_s 0 is out of range"),
        ({"memory_mb": -1}, "memory_mb -1 is out of range"),
        ({"account": ""}, "account is empty"),
        ({"queue": "../x"}, "queue name '../x' cannot be used"),
        ({"pilot_argv": ()}, "pilot_argv is empty"),
    ],
)
def test_requests_that_nothing_could_run(values, words):
    with pytest.raises(UsageError, match=words):
        request(**values)


@pytest.mark.parametrize(
    "option",
    ["--constraint=knl", "--exclusive", "-xnode1", "-G2", "--comment=a b", "--nodelist=n1", "--time-min=5"],
)
def test_options_that_may_be_added(option):
    check_option(option)


@pytest.mark.parametrize(
    "option",
    [
        "constraint=knl",
        "--constraint knl",
        "-x node1",
        "",
        "-",
        "--",
        "--array=1",
        "--arr=1",
        "-a1",
        "--time=5",
        "-t5",
        "--output=x",
        "--wrap=ls",
        "-N2",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--parsable",
        "--mem=5",
        "--mem-per-cpu=5",
        "-c4",
        "; ls",
    ],
)
def test_options_that_may_not(option):
    with pytest.raises(UsageError, match="option "):
        check_option(option)


def test_submit_argv_escapes_patterns_and_refuses_backslashes():
    assert submit_argv(1, Path("/s/100%a"))[2] == "--output=/s/100%%a/output.txt"
    with pytest.raises(UsageError, match="backslash"):
        submit_argv(1, Path("/s\\x"))


def test_status_argv_asks_once_for_an_array():
    argv = status_argv([job("7_0"), job("7_1"), job("12"), job("9_3")])
    assert argv[0] == "squeue"
    assert argv[-1] == "--jobs=7,9,12"
    assert "--clusters=c2" in status_argv([job("7_0", "c2")], "c2")


def test_cancel_argv_puts_an_array_into_one_request():
    jobs = [job("7_0"), job("7_1"), job("7_2"), job("7_5"), job("12"), job("9_3")]
    assert cancel_argv(jobs) == ("scancel", "--quiet", "7_[0-2,5]", "12", "9_3")


def result(stdout: str = "", stderr: str = "", status: int = 0) -> CommandResult:
    return CommandResult(("sbatch", "x"), status, stdout, stderr)


@pytest.mark.parametrize(
    ("stdout", "expected"),
    [("4711\n", ("4711", "")), ("4711;c2\n", ("4711", "c2")), (BANNER + "4711\nBye\n", ("4711", ""))],
)
def test_the_id_is_found_among_banners(stdout, expected):
    assert parse_submitted(result(stdout), "script s") == expected


@pytest.mark.parametrize("stdout", ["", BANNER, "Submitted batch job 4711\n", "4711 ok", "-5", "٣"])
def test_no_id_is_an_error_with_what_was_printed(stdout):
    with pytest.raises(BatchError, match=r"reported no job id \(host .*script s\); it printed: ") as caught:
        parse_submitted(result(stdout, "warning: x"), "script s")
    assert "warning: x" in str(caught.value)


def test_refusals_are_in_slurms_words():
    stderr = BANNER + (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    error = refusal(result("", stderr, 1), "script s")
    assert str(error).startswith(
        'sbatch refused: "invalid partition specified: nope; '
        'Batch job submission failed: Invalid partition name specified" (host '
    )
    assert str(error).endswith(", script s)")
    assert "downtime" in error.__notes__[0]
    assert '"exit status 5 and no message"' in str(refusal(result("", "", 5)))
    assert "\n" not in str(refusal(result("", "a\nb\x1b[1m\n", 5)))


LISTING = (
    BANNER + "hpcq|7_0|RUNNING|node[1-2]|None\n"
    "hpcq|7_1|PENDING||Priority\n"
    "hpcq|8|SOMETHING_NEW||None\n"
    "CLUSTER: c2\nJOBID STATE\nhpcq|x|RUNNING||\n hpcq|9|PENDING||QOSMaxJobs|odd (a b)\n"
)


def test_statuses_among_banners():
    statuses = parse_statuses(LISTING)
    assert set(statuses) == {"7_0", "7_1", "8", "9"}
    assert statuses["7_0"].state is JobState.RUNNING
    assert (statuses["7_0"].hosts, statuses["7_0"].reason) == ("node[1-2]", "")
    assert statuses["7_1"].reason == "Priority"
    assert statuses["8"].state is JobState.UNKNOWN
    assert statuses["8"].is_listed
    assert statuses["9"].reason == "QOSMaxJobs|odd (a b)"


@pytest.mark.parametrize(
    "name",
    [
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETED",
        "CANCELLED",
        "FAILED",
        "TIMEOUT",
        "NODE_FAIL",
        "PREEMPTED",
        "BOOT_FAIL",
        "DEADLINE",
        "OUT_OF_MEMORY",
        "CONFIGURING",
        "COMPLETING",
        "RESIZING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "SPECIAL_EXIT",
        "STOPPED",
        "REVOKED",
        "RESV_DEL_HOLD",
        "SIGNALING",
        "STAGE_OUT",
    ],
)
def test_every_state_of_slurm_is_known(name):
    state = parse_statuses(f"hpcq|1|{name}||None")["1"].state
    assert state is STATES[name]
    assert (state is JobState.UNKNOWN) == (name == "REVOKED")


def test_accounts_are_asked_for_this_time_only():
    argv = account_argv([job("7_0"), job("7_1"), job("9")], "c2")
    assert argv[:5] == ("sacct", "--allocations", "--noheader", "--parsable2", "--clusters=c2")
    assert argv[-1] == "--jobs=7,9"
    assert any(word.startswith("--starttime=19") for word in argv)  # these were submitted in 1970


def test_accounts_among_banners():
    text = (
        BANNER + "7_0|COMPLETED|0:0|n1|None\n7_1|TIMEOUT|0:15|n[1-2]|None\n7_[2-9]|PENDING|0:0|None assigned|Priority\n"
    )
    accounts = parse_accounts(text + "8|CANCELLED by 1000+|0:0|None assigned|x|y\n7_0.batch|COMPLETED|0:0|n1|\n")
    assert {job_id: (a.state, a.hosts, a.exit_code) for job_id, a in accounts.items()} == {
        "7_0": (JobState.DONE, "n1", 0),
        "7_1": (JobState.TIMEOUT, "n[1-2]", -15),
        "8": (JobState.CANCELLED, "", 0),
    }


@given(st.text())
def test_any_account_can_be_read(text):
    assert isinstance(parse_accounts(text), dict)


def test_every_option_is_in_the_golden_script():
    rendered = SlurmBatch().render(
        request(
            nodes=2,
            cores=4,
            gpus=1,
            reservation="maintenance",
            exclusive=True,
            mail="alice@example.org",
            modules=("gcc", "python/3.11"),
            epilogue=("echo over",),
        ),
        DIRECTORY,
    )
    assert rendered.script == GOLDEN.with_name("golden_slurm_nodes.sh").read_text()


@given(st.text())
def test_any_listing_can_be_read(text):
    assert isinstance(parse_statuses(text), dict)


@given(st.dictionaries(st.from_regex(r"\d{1,8}(_\d{1,4})?", fullmatch=True), st.sampled_from(sorted(STATES))))
def test_a_listing_comes_back(states):
    listing = "".join(f"hpcq|{id_}|{state}|n1|None\nnoise\n" for id_, state in states.items())
    assert {id_: status.raw_state for id_, status in parse_statuses(listing).items()} == states


def test_variables_that_would_overrule_the_user_are_hidden():
    assert "SBATCH_ACCOUNT" not in hidden_variables(request())
    hidden = hidden_variables(request(account="x", memory_mb=5))
    assert {"SBATCH_ACCOUNT", "SBATCH_MEM_PER_CPU", "SBATCH_ARRAY_INX"} <= hidden
    assert "SBATCH_PARTITION" not in hidden


def test_batch_systems_by_name():
    assert batch_system_names() == ["local", "pbs", "slurm", "torque"]
    assert get_batch_system("slurm").name == "slurm"
    with pytest.raises(UsageError, match="unknown batch system 'lsf'; known are local, pbs, slurm, torque"):
        get_batch_system("lsf")
