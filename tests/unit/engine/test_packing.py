"""Tasks as they travel: nothing that the user set is lost on the way."""

import pytest

import hpcq
from hpcq.options import DEFAULTS, Options
from hpcq.packing import Packer
from hpcq.parcels import Shelf


@pytest.fixture
def packer():
    return Packer(Shelf(1 << 20))


def test_a_task_without_options_is_packed_as_one_with_the_defaults(packer):
    plain, spelled = hpcq.PythonTask(len, "abc"), hpcq.PythonTask(len, "abc").set(cores=DEFAULTS.cores)
    assert plain.options is DEFAULTS
    assert spelled.options is not DEFAULTS
    assert packer.pack(plain, 7) == packer.pack(spelled, 7)
    assert packer.pack(hpcq.Task("true"), 8) == packer.pack(hpcq.Task("true", retries=DEFAULTS.retries), 8)


@pytest.mark.parametrize(
    ("option", "value"),
    [("cores", 2), ("memory", 5), ("walltime", 3.0), ("env", {"A": "b"}), ("network", "wan"), ("isolation", "fork"),
     ("disk", 9), ("gpus", 1)],
)  # fmt: skip
def test_options_reach_pilot_and_scheduler(packer, option, value):
    submission = packer.pack(hpcq.PythonTask(len, "abc").set(**{option: value}), 1)
    assert getattr(submission.spec, option) == value
    if option not in {"env", "isolation"}:
        assert getattr(submission.needs, option) == value


def test_the_kind_is_the_category_or_else_the_function(packer):
    kinds = [packer.pack(hpcq.PythonTask(function, "a"), 1).needs.kind for function in (len, repr, len)]
    assert kinds[0] == kinds[2] != kinds[1]
    assert packer.pack(hpcq.PythonTask(len, "a").set(category="fit"), 1).needs.kind == "fit"


def test_only_a_task_without_retries_is_announced_at_once(packer):
    assert Options().retries > 0
    assert not packer.pack(hpcq.PythonTask(len, "a"), 1).spec.announce
    assert packer.pack(hpcq.PythonTask(len, "a").set(retries=0), 1).spec.announce
