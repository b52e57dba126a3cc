"""Functions, arguments, results and exceptions as bytes, and back. The only user of cloudpickle.

A function travels by value where the pilot cannot import it (``__main__``, lambdas, closures, modules registered with
``cloudpickle.register_pickle_by_value``) and by reference otherwise. Its bytes are named by their digest, so that a
pilot is sent each body once. Pickling a function by value costs some 100 µs, more than a whole small task; so
`FunctionCache` remembers the bytes as long as nothing the function refers to can have changed: its code, defaults,
closure cells and referenced globals are the same objects and all of them immutable. A function that refers to a list,
dict or instance is pickled anew at each submit, because its content may have changed in place.

Arguments, values and exceptions are bytes up to `LARGE`; beyond, they are the pieces of a parcel, not copied yet: first
the pickle, then the buffers of at least that size which it refers to (PEP 574), such as the data of numpy arrays.
"""

from __future__ import annotations

import pickle
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any, NamedTuple

import cloudpickle

from hpcq.errors import RemoteError, RemoteTraceback, SerializationError
from hpcq.parcels import Pieces

PROTOCOL = 5

LARGE = 1 << 20
"""Bytes from which on a payload, or a buffer in it, travels apart from messages."""

_SIZED = frozenset({str, bytes})
_PLAIN = frozenset({int, float, str, bytes, bool, type(None), complex})
_FIXED = (
    *_PLAIN,
    types.BuiltinFunctionType,
    types.CodeType,
    types.EllipsisType,
    range,
    frozenset,
)

_MISSING = range(0)


def _is_plain(value: object) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return kind not in _SIZED or len(value) < LARGE  # type: ignore[arg-type]
    if isinstance(value, (tuple, list)) and kind in (tuple, list):
        return len(value) <= 64 and all(type(item) in _PLAIN and _is_plain(item) for item in value)
    return False


def _dumps(value: object) -> bytes:
    return cloudpickle.dumps(value, protocol=PROTOCOL)  # type: ignore[no-any-return]


class _Sink:
    """Takes a pickle as it is written. Large bytes objects come as they are, and are not copied."""

    __slots__ = ("chunks", "size")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0

    def write(self, data: bytes | memoryview | pickle.PickleBuffer) -> None:
        chunk = data if type(data) is bytes else bytes(data)  # a view lives only as long as this call
        self.chunks.append(chunk)
        self.size += len(chunk)


def _dump(value: object) -> bytes | Pieces:
    """A pickle, or the pieces of a large one."""
    sink = _Sink()
    apart: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Whether it stays in the pickle."""
        try:
            raw = buffer.raw()
        except BufferError:  # not in one stretch
            return True
        if raw.nbytes < LARGE:
            return True
        apart.append(raw)
        return False

    cloudpickle.Pickler(sink, PROTOCOL, buffer_callback=keep).dump(value)
    if sink.size < LARGE and not apart:
        return b"".join(sink.chunks)
    return Pieces(sink.chunks, apart)


def dump_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes | Pieces:
    """The arguments of one call.

    Raises:
        SerializationError: names the first argument that cannot be pickled.
    """
    if all(map(_is_plain, args)) and (not kwargs or all(map(_is_plain, kwargs.values()))):
        return pickle.dumps((args, kwargs), PROTOCOL)  # cloudpickle's set-up costs more than this whole call
    try:
        return _dump((args, kwargs))
    except Exception as error:
        raise SerializationError(_blame(args, kwargs, error)) from error


def _blame(args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    named = [(f"argument {index + 1}", value) for index, value in enumerate(args)]
    named += [(f"argument {name!r}", value) for name, value in kwargs.items()]
    for name, value in named:
        try:
            _dumps(value)
        except Exception as culprit:
            return f"{name} (a {type(value).__name__}) cannot be pickled: {one_line(culprit)}"
    return f"the arguments cannot be pickled together: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """An exception as ``Type: text`` on one line, in characters that UTF-8 can express: file names may have others."""
    try:
        text = " ".join(str(error).split())
    except Exception as failure:
        text = f"(its text cannot be had: {type(failure).__name__})"
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if line.isascii() else line.encode(errors="backslashreplace").decode()


def load_arguments(data: bytes | list[memoryview]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `dump_arguments` made, as bytes or as pieces; raises whatever unpickling raises."""
    args, kwargs = _load(data)
    return args, kwargs


