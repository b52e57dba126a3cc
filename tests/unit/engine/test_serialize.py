"""Functions, arguments, results and exceptions survive the trip, or the refusal names what does not."""

import dataclasses
import pickle
import subprocess
import sys
import threading
import types

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcq import messages, protocol, serialize
from hpcq.errors import RemoteError, RemoteTraceback, SerializationError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.complex_numbers(allow_nan=False),
    st.text(), st.binary(), st.frozensets(st.integers()),
)  # fmt: skip
values = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(values, max_size=4), st.dictionaries(st.text(), values, max_size=3))
def test_arguments_come_back_as_they_were(args, kwargs):
    assert serialize.load_arguments(serialize.dump_arguments(tuple(args), kwargs)) == (tuple(args), kwargs)


@given(values)
def test_values_come_back_as_they_were(value):
    assert serialize.load_value(serialize.dump_value(value)) == value


def test_subclasses_of_plain_types_keep_their_type():
    class Count(int):
        pass

    assert type(serialize.load_value(serialize.dump_value(Count(3)))).__name__ == "Count"
    (args, _) = serialize.load_arguments(serialize.dump_arguments(((Count(3),),), {}))
    assert type(args[0][0]).__name__ == "Count"


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [((1, threading.Lock()), {}, "argument 2 (a lock)"), ((), {"x": 1, "y": [open]}, None),
     ((), {"x": 1, "lock": threading.Lock()}, "argument 'lock' (a lock)"),
     (([threading.Lock()],), {}, "argument 1 (a list)")],
)  # fmt: skip
def test_an_argument_that_cannot_be_pickled_is_named(args, kwargs, name):
    if name is None:
        serialize.dump_arguments(args, kwargs)
        return
    with pytest.raises(SerializationError) as raised:
        serialize.dump_arguments(args, kwargs)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_value_that_cannot_be_pickled_is_named():
    with pytest.raises(SerializationError, match=r"the result \(a generator\) cannot be pickled"):
        serialize.dump_value(n for n in range(3))


def test_a_value_whose_class_is_not_here_says_so():
    data = pickle.dumps(types.SimpleNamespace(x=1)).replace(b"SimpleNamespace", b"NoSuchNamespac_")
    with pytest.raises(SerializationError, match="the result cannot be rebuilt here: AttributeError"):
        serialize.load_value(data)


def test_functions_run_in_a_python_that_never_saw_their_module(tmp_path):
    offset = 40

    def add(x):
        return helper(x) + offset

    (tmp_path / "f").write_bytes(serialize.dump_function(add))
    code = f"from hpcq import serialize; print(serialize.load_function(open({str(tmp_path / 'f')!r}, 'rb').read())(1))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True) == "42\n"


def helper(x):
    return x + 1


# --- exceptions ------------------------------------------------------------------------------------------------------


class PlainError(Exception):
    pass


class StubbornError(Exception):
    def __init__(self, first, second):
        super().__init__(first)


class LockedError(Exception):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class MuteError(Exception):
    def __str__(self):
        raise ValueError("no text")


def trip(error):
    try:
        raise error
    except BaseException as raised:
        return serialize.load_exception(serialize.dump_exception(raised))


def test_an_exception_keeps_type_arguments_and_traceback():
    back = trip(PlainError("a", 2))
    assert (type(back).__name__, back.args) == ("PlainError", ("a", 2))
    assert isinstance(back.__cause__, RemoteTraceback)
    assert "raise error" in str(back.__cause__)
    assert pickle.loads(pickle.dumps(back.__cause__)).text == back.__cause__.text


@pytest.mark.parametrize("error", [StubbornError("first", 2), LockedError()])
def test_an_exception_that_does_not_survive_is_told_by_its_text(error):
    back = trip(error)
    assert isinstance(back, RemoteError)
    assert str(back).startswith(type(error).__name__)
    assert "raise error" in str(back.__cause__)


def test_an_exception_that_cannot_even_be_printed_comes_back():
    back = trip(MuteError())
    assert isinstance(back, Exception)
    assert isinstance(back.__cause__, RemoteTraceback)


