"""The journal: what is written is read, whatever happens to the file; and what a report makes of it."""

import json
import logging
import shlex
import sqlite3
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcq
from hpcq import journal
from hpcq.cli.main import run as run_command
from hpcq.errors import UsageError
from hpcq.journal import Journal, PilotRow, Run, TaskRow
from hpcq.outcome import Attempt, Outcome
from hpcq.report import summarize
from hpcq.roster import PilotView

PILOT = PilotView("p1", "slurm", "7_1", "ready", "n1", 4, 0, 0, "auto", "relay", 0.1, 0, "", "", connected_at=1000.0)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 3600.0)  # its thread writes at the end only
    return tmp_path / "journal.sqlite"


def ended(number, outcome=Outcome.SUCCESS, *, tag=None, **attempt):
    task = hpcq.Task("sort -u in.txt", cores=2, tag=tag)
    task.id, task.submitted_at = number, 1000.0
    known = {"hostname": "n1", "pilot": "p1", "attempts": 1, "started_at": 1001.0, "finished_at": 1003.0, "cpu": 3.0}
    return task, Attempt(outcome, **known | attempt)


def test_what_is_written_is_read(path):
    book = Journal(path, lambda: [PILOT], lambda: 5)
    book.finished(
        [ended(1), ended(2, Outcome.EXIT_CODE, exit_code=3, tag="x", message="no\nsuch"), (None, Attempt(Outcome.LOST))]
    )
    book.close()
    found = journal.read(path)
    assert (found.id, found.submitted, len(found.pilots)) == (1, 5, 1)
    assert found.ended == found.seen >= found.began
    assert [(row.id, row.kind, row.outcome, row.exit_code) for row in found.tasks] == [
        (1, "sort", "success", None),
        (2, "sort", "exit_code", 3),
    ]
    assert (found.pilots[0].name, found.pilots[0].came, found.pilots[0].tunnel) == ("p1", 1000.0, "relay")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_sqlite_cannot_have_costs_no_row(path):
    book = Journal(path, list, int)
    task, attempt = ended(1, tag="f\udcff", message="no file \udcfe")
    task.id = None
    task.set(cores=10**30)
    task.id = 1
    book.finished([(task, attempt), ended(2, tag="für")])
    book.close()
    assert [(row.tag, row.message, row.cores) for row in journal.read(path).tasks] == [
        ("f\\udcff", "no file \\udcfe", journal.MOST),
        ("für", "", 2),
    ]


def test_a_fault_costs_what_it_is_about_and_nothing_that_follows(path, monkeypatch, caplog):
    book = Journal(path, list, int)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_storable", lambda value: 1 / 0)
        book.finished([ended(1)])
        book._try(look=True)
    book.finished([ended(2)])
    book.close()
    assert [row.id for row in journal.read(path).tasks] == [2]
    assert "leaves out 1 tasks" in caplog.text


def test_each_program_is_a_run_of_its_own_and_one_that_was_killed_has_no_end(path):
    for _ in range(2):
        Journal(path, list, int).close()
    killed = Journal(path, list, int)  # as far as the file tells, until it is closed
    try:
        assert journal.read(path).id == 3
        assert journal.read(path).ended is None
        assert journal.read(path, 2).ended is not None
    finally:
        killed.close()
    with pytest.raises(UsageError, match="has no run 9"):
        journal.read(path, 9)


def test_the_last_word_of_a_pilot_counts_and_its_end_does_not_move(path):
    views = [PILOT]
    book = Journal(path, lambda: views, lambda: 0)
    book._changed()
    views[:] = [msgspec.structs.replace(PILOT, state="gone", message="walltime", tasks_done=9)]
    [first] = book._changed()
    assert book._changed() == []
    assert (first.state, first.tasks, first.message) == ("gone", 9, "walltime")
    book.close()


def test_a_file_that_cannot_be_written_for_a_while_loses_nothing(path, caplog):
    book = Journal(path, list, int)
    path.rename(path.with_suffix(".away"))
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            book.finished([ended(number)])
            book._try(look=False)
    assert caplog.text.count("cannot be written, trying again") == 1
    path.rmdir()
    path.with_suffix(".away").rename(path)
    book.finished([ended(3)])
    book.close()
    assert [row.id for row in journal.read(path).tasks] == [1, 2, 3]


