"""The packaged scripts as bash runs them: what reaches the pilot, where output goes, how signals travel."""

import os
import signal
import subprocess
import sys

import pytest

from hpcq.batch import inline
from hpcq.batch.base import PilotRequest, get_batch_system

HOSTILE = {
    "A": "$(touch made)",
    "B": "`touch made`; touch made",
    "C": 'it\'s "q" \\ # & | > made',
    "D": "!! ~ * {a,b}",
    "E": "é ☃",
}
TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if k in 'ABCDE'}]))"
WORDS = ("a b", "$(touch made)", "'", '"', "\\", "*", "", "é", "--x=$HOME")
PATIENT = """
import signal, sys
count = 0
def told(*_):
    global count
    count += 1
signal.signal(signal.SIGTERM, told)
print("ready", flush=True)
while not count:
    signal.pause()
print("told", count, flush=True)
sys.exit(5)
"""


def patient(tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    return (sys.executable, str(tmp_path / "patient.py"))


def script(tmp_path, batch, **values):
    request = PilotRequest(**{"queue": "q", "pilot_argv": (sys.executable, "-c", TELL, *WORDS), **values})
    directory = tmp_path / "jobs" / "one"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "script.sh"
    path.write_text(get_batch_system(batch).render(request, directory).script)
    return path


def bash(path, **environment):
    command = ["bash", str(path)]
    return subprocess.run(
        command, cwd=path.parent, env={"PATH": os.environ["PATH"], "HOME": "/", **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("batch", ["slurm", "pbs", "torque", "local"])
@pytest.mark.parametrize("epilogue", [(), ("echo over",)])
def test_every_value_arrives_as_it_was(tmp_path, batch, epilogue):
    path = script(tmp_path, batch, environment=HOSTILE, epilogue=epilogue, job_name="x; touch made")
    done = bash(path, PBS_JOBID="18.pbs1")
    assert done.returncode == 0, done.stderr
    output = path.with_name("output.txt").read_text() if batch in ("pbs", "torque") else done.stdout
    words, environment = eval(output.splitlines()[0])
    assert words == list(WORDS)
    assert environment == HOSTILE
    assert output.splitlines()[1:] == [line.removeprefix("echo ") for line in epilogue]
    assert not (path.parent / "made").exists()


def test_lines_around_the_pilot(tmp_path):
    setup = ("export A=set", "module() { echo loaded $*; }")
    path = script(tmp_path, "slurm", setup=setup[:1], epilogue=('echo "after $A"', "false"))
    done = bash(path)
    assert done.returncode == 0  # the pilot's status, not the epilogue's
    assert '"A": "set"' in done.stdout
    assert done.stdout.endswith("after set\n")


@pytest.mark.parametrize("epilogue", [(), ("echo over",)])
def test_a_signal_reaches_the_pilot_once_and_its_status_is_the_jobs(tmp_path, epilogue):
    path = script(tmp_path, "slurm", pilot_argv=patient(tmp_path), epilogue=epilogue)
    with subprocess.Popen(["bash", str(path)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.read() == "told 1\n" + "over\n" * len(epilogue)
    assert job.returncode == 5


def test_subjobs_of_an_array_have_ids_and_output_of_their_own(tmp_path):
    path = script(tmp_path, "pbs", count=4, pilot_argv=("printenv", "HPCQ_JOB_ID"))
    for index in (0, 3):
        assert bash(path, PBS_JOBID=f"18[{index}].pbs1", PBS_ARRAY_INDEX=str(index)).returncode == 0
    assert path.with_name("output_0.txt").read_text() == "18[0].pbs1\n"
    assert path.with_name("output_3.txt").read_text() == "18[3].pbs1\n"


def test_slurms_qsub_gives_the_id_in_its_own_variable(tmp_path):
    path = script(tmp_path, "torque", count=2, pilot_argv=("printenv", "HPCQ_JOB_ID"))
    bash(path, SLURM_JOB_ID="77")
    bash(path, SLURM_JOB_ID="77")  # a requeued job goes on in the same file
    assert path.with_name("output_77.txt").read_text() == "77\n77\n"


@pytest.mark.parametrize("batch", ["pbs", "torque"])
def test_each_start_of_a_job_under_its_id_is_another_incarnation(tmp_path, batch):
    path = script(tmp_path, batch, pilot_argv=("printenv", "HPCQ_STARTS"))
    for job_id in ("18.pbs1", "18.pbs1", "19.pbs1", "18.pbs1"):
        assert bash(path, PBS_JOBID=job_id, HPCQ_STARTS="7").returncode == 0
    assert path.with_name("output.txt").read_text().split() == ["1", "2", "1", "3"]
    path.with_name("starts-20.pbs1").mkdir()
    bash(path, PBS_JOBID="20.pbs1")  # where no mark can be left, the time will do
    assert int(path.with_name("output.txt").read_text().split()[-1]) > 1_700_000_000


LAUNCHERS = {
    "pbsdsh": 'shift $(test "$1" = -- && echo 1 || echo 0); test "$1" = -u && shift',
    "mpiexec": 'test "$1 $2" = "-n 2" || exit 9; shift 2',
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("batch", ["pbs", "torque"])
def test_one_pilot_on_each_node(tmp_path, batch, launcher):
    """The launcher starts its command twice, with an environment of its own, as PBS does on other nodes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    again = 'for node in n1 n2; do env -i PATH="$PATH" NODE=$node "$@" || exit; done'
    (tools / launcher).write_text(f"#!/bin/bash\n{LAUNCHERS[launcher]}\n{again}\n")
    (tools / launcher).chmod(0o755)
    for name in ("env", "bash", "sh"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    pilot = ("/bin/sh", "-c", 'echo "$NODE $HPCQ_JOB_ID $HPCQ_STARTS $A $B"')
    path = script(tmp_path, batch, nodes=2, pilot_argv=pilot, environment={"A": "a"}, setup=("export B=b",))
    done = bash(path, PBS_JOBID="18.pbs1", PATH=str(tools))
    assert (done.returncode, done.stderr) == (0, "")
    assert path.with_name("output.txt").read_text() == "n1 18.pbs1 1 a b\nn2 18.pbs1 1 a b\n"


def test_an_output_that_cannot_be_written_is_said_and_left_to_pbs(tmp_path):
    path = script(tmp_path, "pbs", pilot_argv=("echo", "here"))
    path.with_name("output.txt").mkdir()
    done = bash(path, PBS_JOBID="18.pbs1")
    assert (done.returncode, done.stdout) == (0, "here\n")
    assert "output.txt" in done.stderr


@pytest.mark.parametrize("batch", ["slurm", "pbs", "torque", "local"])
@pytest.mark.parametrize("epilogue", [(), ("cat",)])
def test_connection_data_reach_the_pilots_standard_input_and_no_output(tmp_path, batch, epilogue):
    """Also where the user has the shell tell what it does, and where the job's directory is not there."""
    argv = (sys.executable, "-c", "import sys; sys.exit(sys.stdin.read()[::-1] != '\\nterces:1-noitcennoc-qcph')")
    path = script(tmp_path, batch, pilot_argv=argv, inline=True, epilogue=epilogue, setup=("set -xv",))
    text = path.read_text().replace(inline.PLACEHOLDER, "hpcq-connection-1:secret")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "script.sh").write_text(text.replace(str(path.parent), str(tmp_path / "unseen")))
    for place in (path, elsewhere / "script.sh"):
        place.write_text(text if place is path else place.read_text())
        done = bash(place, TMPDIR=str(elsewhere), SLURM_JOB_ID="7", PBS_JOBID="7.pbs1")
        kept = "".join(file.read_text() for file in place.parent.iterdir() if file.name != "script.sh")
        assert (done.returncode, "secret" in done.stdout + done.stderr + kept) == (0, False)
    assert [file.name for file in elsewhere.iterdir()] == ["script.sh"]


def test_a_node_that_does_not_see_the_directory_keeps_the_output_of_a_pilot_that_fails(tmp_path):
    path = script(tmp_path, "slurm", pilot_argv=("sh", "-c", "echo on fire; exit 7"), inline=True)
    path.write_text(path.read_text().replace(str(path.parent), str(tmp_path / "unseen")))
    done = bash(path, TMPDIR=str(path.parent), SLURM_JOB_ID="7")
    [kept] = path.parent.glob("hpcq-7.*")
    assert (done.returncode, kept.read_text(), kept.stat().st_mode & 0o777) == (7, "on fire\n", 0o600)
