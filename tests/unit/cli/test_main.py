"""Ends of the command line: one line, the right exit status."""

import importlib
import os
import socket
import subprocess
import sys

import click
import pytest

from hpcq.cli import main as main_module
from hpcq.cli.common import choose_queue
from hpcq.cli.main import COMMANDS, run
from hpcq.errors import BatchError, HpcqError, QueueNotFoundError


@pytest.fixture
def failing(monkeypatch):
    """Make ``hpcq pilots`` end as the test says."""

    def fail_with(error: BaseException) -> int:
        @click.command()
        def pilots() -> None:
            raise error

        monkeypatch.setattr(main_module.LazyGroup, "get_command", lambda self, ctx, name: pilots)
        return run(["pilots"])

    return fail_with


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (HpcqError("a\n b"), 1, "hpcq: a; b\n"),
        (BatchError("sbatch refused"), 3, "hpcq: sbatch refused\n"),
        (QueueNotFoundError("no queue"), 4, "hpcq: no queue\n"),
        (click.UsageError("what?"), 2, "hpcq: what? (see hpcq pilots --help)\n"),
        (KeyboardInterrupt(), 130, "hpcq: interrupted\n"),
        (OSError(122, "Disk quota exceeded", "/f"), 1, "hpcq: /f: Disk quota exceeded\n"),
        (ZeroDivisionError("x"), 1, "hpcq: ZeroDivisionError: x (a fault of hpcq's; -v shows where)\n"),
    ],
)
def test_errors_are_one_line(failing, capsys, error, status, line):
    assert failing(error) == status
    output, shown = capsys.readouterr()
    assert (output, shown.lstrip("\n")) == ("", line)  # after ^C, click begins a new line


def test_an_error_of_another_tree_keeps_its_status(failing, capsys):
    class TunnelError(Exception):
        exit_status = 5

    assert failing(TunnelError("no tunnel")) == 5
    assert capsys.readouterr().err == "hpcq: no tunnel\n"


@pytest.mark.parametrize("arguments", [["-v", "pilots", "--name", "nope"], ["pilots", "--name", "nope", "-v"]])
def test_verbose_shows_notes_and_the_traceback(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run(arguments) == 4
    error = capsys.readouterr().err
    assert error.startswith("hpcq: no queue 'nope'")
    assert "Traceback" in error
    assert run(["pilots", "--name", "nope"]) == 4
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], "No such command 'nope'"),
        (["--nope"], "No such option"),
        (["pilots", "--nope"], "(see hpcq pilots --help)"),
        (["submit-pilots", "-n", "x"], "'x' is not a valid integer"),
        (["cancel-pilots"], "say which pilots: their ids, --all, or --pending"),
        (["cancel-pilots", "1", "--all"], "say which pilots"),
    ],
)
def test_usage(capsys, arguments, words):
    assert run(arguments) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_commands_without_importing_them(capsys, arguments):
    assert run(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"  {name}" in output for name in COMMANDS)


def test_help_is_quick_because_it_imports_little():
    code = (
        "import sys\nfrom hpcq.cli.main import run\nrun(['--help'])\n"
        "heavy = {'asyncio', 'jinja2', 'rich', 'cryptography', 'cloudpickle', 'hpcq.cli.pilots', 'vpn'}\n"
        "print('HEAVY', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "HEAVY []" in done.stdout


def test_every_command_is_where_the_table_says():
    for name, (path, _) in COMMANDS.items():
        module, _, attribute = path.partition(":")
        assert isinstance(getattr(importlib.import_module(module), attribute), click.Command), name


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("hpcq ")


def test_a_reader_that_went_away_is_no_error():
    code = "from hpcq.cli.main import main; main(['--help'])"
    script = 'set -o pipefail; "$0" -c "$1" | true'
    command = ["bash", "-c", script, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode in (0, 1)  # 0: all was written before the reader left


def test_which_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert choose_queue(None) == "default"
    assert choose_queue("x") == "x"
    (tmp_path / "hpcq" / "only").mkdir(parents=True)
    assert choose_queue(None) == "only"
    (tmp_path / "hpcq" / "second").mkdir()
    with pytest.raises(QueueNotFoundError, match=r"several queues \(only, second\); say which with --name"):
        choose_queue(None)
    (tmp_path / "hpcq" / "default").mkdir()
    assert choose_queue(None) == "default"


def test_the_queue_that_is_served_is_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in ("default", "ended", "killed", "prepared", "served"):
        (tmp_path / "hpcq" / name).mkdir(parents=True)
    (tmp_path / "hpcq" / "prepared" / "connection.json").touch()
    assert choose_queue(None) == "prepared"
    for name, holder in (("killed", 2**22 + 1), ("served", os.getpid())):  # the first is no process's number
        (tmp_path / "hpcq" / name / "connection.json").touch()
        (tmp_path / "hpcq" / name / "manager.lock").write_text(f"process {holder} on {socket.gethostname()}")
    assert choose_queue(None) == "served"
    (tmp_path / "hpcq" / "killed" / "manager.lock").write_text("process 1 on another-host")
    with pytest.raises(QueueNotFoundError, match=r"several queues \(killed, served\); say which with --name"):
        choose_queue(None)
    assert choose_queue(None, ["ended"]) == "ended"


def test_many_queues_are_not_all_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for number in range(30):
        (tmp_path / "hpcq" / f"q{number:02}").mkdir(parents=True)
    with pytest.raises(QueueNotFoundError, match=r"q08, q09 and 20 more\); say which"):
        choose_queue(None)