def _load(data: bytes | list[memoryview]) -> Any:
    """From our authenticated manager, or pilot."""
    if isinstance(data, list):
        return pickle.loads(data[0], buffers=data[1:])  # noqa: S301
    return pickle.loads(data)  # noqa: S301


def dump_function(function: Callable[..., Any]) -> bytes:
    """A function as bytes.

    Raises:
        SerializationError: the function, or something it refers to, cannot be pickled.
    """
    try:
        return _dumps(function)
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise SerializationError(
            f"the function {name} cannot be pickled, or something it refers to: {one_line(error)}"
        ) from error


def load_function(data: bytes) -> Callable[..., Any]:
    """What `dump_function` made; raises whatever unpickling raises."""
    return pickle.loads(data)  # type: ignore[no-any-return]  # noqa: S301 - from our authenticated manager


def dump_value(value: object) -> bytes | Pieces:
    """A function's value.

    Raises:
        SerializationError: the value cannot be pickled.
    """
    if _is_plain(value):
        return pickle.dumps(value, PROTOCOL)
    try:
        return _dump(value)
    except Exception as error:
        raise SerializationError(
            f"the result (a {type(value).__name__}) cannot be pickled: {one_line(error)}"
        ) from error


def load_value(data: bytes | list[memoryview]) -> Any:
    """What `dump_value` made, as bytes or as pieces.

    Raises:
        SerializationError: it cannot be rebuilt here, as when its class exists only on the pilot.
    """
    try:
        return _load(data)
    except Exception as error:
        raise SerializationError(f"the result cannot be rebuilt here: {one_line(error)}") from error


def dump_exception(error: BaseException, skip: int = 0) -> bytes | Pieces:
    """An exception and its traceback's text; one that would not survive the trip travels as its text alone.

    ``skip`` frames at the top of the traceback are ours and left out.
    """
    trace = error.__traceback__
    for _ in range(skip):
        trace = trace.tb_next if trace is not None else None
    text = _format(error, trace)
    try:
        body = _dumps(error)
        pickle.loads(body)  # noqa: S301 - our own bytes: many exceptions pickle and then do not unpickle
    except Exception:
        body = b""
    whole = pickle.dumps((body, type(error).__name__, one_line(error), text), PROTOCOL)
    return whole if len(whole) < LARGE else Pieces([whole], [])


def _format(error: BaseException, trace: types.TracebackType | None) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, trace)).rstrip()
    except Exception as failure:
        return f"{type(error).__name__} (its traceback cannot be shown: {type(failure).__name__})"


def load_exception(data: bytes | list[memoryview]) -> BaseException:
    """The exception with a `RemoteTraceback` as ``__cause__``; a `RemoteError` when its type cannot be rebuilt."""
    body, _name, line, text = _load(data)
    raised: BaseException | None = None
    if body:
        try:
            raised = pickle.loads(body)  # noqa: S301
        except Exception:
            raised = None
    if not isinstance(raised, BaseException):
        raised = RemoteError(line)
    object.__setattr__(raised, "__cause__", RemoteTraceback(text))  # also of one that lets nobody set anything
    return raised


def digest(body: bytes) -> bytes:
    """The name of a function body."""
    import hashlib  # noqa: PLC0415 - runners do not need it, and it brings OpenSSL: each fork would copy its map

    return hashlib.blake2b(body, digest_size=16).digest()


