"""The options of a task: their defaults, and what is refused, by name, at the line that set it.

May not live here: what an option leads to (see `scheduler`, `pilot`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from hpcq.errors import UsageError

NETWORKS = ("any", "wan", "host")
ISOLATIONS = ("warm", "fork", "fresh")


class Options(msgspec.Struct, frozen=True, gc=False):
    """Everything `Task.set` takes, with the defaults."""

    cores: int = 1
    memory: int = 0
    walltime: float | None = None
    priority: float = 0
    tag: str | None = None
    category: str | None = None
    retries: int = 3
    env: Mapping[str, str] | None = None
    network: str = "any"
    isolation: str = "warm"
    disk: int = 0
    gpus: int = 0
    features: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] | None = None
    outputs: Mapping[str, Any] | None = None


DEFAULTS = Options()


def whole_number(name: str, value: object, least: int) -> int:
    """``value`` if it is a whole number of at least ``least``.

    Raises:
        UsageError: it is not; names the option.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UsageError(f"{name} must be a whole number, not {value!r}")
    number = value.__index__()
    if number < least:
        raise UsageError(f"{name} must be at least {least}, not {number}")
    return int(number)


def _number(name: str, value: object) -> float:
    try:
        number = float(value) if hasattr(value, "__float__") and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # as an array, or an integer of 400 digits
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} must be a finite number, not {value!r}")
    return number


def _walltime(name: str, value: object) -> float | None:
    if value is None:
        return None
    seconds = _number(name, value)
    if seconds <= 0:
        raise UsageError(f"{name} must be more than 0 seconds, not {value!r}")
    return seconds


def _label(name: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UsageError(f"{name} must be a string, not {value!r}")


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if value in allowed and isinstance(value, str):
            return value
        raise UsageError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")

    return check


def _environment(name: str, value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} must map variable names to strings, not {value!r}")
    for key, text in value.items():
        if not isinstance(key, str) or not key or "=" in key or "\0" in key:
            raise UsageError(f"{name} has a variable name that cannot be used: {key!r}")
        if not isinstance(text, str) or "\0" in text:
            raise UsageError(f"{name}[{key!r}] must be a string without NUL, not {text!r}")
        if not is_text(key + text):
            raise UsageError(f"{name}[{key!r}] must be text that UTF-8 can express, not {text!r}")
    return dict(value)


def _files(name: str, value: object) -> Any:
    from hpcq.files import sources  # noqa: PLC0415 - runners and tasks without files do without

    return (sources.check_inputs if name == "inputs" else sources.check_outputs)(name, value)


def is_text(value: str, errors: str = "strict") -> bool:
    """Whether UTF-8 can express it, with that way to treat errors."""
    try:
        value.encode(errors=errors)
    except UnicodeEncodeError:
        return False
    return True


def _features(name: str, value: object) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a set of strings, not {value!r}")
    features = frozenset(value)
    for feature in features:
        if not isinstance(feature, str) or not feature:
            raise UsageError(f"{name} must be a set of strings, and one of them is {feature!r}")
    return features


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "cores": lambda name, value: whole_number(name, value, 1),
    "memory": lambda name, value: whole_number(name, value, 0),
    "disk": lambda name, value: whole_number(name, value, 0),
    "gpus": lambda name, value: whole_number(name, value, 0),
    "walltime": _walltime,
    "priority": _number,
    "tag": _label,
    "category": _label,
    "retries": lambda name, value: whole_number(name, value, 0),
    "env": _environment,
    "network": _one_of(NETWORKS),
    "features": _features,
    "isolation": _one_of(ISOLATIONS),
    "inputs": _files,
    "outputs": _files,
}


def changed(options: Options, changes: Mapping[str, object]) -> Options:
    """``options`` with ``changes`` applied.

    Raises:
        UsageError: an unknown option (with the nearest known one) or a bad value, by name.
    """
    checked = {}
    for name, value in changes.items():
        check = _CHECKS.get(name)
        if check is None:
            raise UsageError(_unknown(name))
        checked[name] = check(name, value)
    return msgspec.structs.replace(options, **checked)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _CHECKS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(_CHECKS)}"
    return f"unknown task option {name!r}{hint}"