def test_its_own_cause_is_in_the_traceback():
    try:
        try:
            {}["missing"]
        except KeyError as cause:
            raise PlainError from cause
    except PlainError as error:
        back = serialize.load_exception(serialize.dump_exception(error))
    assert "KeyError: 'missing'" in str(back.__cause__)


# --- the cache of function bodies ------------------------------------------------------------------------------------

CONSTANT = 1
MUTABLE = [1]
INSTANCE = types.SimpleNamespace(value=1)


def uses_constant():
    return CONSTANT


def uses_mutable():
    return MUTABLE[0]


def uses_instance():
    return INSTANCE.value


def uses_helper():
    return changing_helper()


def changing_helper():
    return CONSTANT


def uses_default(value=CONSTANT):
    return value


def uses_keyword_default(*, value=CONSTANT):
    return value


def uses_nested():
    def inner():
        return CONSTANT

    return inner()


def uses_attribute_of_class():
    return Settings.value


class Settings:
    value = 1


def make_closure():
    cell = 1

    def get():
        return cell

    def put(value):
        nonlocal cell
        cell = value

    return get, put


@pytest.fixture
def cache():
    return serialize.FunctionCache()


def value_of(cache, function):
    """What the pilot would compute from the body the cache gives."""
    key, body = cache.body(function)
    assert key == serialize.digest(body)
    return serialize.load_function(body)()


def counted(monkeypatch):
    calls = []
    real = serialize.dump_function
    monkeypatch.setattr(serialize, "dump_function", lambda function: calls.append(function) or real(function))
    return calls


@pytest.mark.parametrize(
    "function", [uses_constant, uses_default, uses_nested, uses_helper, lambda: 5, make_closure()[0]]
)
def test_an_unchanged_function_is_pickled_once(cache, monkeypatch, function):
    calls = counted(monkeypatch)
    assert cache.body(function) == cache.body(function)
    assert len(calls) == 1


@pytest.mark.parametrize("function", [uses_constant, uses_nested, uses_helper])
def test_a_changed_global_is_seen(cache, monkeypatch, function):
    assert value_of(cache, function) == 1
    monkeypatch.setitem(globals(), "CONSTANT", 2)
    assert value_of(cache, function) == 2


def test_a_changed_mutable_global_is_seen(cache):
    assert value_of(cache, uses_mutable) == 1
    MUTABLE.insert(0, 2)
    assert value_of(cache, uses_mutable) == 2
    MUTABLE.pop(0)


def test_a_changed_instance_is_seen(cache, monkeypatch):
    assert value_of(cache, uses_instance) == 1
    monkeypatch.setattr(INSTANCE, "value", 2)
    assert value_of(cache, uses_instance) == 2


def test_a_changed_class_is_seen(cache, monkeypatch):
    assert value_of(cache, uses_attribute_of_class) == 1
    monkeypatch.setattr(Settings, "value", 2)
    assert value_of(cache, uses_attribute_of_class) == 2


def test_a_changed_class_made_in_a_function_is_seen(cache):
    class Local:
        value = 1

    def uses_local():
        return Local.value

    assert value_of(cache, uses_local) == 1
    Local.value = 2
    assert value_of(cache, uses_local) == 2


def test_a_changed_module_that_travels_by_value_is_seen(cache, monkeypatch):
    module = types.ModuleType("made_here")
    module.value = 1
    namespace = {"made_here": module}
    exec("def f():\n    return made_here.value", namespace)
    assert value_of(cache, namespace["f"]) == 1
    module.value = 2
    assert value_of(cache, namespace["f"]) == 2


def test_a_changed_helper_is_seen(cache, monkeypatch):
    assert value_of(cache, uses_helper) == 1
    monkeypatch.setitem(globals(), "changing_helper", lambda: 2)
    assert value_of(cache, uses_helper) == 2


def test_a_deleted_and_a_new_global_are_seen(cache, monkeypatch):
    assert value_of(cache, uses_constant) == 1
    monkeypatch.delitem(globals(), "CONSTANT")
    with pytest.raises(NameError):
        value_of(cache, uses_constant)
    monkeypatch.setitem(globals(), "CONSTANT", 3)
    assert value_of(cache, uses_constant) == 3


def test_a_changed_closure_cell_is_seen(cache):
    get, put = make_closure()
    assert value_of(cache, get) == 1
    put(2)
    assert value_of(cache, get) == 2
    put([3])
    assert value_of(cache, get) == [3]


