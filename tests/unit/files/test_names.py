"""Names in a sandbox: whatever is accepted stays below it."""

import os
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hpcq
from hpcq.files import names

PARTS = st.sampled_from(["a", "b c", "ü", "..", ".", "", "...", ".hidden", "\0", "\udcff", "x" * 256, "-", "\n"])


@pytest.mark.parametrize(
    "name", ["a", "in.txt", "a b/ü.txt", "-rf", "...", "a..b", ".hidden", "new\nline", "日本/データ", "x" * 255]
)
def test_ordinary_and_odd_names_are_taken_as_they_are(name):
    assert names.checked(name) == name


@pytest.mark.parametrize(("name", "used"), [("./a", "a"), ("a//b", "a/b"), ("dir/", "dir"), ("a/./b", "a/b")])
def test_superfluous_parts_go(name, used):
    assert names.checked(name) == used


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "empty"),
        (".", "empty"),
        ("./", "empty"),
        ("/", "absolute"),
        ("/etc/passwd", "absolute"),
        ("..", r"'\.\.'"),
        ("../x", r"'\.\.'"),
        ("a/../../x", r"'\.\.'"),
        ("a/../b", r"'\.\.'"),
        ("a\0b", "NUL"),
        ("\udcff", "Unicode"),
        ("x" * 256, "too long"),
        ("a/" * 1600 + "b", "too long"),
        (7, "must be a string"),
        (b"a", "must be a string"),
    ],
)
def test_others_are_refused_with_the_reason(name, why):
    with pytest.raises(hpcq.UsageError, match=why):
        names.checked(name)


@given(st.lists(PARTS, max_size=5).map("/".join) | st.text(max_size=20))
def test_what_is_accepted_stays_below_the_sandbox(name):
    try:
        used = names.checked(name)
    except hpcq.UsageError:
        return
    assert os.path.normpath(f"/box/{used}") == f"/box/{used}"
    assert not PurePosixPath(used).is_absolute()
    assert names.checked(used) == used


@pytest.mark.parametrize("found", [["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"], ["a", "a-", "a/x"]])
def test_a_name_inside_another_is_refused(found):
    with pytest.raises(hpcq.UsageError, match="cannot both"):
        names.disjoint(found)


def test_neighbours_are_not_inside_each_other():
    names.disjoint(["a", "a-", "a.b", "b/a", "b/a-"])


@given(st.lists(st.lists(st.sampled_from("ab-"), min_size=1, max_size=3).map("/".join), unique=True))
def test_collisions_are_found_exactly(found):
    collide = any(one != two and two.startswith(one + "/") for one in found for two in found)
    if not collide:
        names.disjoint(found)
        return
    with pytest.raises(hpcq.UsageError):
        names.disjoint(found)


def test_any_path_can_be_shown():
    assert names.shown(os.fsdecode(b"a\xff")) == "a\\xff"
