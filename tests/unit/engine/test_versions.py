"""What must agree between a program and its pilots."""

import platform
from importlib.metadata import version

import msgspec
import pytest

from hpcq import messages as m
from hpcq import versions

OURS = m.Versions("3.11", "3.1.0", "0.19", "1.2.0")


@pytest.mark.parametrize(
    ("what", "theirs"), [("python", "3.12"), ("cloudpickle", "3.1.1"), ("msgspec", "0.20"), ("hpcq", "1.2.1")]
)
def test_whatever_differs_is_named_with_both_versions(what, theirs):
    said = versions.mismatch(OURS, msgspec.structs.replace(OURS, **{what: theirs}))
    own = getattr(OURS, what)
    assert said == f"the pilot runs {what} {theirs}, the program {what} {own}; start both from the same environment"


def test_the_same_everywhere_is_no_mismatch():
    assert versions.mismatch(OURS, msgspec.structs.replace(OURS)) == ""


@pytest.mark.parametrize(("text", "kept"), [("3.11.2", "3.11"), ("0.19.0", "0.19"), ("1.0", "1.0"), ("2", "2")])
def test_fixes_do_not_count(text, kept):
    assert versions.minor(text) == kept


def test_ours():
    found = versions.versions()
    assert platform.python_version().startswith(f"{found.python}.")
    assert version("msgspec").startswith(f"{found.msgspec}.")
    assert found.cloudpickle == version("cloudpickle")
    assert found.hpcq
