"""From options to requests; connection data in what is submitted, and in nothing that is shown."""

import msgspec
import pytest

from hpcq import connection
from hpcq.batch import inline
from hpcq.batch.base import PilotRequest, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.errors import ConnectionFileError, QueueNotFoundError, TemplateError, UsageError

ADAPTERS = [("slurm", 1, 1), ("slurm", 3, 2), ("pbs", 3, 1), ("torque", 2, 1), ("local", 1, 1)]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def info():
    """A queue whose program listens."""
    known = msgspec.structs.replace(connection.read(connection.create("q")), addresses=["192.0.2.1"], port=20000)
    connection.write(known)
    return known


def test_a_line_comes_back(info):
    line = connection.to_line(info)
    assert line.isprintable()
    assert " " not in line
    assert len(line) < 4096  # of which some readers of scripts take more lines than one
    assert connection.from_line(f"  {line}\n") == info


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: "", "there is nothing"),
        (lambda line: "hello", "there is something else"),
        (lambda line: line.replace("-1:", "-2:"), "there is something else"),
        (lambda line: line[:-40], "damaged"),
        (lambda line: line[:200], "damaged"),
        (lambda line: line + "é", "damaged"),
        (lambda line: connection.LINE + "e30=", "damaged"),
    ],
)
def test_what_is_no_such_line_is_refused_without_repeating_it(info, change, words):
    line = change(connection.to_line(info))
    with pytest.raises(ConnectionFileError, match=words) as caught:
        connection.from_line(line)
    assert len(str(caught.value)) < 120


def test_a_program_that_does_not_listen_yet_cannot_be_told():
    connection.create("q")
    with pytest.raises(QueueNotFoundError, match="start it first"):
        inline.fill_in(inline.PLACEHOLDER, "q")
    with pytest.raises(QueueNotFoundError, match="no connection file"):
        inline.fill_in(inline.PLACEHOLDER, "nowhere")


@pytest.mark.parametrize(("batch", "count", "nodes"), ADAPTERS)
def test_the_secret_is_in_what_is_submitted_alone(info, batch, count, nodes):
    options = {"connection": "inline", "nodes": nodes, "epilogue": ("true",)}
    rendered = get_batch_system(batch).render(pilot_request("q", batch, count, options))
    line = connection.to_line(info)
    assert line not in repr(rendered)
    assert rendered.script.count(f"\n{inline.PLACEHOLDER}\n") == 1
    assert "--connection - " in rendered.script
    submitted = inline.fill_in(rendered.script, "q")
    assert submitted.count(f"\n{line}\n") == 1
    assert inline.conceal(submitted) == rendered.script


@pytest.mark.parametrize(("batch", "count", "nodes"), ADAPTERS)
def test_without_it_no_script_mentions_it(batch, count, nodes):
    script = get_batch_system(batch).render(pilot_request("q", batch, count, {"nodes": nodes})).script
    assert "HPCQ_CONNECTION" not in script
    assert inline.conceal(script) == script


def test_a_template_that_would_drop_it_is_refused(tmp_path):
    template = tmp_path / "mine.sh.j2"
    asked = PilotRequest(queue="q", pilot_argv=("true",), inline=True, template=template)
    template.write_text("#!/bin/bash\nexec {{ pilot_argv }}\n")
    with pytest.raises(TemplateError, match=r"mine\.sh\.j2 never uses connection, .*put {% include"):
        get_batch_system("slurm").render(asked)
    for text in (
        '#!/bin/bash\n{% include "hpcq/connection.sh.j2" %}exec {{ pilot_argv }}',
        '{% extends "hpcq/slurm.sh.j2" %}',
    ):
        template.write_text(text)
        assert inline.PLACEHOLDER in get_batch_system("slurm").render(asked).script


def test_what_cannot_be_asked_for():
    with pytest.raises(UsageError, match="connection must be file or inline, not 'by mail'"):
        pilot_request("q", "slurm", 1, {"connection": "by mail"})
    with pytest.raises(UsageError, match="first node of a PBS job only"):
        get_batch_system("pbs").render(pilot_request("q", "pbs", 1, {"connection": "inline", "nodes": 2}))


def test_a_scratch_directory_does_not_depend_on_where_a_job_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = pilot_request("q", "slurm", 1, {"scratch": "here"}).pilot_argv
    assert argv[argv.index("--scratch") + 1] == str(tmp_path / "here")


def test_too_many_processes_for_one_host():
    with pytest.raises(UsageError, match="more processes than hpcq starts on one host"):
        get_batch_system("local").render(pilot_request("q", "local", 1001, {}))
