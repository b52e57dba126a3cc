"""Which of sbatch's options a user may add with ``--option``, and which hpcq sets itself. Pure."""

from __future__ import annotations

import re

from hpcq.errors import UsageError

_LONG = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(?:=.*)?", re.ASCII)
_SHORT = re.compile(r"-(?P<name>[A-Za-z])\S*", re.ASCII)

_ONE_EACH = "use --nodes: a pilot starts on each node"
_OURS = {
    "array": "use -n",
    "parsable": "hpcq needs it to learn the job's id",
    "output": "hpcq keeps the output with its own files",
    "error": "hpcq keeps the output with its own files",
    "wrap": "use --template",
    "wait": "it would block until the job ends",
    "test-only": "use --dry-run",
    "time": "use --walltime, so that the pilot knows it too",
    "mem": "use --memory, so that the pilot knows it too",
    "mem-per-cpu": "use --memory, so that the pilot knows it too",
    "cpus-per-task": "use --cores, so that the pilot knows it too",
    "nodes": _ONE_EACH,
    "ntasks": _ONE_EACH,
    "ntasks-per-node": _ONE_EACH,
}
_SHORT_NAMES = {
    "a": "array",
    "o": "output",
    "e": "error",
    "W": "wait",
    "t": "time",
    "c": "cpus-per-task",
    "N": "nodes",
    "n": "ntasks",
}


def check_option(option: str) -> None:
    """Accept one option as it would stand on sbatch's command line, such as ``--constraint=knl``.

    Raises: UsageError: not of that form, or one that hpcq sets itself (sbatch also takes the beginnings of
    names).
    """
    long, short = _LONG.fullmatch(option), _SHORT.fullmatch(option)
    if long is None and short is None:
        raise UsageError(f"option {option!r} is not one option of the form --name=value, such as --constraint=knl")
    if long is not None:
        name = long["name"]
        taken = [ours for ours in _OURS if ours.startswith(name)]
    else:
        name = short["name"] if short else ""
        taken = [_SHORT_NAMES[name]] if name in _SHORT_NAMES else []
    if taken:
        raise UsageError(f"option {option!r} cannot be given: {_OURS[taken[0]]}")
