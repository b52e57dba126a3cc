"""What users write in ``inputs`` and ``outputs`` is checked when it is set, by name."""

import os
from pathlib import Path

import pytest

import hpcq
from hpcq.files.plan import make_plan


def task(**options):
    return hpcq.Task("true", **options)


def test_a_path_is_a_cached_file_relative_to_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = task(inputs={"a": "data.txt", "b": Path("x") / "y"}, outputs={"o": "out.txt"})
    monkeypatch.chdir("/")
    assert made.inputs == {"a": hpcq.File(tmp_path / "data.txt"), "b": hpcq.File(tmp_path / "x/y")}
    assert made.outputs == {"o": str(tmp_path / "out.txt")}
    assert made.inputs["a"].cache


def test_both_kinds_of_tasks_take_them():
    made = hpcq.PythonTask(len, "x").set(inputs={"a": hpcq.Buffer("text")}, outputs={"o": hpcq.Temp()})
    assert made.inputs["a"].data == b"text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": ["a"]}, "inputs must map"),
        ({"inputs": {"../a": "x"}}, r"inputs: the name '\.\./a'.*'\.\.'"),
        ({"inputs": {"/a": "x"}}, "absolute"),
        ({"inputs": {"a": 7}}, r"inputs\['a'\].*must be a path, not 7"),
        ({"inputs": {"a": b"data"}}, r"inputs\['a'\]: wrap contents as hpcq.Buffer"),
        ({"inputs": {"a": "root://host//f"}}, r"inputs\['a'\]: wrap a URL"),
        ({"inputs": {"a": "x", "a/b": "y"}}, "cannot both"),
        ({"inputs": {"a": "x", "./a": "y"}}, "twice"),
        ({"inputs": {"a": ""}}, "must be a path"),
        ({"outputs": {"a": hpcq.Buffer("x")}}, r"outputs\['a'\] must be a path"),
        ({"outputs": {"a": "x", "b": "./x"}}, "same place"),
        ({"outputs": {"": "x"}}, "empty"),
    ],
)
def test_mistakes_are_refused_by_name(options, message):
    with pytest.raises(hpcq.UsageError, match=message):
        task(**options)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x",
        "file:///etc/passwd",
        "http:///x",
        "root://",
        "http://h:99999/x",
        "http://a b/",
        "x",
        "http://u:p@h/x",
    ],
)
def test_urls_that_cannot_be_fetched_are_refused(url):
    with pytest.raises(hpcq.UsageError):
        hpcq.URL(url)


def test_nothing_secret_in_a_urls_refusal():
    with pytest.raises(hpcq.UsageError) as caught:
        hpcq.URL("https://user:hunter2@host/x")
    assert "hunter2" not in str(caught.value)


def test_a_link_needs_the_cache():
    with pytest.raises(hpcq.UsageError, match="needs cache"):
        hpcq.File("x", cache=False, link=True)


def test_empty_mappings_are_none():
    assert task(inputs={}, outputs=None).inputs is None


def test_an_output_of_another_task_must_be_declared():
    made = task(outputs={"o": "x"})
    assert made.file("o").name == "o"
    with pytest.raises(hpcq.UsageError, match="declares no output 'p'; it has 'o'"):
        made.file("p")


def test_producers_come_first_and_a_temp_has_one():
    temp = hpcq.Temp()
    first, second = task(outputs={"o": temp}), task(outputs={"o": temp})
    reader = task(inputs={"i": temp})
    with pytest.raises(hpcq.UsageError, match="no submitted task writes this Temp"):
        make_plan(reader, reader.options)
    make_plan(first, first.options)
    make_plan(reader, reader.options)
    with pytest.raises(hpcq.UsageError, match="already written by"):
        make_plan(second, second.options)
    other = task(inputs={"i": task(outputs={"o": "x"}).file("o")})
    with pytest.raises(hpcq.UsageError, match="submitted first"):
        make_plan(other, other.options)


def test_paths_that_are_not_unicode_can_be_read_and_shown():
    made = task(inputs={"a": os.fsdecode(b"/data/\xff")})
    assert os.fsencode(made.inputs["a"].path) == b"/data/\xff"