class _Plain(NamedTuple):
    """A function with constants alone, and its body: what is looked at to see that it is unchanged is little."""

    function: weakref.ref[types.FunctionType]
    code: types.CodeType
    defaults: tuple[Any, ...] | None
    globals: tuple[tuple[str, object], ...]
    key: bytes
    body: bytes

    def is_still(self, function: Callable[..., Any]) -> bool:
        """Whether this is that function, unchanged."""
        if (
            self.function() is not function
            or not isinstance(function, types.FunctionType)
            or function.__code__ is not self.code
            or function.__defaults__ is not self.defaults
            or function.__kwdefaults__
            or function.__dict__
        ):
            return False
        find = function.__globals__.get
        return all(find(name, _MISSING) is value for name, value in self.globals) if self.globals else True


class FunctionCache:
    """Bodies of functions already pickled, for as long as they are provably unchanged."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, tuple[list[object], bytes, bytes]]
        self._known = weakref.WeakKeyDictionary()
        self._last: _Plain | None = None

    def body(self, function: Callable[..., Any]) -> tuple[bytes, bytes]:
        """Digest and bytes of ``function``.

        Raises:
            SerializationError: it cannot be pickled.
        """
        last = self._last
        if last is not None and last.is_still(function):
            return last.key, last.body
        if not isinstance(function, types.FunctionType) or (parts := _parts(function)) is None:
            body = dump_function(function)
            return digest(body), body
        known = self._known.get(function)
        if known is None or len(known[0]) != len(parts) or not all(map(is_, known[0], parts)):
            body = dump_function(function)
            known = self._known[function] = parts, digest(body), body
        self._last = _plain(function, *known)
        return known[1], known[2]


def _plain(function: types.FunctionType, parts: list[object], key: bytes, body: bytes) -> _Plain | None:
    if function.__closure__ or function.__kwdefaults__ or not all(map(_is_constant, parts)):
        return None
    namespace, code = function.__globals__, function.__code__
    names = tuple((name, namespace.get(name, _MISSING)) for name in _referenced(code))
    return _Plain(weakref.ref(function), code, function.__defaults__, names, key, body)


def _is_constant(value: object) -> bool:
    """Whether it can neither change nor be found elsewhere, as a class or module may."""
    return all(map(_is_constant, value)) if type(value) is tuple else type(value) in _FIXED


_names: weakref.WeakKeyDictionary[types.CodeType, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _referenced(code: types.CodeType) -> tuple[str, ...]:
    known = _names.get(code)
    if known is None:
        found = dict.fromkeys(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                found.update(dict.fromkeys(_referenced(constant)))
        known = _names[code] = tuple(found)
    return known


def _parts(function: types.FunctionType) -> list[object] | None:
    """The objects whose identity decides the function's bytes; None when one of them may change in place."""
    parts: list[object] = []
    seen: set[int] = set()
    pending = [function]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for value in _direct_parts(current):
            parts.append(value)
            if type(value) is types.FunctionType:
                pending.append(value)
            elif not _is_fixed(value):
                return None
    return parts


def _direct_parts(function: types.FunctionType) -> Iterator[object]:
    yield function.__code__
    yield from function.__defaults__ or ()
    for name, default in (function.__kwdefaults__ or {}).items():
        yield name
        yield default
    if function.__dict__:
        yield function.__dict__  # a dict: never fixed
    try:
        yield from (cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:  # an empty cell: will be filled later
        yield []
    namespace = function.__globals__
    for name in _referenced(function.__code__):
        yield namespace.get(name, _MISSING)  # each in its place: a value may move from one name to another


def _is_fixed(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    if isinstance(value, type):
        return _is_found(value, value.__module__, value.__qualname__)
    if isinstance(value, types.ModuleType):
        return _is_found(value, value.__name__, "")
    return type(value) in _FIXED


def _is_found(value: object, module: str, name: str) -> bool:
    """Whether a pilot imports this class or module by name; else its content travels, and may change."""
    by_value = cloudpickle.list_registry_pickle_by_value()
    if module in ("__main__", "__mp_main__") or any(f"{module}.".startswith(f"{known}.") for known in by_value):
        return False
    found: object = sys.modules.get(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part, None)
    return found is value
