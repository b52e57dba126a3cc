"""The runner against programs that hang, flood, leave helpers behind, or are not there."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from hpcq.batch.command import CommandRunner
from hpcq.errors import BatchError

PYTHON = sys.executable


def test_what_a_command_prints_and_returns():
    code = "import sys; print(sys.stdin.read(), end=''); sys.stderr.write('e'); sys.exit(3)"
    result = CommandRunner().run([PYTHON, "-c", code], stdin="héllo")
    assert (result.status, result.stdout, result.stderr) == (3, "héllo", "e")


def test_the_locale_is_c_and_variables_can_be_kept_away(monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "R")
    monkeypatch.setenv("OTHER", "x")
    code = "import os; print(os.environ['LC_ALL'], 'SQUEUE_STATES' in os.environ, os.environ['OTHER'])"
    result = CommandRunner().run([PYTHON, "-c", code], keep_variable=lambda n: not n.startswith("SQUEUE_"))
    assert result.stdout == "C False x\n"


def test_a_command_that_is_not_there():
    with pytest.raises(BatchError, match=r"nosuch not found on \S+; is this a login node\? `--batch local` needs"):
        CommandRunner().run(["nosuch"])


def test_a_command_that_cannot_be_started(tmp_path, monkeypatch):
    path = tmp_path / "sbatch"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BatchError, match="cannot be started"):
        CommandRunner().run(["sbatch"])
    with pytest.raises(BatchError, match="cannot be started"):
        CommandRunner().run([PYTHON, "a\0b"])


def test_a_hanging_command_is_killed_with_its_children(fake_slurm):
    fake_slurm.behave({"squeue": {"hang": True}})
    with pytest.raises(BatchError, match=r"squeue on \S+ did not answer within 5 s"):
        CommandRunner(time_limit=5).run(["squeue"])  # it has noted its pid by then
    with pytest.raises(ProcessLookupError):
        os.kill(fake_slurm.calls("squeue")[0]["pid"], 0)


def test_endless_output_is_cut(fake_slurm):
    fake_slurm.behave({"squeue": {"flood": True}})
    with pytest.raises(BatchError, match="printed more than 1000000 bytes"):
        CommandRunner(output_limit=1_000_000).run(["squeue"])


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open (Linux 5.3)")
def test_a_helper_that_keeps_the_pipes_open_is_not_waited_for(fake_slurm):
    fake_slurm.behave({"squeue": {"helper": True}})
    fake_slurm.set_jobs({"1": "RUNNING|n1|None"})
    result = CommandRunner(time_limit=60).run(["squeue", "--jobs=1"])  # which fails when it waits
    assert "hpcq|1|RUNNING|n1|None" in result.stdout


def test_much_output_on_both_streams():
    code = "import sys; sys.stdout.write('o' * 1000000); sys.stderr.write('e' * 1000000)"
    result = CommandRunner().run([PYTHON, "-c", code])
    assert (len(result.stdout), len(result.stderr)) == (1_000_000, 1_000_000)


def test_no_descriptors_are_left_open():
    before = list(Path("/proc/self/fd").iterdir())
    CommandRunner().run([PYTHON, "-c", ""])
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


def test_no_room_for_temporary_files_is_an_error_of_the_batch_system(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/directory")
    with pytest.raises(BatchError, match=r"cannot be run on \S+: .*No such file"):
        CommandRunner().run([PYTHON, "-c", ""])