@pytest.mark.parametrize("name", ["__defaults__", "__kwdefaults__"])
def test_a_changed_default_is_seen(cache, name):
    function = uses_default if name == "__defaults__" else uses_keyword_default
    before = getattr(function, name)
    assert value_of(cache, function) == 1
    try:
        setattr(function, name, (2,) if name == "__defaults__" else {"value": 2})
        assert value_of(cache, function) == 2
    finally:
        setattr(function, name, before)


def test_changed_code_is_seen(cache):
    def function():
        return 1

    assert value_of(cache, function) == 1
    function.__code__ = (lambda: 2).__code__
    assert value_of(cache, function) == 2


def test_a_value_moved_between_names_is_seen(cache):
    namespace = {"A": 1, "B": None}
    exec("def f():\n    return 'A' if A == 1 else 'B'", namespace)  # the parts are the same objects in another order
    function = namespace["f"]
    first, _ = cache.body(function)
    namespace["A"], namespace["B"] = namespace["B"], namespace["A"]
    assert cache.body(function)[0] != first


def test_a_global_that_takes_the_place_of_another_is_seen(cache):
    namespace = {"A": 1}
    exec("def f():\n    try:\n        return ('A', A)\n    except NameError:\n        return ('B', B)", namespace)
    function = namespace["f"]
    assert value_of(cache, function) == ("A", 1)
    namespace["B"] = namespace.pop("A")
    assert value_of(cache, function) == ("B", 1)


def test_an_imported_modules_attribute_in_a_by_value_function_is_left_to_the_pilot(cache):
    def platform():
        return sys.platform

    assert value_of(cache, platform) == sys.platform


@pytest.mark.parametrize("change", ["__defaults__", "__kwdefaults__", "__code__", "A", "attribute"])
def test_a_plain_function_that_changes_is_pickled_anew(cache, change):
    namespace = {"A": 1}
    exec("def f(x=1, *, y=2):\n    return A, x, y\ndef g(x=1, *, y=2):\n    return A, x, y, 'g'", namespace)
    function = namespace["f"]
    function.__kwdefaults__ = None  # as few functions have any
    first = cache.body(function)
    assert cache._last is not None
    assert cache.body(function) == first
    if change == "A":
        namespace["A"] = 3
    elif change == "attribute":
        function.known = []
    else:
        new = {"__defaults__": (5,), "__kwdefaults__": {"y": 7}, "__code__": namespace["g"].__code__}
        setattr(function, change, new[change])
    assert cache.body(function)[0] != first[0]


def test_what_a_plain_function_calls_may_change(cache):
    namespace = {}
    exec("def g():\n    return 1\ndef f():\n    return g()", namespace)
    assert value_of(cache, namespace["f"]) == 1
    exec("def h():\n    return 2", namespace)
    namespace["g"].__code__ = namespace["h"].__code__
    assert value_of(cache, namespace["f"]) == 2


def test_the_cache_keeps_no_function_alive(cache):
    def function():
        return 1

    cache.body(function)
    assert len(cache._known) == 1
    del function
    assert len(cache._known) == 0


@pytest.mark.parametrize("callable_", [len, print, Settings, "x".upper])
def test_callables_that_are_no_functions(cache, callable_):
    key, body = cache.body(callable_)
    assert key == serialize.digest(body)
    assert callable(serialize.load_function(body))


@dataclasses.dataclass(frozen=True)
class UnchangeableError(Exception):
    """Lets nobody set an attribute."""


def test_an_exception_that_lets_nobody_change_it_has_its_remote_traceback():
    found = serialize.load_exception(serialize.dump_exception(UnchangeableError()))
    assert isinstance(found, UnchangeableError)
    assert isinstance(found.__cause__, RemoteTraceback)


@given(st.text(st.characters(exclude_categories=[])))
def test_a_line_on_an_exception_can_be_sent(text):
    protocol.frame(messages.TaskResult(1, "exception", message=serialize.one_line(OSError(text))))


def test_a_line_on_an_exception_shows_what_cannot_be_sent():
    assert serialize.one_line(OSError("no file f\xfcr \udcff")) == "OSError: no file f\xfcr \\udcff"
