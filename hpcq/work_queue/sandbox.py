"""What runs round a task in its sandbox, so that outputs come back as Work Queue brings them.

Work Queue returns the outputs of a task that failed too, those that exist when others are missing, and some only on
failure or success. hpcq returns all of a task that succeeded. So outputs are gathered by number into one directory,
which is the task's only output for hpcq, with the task's own status beside them; `place` puts them where they belong.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from hpcq.work_queue.constants import WORK_QUEUE_FAILURE_ONLY, WORK_QUEUE_SUCCESS_ONLY

GATHERED = ".hpcq-outputs"
"""The directory in the sandbox, and the beginning of its name where it arrives."""

_KEEP = f"""keep() {{
    case "$3" in
        failure) if [ "$status" -eq 0 ]; then return; fi ;;
        success) if [ "$status" -ne 0 ]; then return; fi ;;
    esac
    if [ ! -e "./$2" ]; then return; fi
    if [ -L "./$2" ]; then
        if [ "$4" = links ]; then cp -RL "./$2" "{GATHERED}/$1"; fi
    elif [ "$4" = others ]; then mv "./$2" "{GATHERED}/$1"
    fi
}}
mkdir {GATHERED} || exit 125
echo "$status" > {GATHERED}/status || exit 125"""


class Output(NamedTuple):
    """One declared output: ``remote`` in the sandbox, ``local`` where the program runs."""

    remote: str
    local: str
    flags: int = 0

    @property
    def when(self) -> str:
        """When it comes back: ``always``, ``failure`` or ``success``."""
        if self.flags & WORK_QUEUE_FAILURE_ONLY:
            return "failure"
        return "success" if self.flags & WORK_QUEUE_SUCCESS_ONLY else "always"

    def wanted(self, status: int) -> bool:
        """Whether it comes back after this exit status."""
        return self.when == "always" or (self.when == "failure") == (status != 0)


def script(command: str, outputs: Sequence[Output], unset: Sequence[str] = ()) -> str:
    """``command`` with its standard error in its standard output, as Work Queue has it, and its outputs gathered."""
    lines = ["exec 2>&1", 'export WORK_QUEUE_SANDBOX="$PWD"', *(f"unset {name}" for name in unset)]
    if not outputs:
        return "\n".join([*lines, command])
    # In a shell of its own, so that whatever it does (exit, trap, cd) what follows runs.
    lines += [f"/bin/sh -c {quote(command)}", "status=$?", _KEEP]
    for kind in ("links", "others"):  # what a link leads to may be moved itself
        lines += [f"keep {n} {quote(one.remote)} {one.when} {kind} || exit 125" for n, one in enumerate(outputs)]
    return "\n".join([*lines, "exit 0"])


def _make_inside() -> Callable[..., Any]:
    def inside(function: Any, args: Any, kwargs: Any, outputs: Any, unset: Any) -> Any:
        import os  # noqa: PLC0415 - travels by value
        import shutil  # noqa: PLC0415
        import traceback  # noqa: PLC0415

        hidden = {name: os.environ.pop(name) for name in unset if name in os.environ}
        status, raised = 0, ""
        try:
            value = function(*args, **kwargs)
        except Exception as error:
            if outputs is None:
                raise
            status, raised, value = 1, traceback.format_exc(), error
        finally:
            os.environ.update(hidden)
        if outputs is None:
            return value
        os.mkdir(".hpcq-outputs")  # noqa: PTH102
        wanted = [
            (remote, f".hpcq-outputs/{number}")
            for number, (remote, when) in enumerate(outputs)
            if when == "always" or (when == "failure") == (status != 0)
        ]
        for remote, target in wanted:  # links first: what they lead to may be moved itself
            if os.path.islink(remote) and os.path.exists(remote):  # noqa: PTH110, PTH114
                (shutil.copytree if os.path.isdir(remote) else shutil.copy)(remote, target)  # noqa: PTH112
        for remote, target in wanted:
            if os.path.exists(remote) and not os.path.islink(remote):  # noqa: PTH110, PTH114
                os.rename(remote, target)  # noqa: PTH104
        return status, value, raised

    return inside


inside = _make_inside()
"""Calls ``function`` with variables unset and its outputs gathered. A closure, so that it travels by value: runners
need not import this package. Without ``outputs`` (None) the value is passed on; else it is ``(status, value, text)``,
where status 1 means that the value is an exception and the text its traceback."""


def arrival(outputs: Sequence[Output]) -> str:
    """Where the gathered outputs arrive: beside the first of them, so that they are renamed, not copied."""
    parent = Path(outputs[0].local).parent
    parent.mkdir(parents=True, exist_ok=True)
    return str(parent / f"{GATHERED}-{secrets.token_hex(6)}")


def place(arrived: str, outputs: Sequence[Output], status: int) -> tuple[list[str], list[str]]:
    """Put what has arrived where it belongs; returns the names of what is missing and lines on what cannot be put."""
    missing, failed = [], []
    for number, output in enumerate(outputs):
        source = Path(arrived) / str(number)
        if not os.path.lexists(source):
            if output.wanted(status):
                missing.append(output.remote)
            continue
        try:
            _move(source, Path(output.local))
        except OSError as error:
            failed.append(f"{output.remote}: {error}")
    drop(arrived)
    return missing, failed


def drop(arrived: str) -> None:
    """Leave nothing of it."""
    shutil.rmtree(arrived, ignore_errors=True)


def read_status(arrived: str) -> int | None:
    """The task's own exit status; None when it did not arrive."""
    with contextlib.suppress(OSError, ValueError):
        return int((Path(arrived) / "status").read_text())
    return None


def _move(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and destination.is_dir():  # Work Queue adds to a directory that is there
        shutil.copytree(source, destination, dirs_exist_ok=True, symlinks=True)
        return
    try:
        source.replace(destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = destination.with_name(f"{GATHERED}-{secrets.token_hex(6)}")
        shutil.move(source, beside)
        beside.replace(destination)
