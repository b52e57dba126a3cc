"""Every option of a task as it reaches hpcq, without a queue."""

import inspect

import pytest

import hpcq
import hpcq.work_queue as wq
from hpcq.files.sources import URL, Buffer, File, Temp
from hpcq.work_queue import sandbox
from hpcq.work_queue.build import WITHOUT_END, Builder

NOW = 1_000_000.0


@pytest.fixture
def produced():
    return []


@pytest.fixture
def build(tmp_path, produced):
    builder = Builder(str(tmp_path), produced.append)
    return lambda task, resources=None: builder.build(task, resources or {}, NOW)


def task():
    return wq.Task("true")


@pytest.mark.parametrize(
    ("method", "arguments", "option", "value"),
    [
        ("specify_tag", ("t",), "tag", "t"),
        ("specify_category", ("c",), "category", "c"),
        ("specify_priority", (2.5,), "priority", 2.5),
        ("specify_feature", ("host=n7",), "features", {"host=n7"}),
        ("specify_max_retries", (4,), "retries", 4),
        ("specify_max_retries", (0,), "retries", WITHOUT_END),
        ("specify_cores", (3,), "cores", 3),
        ("specify_cores", (-1,), "cores", 1),
        ("specify_memory", (300,), "memory", 300),
        ("specify_disk", (40,), "disk", 40),
        ("specify_gpus", (2,), "gpus", 2),
        ("specify_running_time", (2_500_000,), "walltime", 2.5),
        ("specify_running_time_max", (9,), "walltime", 9.0),
        ("specify_running_time_max", (0,), "walltime", None),
        ("specify_end_time", ((NOW + 60) * 1e6,), "walltime", 60.0),
        ("specify_end_time", (0,), "walltime", None),
    ],
)
def test_options_arrive(build, method, arguments, option, value):
    one = task()
    getattr(one, method)(*arguments)
    assert getattr(build(one).options, option) == value


def test_the_nearer_of_running_time_and_end_counts(build):
    one = task()
    one.specify_running_time_max(10)
    one.specify_end_time((NOW + 60) * 1e6)
    assert build(one).walltime == 10
    one.specify_start_time_min((NOW + 55) * 1e6)
    assert build(one).walltime == 5  # it cannot have longer once it may begin


def test_environment_and_resources_are_variables_of_the_task(build):
    one = task()
    one.specify_environment_variable("A", "1")
    one.specify_environment_variable("GONE")
    one.specify_memory(7)
    run = build(one, {"cores": 2, "memory": 5})
    assert run.env == {"A": "1", "MEMORY": "7", "CORES": "2"}
    assert (run.cores, run.memory) == (2, 7)
    assert "unset GONE\n" in run.command


@pytest.mark.parametrize("name", ["", "a b", "1a", "a=b", "ü", "x;y"])
def test_names_of_variables_are_names(name):
    with pytest.raises(ValueError, match="not a variable's name"):
        task().specify_environment_variable(name, "1")


def test_sources_of_inputs(build, produced, tmp_path):
    (tmp_path / "whole").write_bytes(b"0123456789")
    one = task()
    one.specify_input_file("/data/a.txt")
    one.specify_file("/data/b", "sub/b", wq.WORK_QUEUE_INPUT, cache=True)
    one.specify_file("/data/c", "c", flags=wq.WORK_QUEUE_CACHE | wq.WORK_QUEUE_SYMLINK)
    one.specify_url("https://example.org/x", "x", cache=True)
    one.specify_buffer("text", "buffer")
    one.specify_file_command("curl example.org -o %%", "made", cache=True)
    one.specify_file_piece(tmp_path / "whole", "piece", 2, 4)
    one.specify_directory("", "empty")
    one.specify_directory("/data", "all", recursive=True)
    inputs = build(one).inputs
    assert inputs["a.txt"] == File("/data/a.txt", cache=False)
    assert inputs["sub/b"] == File("/data/b", cache=True)
    assert inputs["c"] == File("/data/c", cache=True, link=True)
    assert inputs["x"] == URL("https://example.org/x", cache=True)
    assert inputs["buffer"] == Buffer("text")
    assert inputs["all"] == File("/data", cache=False)
    assert not list((tmp_path / inputs["empty"].path).iterdir())
    assert (tmp_path / inputs["piece"].path).read_bytes() == b"234"
    assert isinstance(inputs["made"], Temp)
    assert [(made.command, made.outputs) for made in produced] == [
        ("curl example.org -o made", {"made": inputs["made"]}),
    ]


def test_a_cached_command_is_run_once_and_another_each_time(build, produced):
    for cache in (True, True, False, False):
        one = task()
        one.specify_file_command("date > %%", "when", cache=cache)
        build(one)
    assert len(produced) == 3


def test_an_empty_directory_gives_way_to_what_lies_in_it(build):
    one = task()
    one.specify_directory("", "d")
    one.specify_buffer(b"x", "d/x")
    assert list(build(one).inputs) == ["d/x"]


def test_a_piece_of_what_cannot_be_read_is_left_to_the_task(build):
    one = task()
    one.specify_file_piece("/nowhere/at/all", "p", 0, 1)
    assert build(one).inputs == {"p": File("/nowhere/at/all", cache=False)}


def test_outputs_are_gathered_into_one(build, tmp_path):
    one = task()
    one.specify_output_file(tmp_path / "deep" / "n.txt", "out.txt")
    one.specify_file(tmp_path / "log", "log", wq.WORK_QUEUE_OUTPUT, failure_only=True)
    run = build(one)
    assert list(run.outputs) == [sandbox.GATHERED]
    assert run.outputs[sandbox.GATHERED].startswith(str(tmp_path / "deep" / sandbox.GATHERED))
    assert "keep 0 out.txt always links" in run.command
    assert "keep 1 log failure others" in run.command