def test_many_threads(path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL", 0.001)
    book = Journal(path, list, int)
    threads = [threading.Thread(target=lambda: [book.finished([ended(n)]) for n in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book.close()
    assert len(journal.read(path).tasks) == 200


@pytest.mark.parametrize("content", [b"hello, this is no database, but long enough to be one " * 40, b""])
def test_what_is_no_journal_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"journal\.sqlite"):
        journal.read(path)
    if content:
        with pytest.raises(UsageError, match="cannot be written: file is not a database"):
            Journal(path, list, int)


def test_other_databases_and_places_are_refused(path, tmp_path):
    with sqlite3.connect(path) as database:
        database.execute("create table other (x)")
    database.close()
    with pytest.raises(UsageError, match="no journal, or one of another version"):
        Journal(path, list, int)
    with pytest.raises(UsageError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "journal.sqlite", list, int)
    with pytest.raises(UsageError, match=r"Queue\(journal=True\)"):
        journal.read(tmp_path / "nowhere")


def task(number, **changes):
    row = TaskRow(number, "fit", None, "success", 1, "p1", "n1", 2, 1000.0, 1001.0, 1003.0, 3.0, 10.0, 0.0, None, "")
    return row._replace(**changes)


def pilot(name, **changes):
    row = PilotRow(name, "slurm", "7", "n1", 4, 1000.0, 1010.0, "gone", "relay", 3, "")
    return row._replace(**changes)


def run(tasks, pilots=()):
    return Run(1, 1000.0, 1010.0, 1010.0, "login", 7, 9, tasks, pilots)


def test_a_report():
    bad = [task(n, outcome="exception", message="ValueError: no\nmore", hostname="n2", tag="x") for n in (3, 4)]
    tasks = [task(1), task(2, finished=1005.0, attempts=2), *bad, task(5, kind="merge", memory=99.0, started=999.0)]
    told = summarize(run(tasks, [pilot("a"), pilot("b", state="failed", message="tunnel no way", seen=1000.0)]))
    assert told.outcomes == {"success": 3, "exception": 2}
    assert (told.submitted, told.repeated, told.rate, told.seconds) == (9, 1, 0.5, 10.0)
    assert told.used == (2 + 4 + 2 + 2 + 4) * 2 / 40
    [fit, merge] = told.kinds
    assert (fit.name, fit.tasks, fit.failed, fit.wait, fit.wall, fit.longest, fit.cpu) == ("fit", 4, 2, 1, 2, 4, 0.6)
    assert (merge.name, merge.wait, merge.memory) == ("merge", 0.0, 99.0)
    assert [(host.name, host.failed) for host in told.hosts] == [("n1", 0), ("n2", 2)]
    [failure] = told.failures
    assert (failure.message, failure.tasks, failure.first, failure.tag, failure.hosts) == (
        "ValueError: no", 2, 3, "x", ["n2"],
    )  # fmt: skip
    assert [one["message"] for one in told.failed_pilots] == ["tunnel no way"]


def test_pilots_that_had_not_ended_were_there_as_long_as_the_program():
    told = summarize(run([task(1)], [pilot("a", state="ready", seen=1001.0), pilot("b", seen=1005.0)]))
    assert told.core_hours == pytest.approx((10 + 5) * 4 / 3600)


def test_a_report_of_nothing():
    told = summarize(run([])._replace(ended=None, seen=1000.0))
    assert (told.rate, told.used, told.kinds, told.failures) == (0.0, None, [], [])


texts = st.one_of(st.none(), st.text(max_size=5))
times = st.one_of(st.none(), st.floats(0, 2e9))


@given(
    st.lists(
        st.builds(
            TaskRow, st.integers(0, 9), st.text(max_size=5), texts, st.sampled_from([one.value for one in Outcome]),
            st.integers(0, 9), texts, texts, st.integers(1, 9), times, times, times,
            st.floats(0, 9), st.floats(0, 9), st.floats(0, 9), st.one_of(st.none(), st.integers(-9, 9)),
            st.text(max_size=5),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_any_tasks_can_be_reported(tasks):
    told = summarize(run(tasks, [pilot("a")]))
    assert sum(told.outcomes.values()) == len(tasks)
    assert told.used is not None
    assert 0 <= told.used <= 1


def test_the_command(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    where = journal.default_path("ana")
    where.parent.mkdir(parents=True)
    book = Journal(where, lambda: [PILOT], lambda: 2)
    book.finished([ended(1), ended(2, Outcome.EXCEPTION, message="ValueError: \x1b[31mred", tag="x")])
    book.close()

    def typed(line):
        status = run_command(shlex.split(line))
        return status, capsys.readouterr()

    status, told = typed("report")
    assert status == 0
    lines = told.out.splitlines()
    assert lines[1].startswith("tasks   2 of 2 ended: 1 success, 1 exception; 0 ran more than once;")
    assert "  1 exception: ValueError: \ufffd[31mred on n1; one is task 2 with tag x" in lines
    assert ["sort", "2", "1", "1.0", "s", "2.0", "s", "2.0", "s", "75", "%", "0", "MB"] in [
        line.split() for line in lines
    ]
    assert json.loads(typed("report --json")[1].out)["outcomes"] == {"success": 1, "exception": 1}
    assert [row["id"] for row in json.loads(typed("report --tasks --json --run 1")[1].out)] == [1, 2]
    assert typed("report --tasks")[1].out.count("sort") == 2
    assert typed("report --run 7")[0] == typed("report --journal /nowhere")[0] == typed("report --name other")[0] == 2
