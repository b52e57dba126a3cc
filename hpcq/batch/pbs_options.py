"""Which of qsub's options a user may add with ``--option``, and which hpcq sets itself. Pure."""

from __future__ import annotations

import re

from hpcq.errors import UsageError

_OPTION = re.compile(r"(?P<flag>-[A-Za-z])(?:\s*(?P<value>\S.*))?", re.ASCII)

_OURS = {
    "-C": "hpcq writes its directives as #PBS lines",
    "-I": "a pilot cannot be interactive",
    "-J": "use -n",
    "-X": "a pilot has no display",
    "-e": "hpcq keeps the output with its own files",
    "-f": "hpcq says itself whether qsub may leave a helper behind",
    "-j": "hpcq keeps the output with its own files",
    "-o": "hpcq keeps the output with its own files",
    "-t": "use -n",
    "-z": "hpcq needs the job's id",
}
_OUR_RESOURCES = {
    "select": "use --cores, --memory, --gpus, --nodes and --constraint",
    "nodes": "use --cores, --gpus, --nodes and --constraint",
    "ncpus": "use --cores, so that the pilot knows it too",
    "ppn": "use --cores, so that the pilot knows it too",
    "ngpus": "use --gpus, so that the pilot knows it too",
    "mem": "use --memory, so that the pilot knows it too",
    "pmem": "use --memory, so that the pilot knows it too",
    "walltime": "use --walltime, so that the pilot knows it too",
}


def split_option(option: str) -> tuple[str, ...]:
    """Return one option, such as ``-l software=matlab`` or ``-V``, as the words of a ``#PBS`` line.

    Raises: UsageError: not of that form, or one that hpcq sets itself.
    """
    match = _OPTION.fullmatch(option.strip())
    if match is None:
        raise UsageError(f"option {option!r} is not one option of the form -X VALUE, such as '-l software=root'")
    flag, value = match["flag"], match["value"]
    taken = _OURS.get(flag)
    if flag == "-l":
        names = [part.partition("=")[0].strip() for part in (value or "").split(",")]
        taken = next((_OUR_RESOURCES[name] for name in names if name in _OUR_RESOURCES), None)
    if flag == "-W" and re.match(r"block\b", value or ""):
        taken = "qsub would wait for the job's end"
    if taken:
        raise UsageError(f"option {option!r} cannot be given: {taken}")
    return (flag,) if value is None else (flag, value)
