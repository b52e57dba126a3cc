"""Options are refused by name at the line that sets them, and frozen by submit."""

import math
import pickle

import pytest

import hpcq
from hpcq.options import DEFAULTS
from hpcq.outcome import Attempt, Outcome
from hpcq.task import Task


def make():
    return hpcq.Task("true")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cores", 0, "at least 1, not 0"),
        ("cores", 1.5, "a whole number"),
        ("cores", True, "a whole number"),
        ("cores", "2", "a whole number"),
        ("memory", -1, "at least 0"),
        ("memory", "2GB", "a whole number"),
        ("walltime", 0, "more than 0 seconds"),
        ("walltime", -1, "more than 0 seconds"),
        ("walltime", math.nan, "a finite number"),
        ("walltime", math.inf, "a finite number"),
        ("walltime", "1:00", "a finite number"),
        ("walltime", 10**400, "a finite number"),
        ("priority", None, "a finite number"),
        ("priority", "high", "a finite number"),
        ("priority", 1j, "a finite number"),
        ("retries", -1, "at least 0"),
        ("tag", 1, "a string"),
        ("category", b"x", "a string"),
        ("env", ["A=1"], "must map"),
        ("env", {"A=B": "1"}, "'A=B'"),
        ("env", {"": "1"}, "''"),
        ("env", {"A": 1}, r"env\['A'\]"),
        ("env", {"A": "x\0"}, r"env\['A'\]"),
        ("env", {"A": "\udcff"}, r"env\['A'\]"),
        ("network", "internet", "'any', 'wan', 'host'"),
        ("network", None, "'any', 'wan', 'host'"),
        ("isolation", "none", "'warm'"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_changes_nothing(name, value, words):
    task = make()
    with pytest.raises(hpcq.UsageError, match=rf"(?=.*{name}).*{words}"):
        task.set(priority=5, **{name: value}) if name != "priority" else task.set(priority=value)
    with pytest.raises(hpcq.UsageError):
        setattr(task, name, value)
    with pytest.raises(hpcq.UsageError):
        hpcq.Task("true", **{name: value})
    assert task.options == DEFAULTS


@pytest.mark.parametrize(("name", "near"), [("core", "cores"), ("prioritiy", "priority"), ("wall_time", "walltime")])
def test_an_unknown_option_is_refused_with_the_nearest_known(name, near):
    with pytest.raises(hpcq.UsageError, match=f"unknown task option '{name}'; did you mean '{near}'"):
        make().set(**{name: 1})


def test_an_option_like_no_other_is_refused_with_the_list():
    with pytest.raises(hpcq.UsageError, match="'zzz'; the options are cores, memory"):
        make().set(zzz=1)


def test_set_returns_the_task_and_attributes_read_and_write():
    task = make()
    assert task.set(cores=2, tag="x", env={"A": "ä"}, walltime=1, priority=-2) is task
    assert (task.cores, task.tag, task.env, task.walltime, task.priority) == (2, "x", {"A": "ä"}, 1.0, -2.0)
    task.memory = 100
    assert task.options.memory == 100
    assert hpcq.Task("true", cores=3).cores == 3


def test_the_environment_is_taken_as_it_is_now():
    environment = {"A": "1"}
    task = make().set(env=environment)
    environment["A"] = "2"
    assert task.env == {"A": "1"}


def test_nothing_can_be_set_after_submit():
    task = make()
    task.id = 7
    for change in (lambda: task.set(cores=2), lambda: setattr(task, "tag", "x")):
        with pytest.raises(hpcq.UsageError, match="task 7 was already submitted"):
            change()


def test_all_arguments_of_a_python_task_go_to_the_function():
    task = hpcq.PythonTask(dict, function=1, cores=5, self=2)
    assert (task.args, task.kwargs, task.cores) == ((), {"function": 1, "cores": 5, "self": 2}, 1)


@pytest.mark.parametrize("command", ["", "  ", "a\0b", "\ud800", 5, None, ["ls"], b"ls"])
def test_a_command_that_cannot_be_run_is_refused(command):
    with pytest.raises(hpcq.UsageError, match="Task"):
        hpcq.Task(command)


@pytest.mark.parametrize("function", [None, "f", 5])
def test_a_python_task_takes_a_function(function):
    with pytest.raises(hpcq.UsageError, match="takes a function"):
        hpcq.PythonTask(function)


def test_a_misspelt_attribute_is_not_silently_made():
    with pytest.raises(AttributeError):
        make().core = 2


def test_before_it_ends_a_task_has_no_results():
    for task in (make(), hpcq.PythonTask(int)):
        assert (task.outcome, task.output, task.exception, task.exit_code, task.pilot) == (None,) * 5
        assert (task.std_output, task.message, task.attempts, task.done) == ("", "", 0, False)
        with pytest.raises(hpcq.TaskFailedError, match="has not ended yet"):
            task.result()


@pytest.mark.parametrize("outcome", [o for o in Outcome if o not in (Outcome.SUCCESS, Outcome.EXCEPTION)])
def test_result_raises_for_every_other_outcome(outcome):
    task = hpcq.PythonTask(int)
    task.id = 1
    task._finish(Attempt(outcome, "and why"))
    assert task.output is None
    with pytest.raises(hpcq.TaskFailedError, match=rf"task 1 \(int\(…\)\) ended as {outcome.value}: and why"):
        task.result()


def test_a_value_is_unpickled_once_when_first_read():
    task = hpcq.PythonTask(list)
    task._finish(Attempt(Outcome.SUCCESS, payload=pickle.dumps([1])))
    assert task.output == [1]
    assert task.output is task.output


def test_long_commands_are_shortened_in_messages():
    assert len(Task("x" * 500).summary) == 60
    assert "unsubmitted" in Task("x").label