def test_functions_go_as_they_are_unless_they_need_a_wrapping(build, tmp_path):
    plain = wq.PythonTask(divmod, 7, 2)
    assert build(plain).function is divmod
    with_output = wq.PythonTask(divmod, 7, 2)
    with_output.specify_output_file(tmp_path / "o", "o")
    run = build(with_output)
    assert run.function is sandbox.inside
    assert run.args == (divmod, (7, 2), {}, [("o", "always")], [])
    assert run.summary == "divmod(…)"


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda t: t.specify_coprocess("c"), "specify_coprocess"),
        (lambda t: t.specify_algorithm(wq.WORK_QUEUE_SCHEDULE_FILES), r"specify_algorithm\(2\)"),
        (lambda t: t.specify_snapshot_file("f"), "specify_snapshot_file"),
        (lambda t: t.specify_monitor_output("d"), "specify_monitor_output"),
        (lambda t: t.specify_cores(0), r"specify_cores\(0\)"),
        (lambda t: t.specify_output_file("a", "a", flags=wq.WORK_QUEUE_WATCH), "WORK_QUEUE_WATCH"),
        (lambda t: t.specify_input_file("a", "a", flags=wq.WORK_QUEUE_PREEXIST), "WORK_QUEUE_PREEXIST"),
        (lambda t: t.specify_file_piece("a", "a", 0, 1, wq.WORK_QUEUE_OUTPUT), "specify_file_piece"),
        (lambda t: t.exhausted_attempts, "exhausted_attempts"),
        (lambda t: t.total_bytes_sent, "total_bytes_sent"),
        (lambda t: wq.RemoteTask("f", "c"), "RemoteTask"),
        (lambda t: wq.PythonTask(abs, 1).specify_environment("e.tar.gz"), "specify_environment"),
        (lambda t: wq.work_queue_create, "work_queue_create"),
    ],
)
def test_what_cannot_be_honoured_says_so_by_name(call, named):
    with pytest.raises(NotImplementedError, match=f"does not support (PythonTask.)?{named}"):
        call(task())


def test_a_least_running_time_needs_a_longest(build):
    one = task()
    one.specify_running_time_min(60)
    with pytest.raises(NotImplementedError, match="specify_running_time_min"):
        build(one)
    one.specify_running_time_max(90)
    assert build(one).walltime == 90


@pytest.mark.parametrize(
    "call",
    [
        lambda t: t.specify_input_file("a", "/abs"),
        lambda t: t.specify_url("http://h/x", "x", wq.WORK_QUEUE_OUTPUT),
        lambda t: t.specify_file_command("date", "x"),
        lambda t: t.specify_file_command("date > %%", "x", wq.WORK_QUEUE_OUTPUT),
        lambda t: t.specify_file_piece("a", "a", 5, 4),
        lambda t: t.specify_file("a", "a", 7),
        lambda t: t.specify_input_file("a", "a", flags=wq.WORK_QUEUE_FAILURE_ONLY),
        lambda t: (t.specify_input_file("a", "x"), t.specify_input_file("b", "x")),
        lambda t: (t.specify_output_file("a", "x"), t.specify_output_file("b", "x")),
        lambda t: t.specify_directory("", ""),
    ],
)
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(ValueError, match=r"\w"):
        call(task())


def test_an_output_inside_another_is_refused(build, tmp_path):
    one = task()
    one.specify_directory(tmp_path / "d", "d", wq.WORK_QUEUE_OUTPUT)
    one.specify_output_file(tmp_path / "x", "d/x")
    with pytest.raises(ValueError, match="lies in the output"):
        build(one)


def test_a_task_without_a_command_is_refused(build):
    with pytest.raises(ValueError, match="no command"):
        build(wq.Task(None))


def test_a_clone_is_a_task_of_its_own():
    one = task()
    one.specify_tag("t")
    one.specify_cores(2)
    copy = one.clone()
    copy.specify_cores(3)
    copy.specify_feature("host=x")
    assert (copy.tag, one.resources_requested.cores, copy.resources_requested.cores) == ("t", 2, 3)
    assert not one._features


def test_a_task_that_was_not_submitted_has_work_queues_first_values():
    one = task()
    assert (one.id, one.return_status, one.result_str, one.output, one.hostname) == (0, -1, "UNKNOWN", None, None)
    assert (one.category, one.tag, one.submit_time, one.total_submissions) == ("default", None, 0, 0)
    assert one.resources_measured is None
    assert one.limits_exceeded is None
    assert wq.PythonTask(abs, 1).output is None
    with pytest.raises(AttributeError):
        one.no_such_thing  # noqa: B018


def test_constants_have_work_queues_values():
    values = {name: getattr(wq, name) for name in wq.__all__ if name.startswith("WORK_QUEUE_")}
    assert len(values) == 62
    assert values["WORK_QUEUE_RESULT_MAX_RETRIES"] == 48
    assert values["WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR"] == 80
    assert values["WORK_QUEUE_TASK_CANCELED"] == 6
    assert values["WORK_QUEUE_SUCCESS_ONLY"] == 64
    assert values["WORK_QUEUE_ALLOCATION_MODE_QUANTIZED_BUCKETING"] == 8
    assert values["WORK_QUEUE_SCHEDULE_WORST"] == 5


def test_every_public_method_is_documented():
    for cls in (wq.WorkQueue, wq.Task, wq.PythonTask, wq.Factory):
        for name, member in inspect.getmembers(cls):
            assert name.startswith("_") or inspect.getdoc(member), f"{cls.__name__}.{name}"
    assert issubclass(hpcq.UsageError, ValueError)
