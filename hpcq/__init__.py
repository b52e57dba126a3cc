"""hpcq: Python functions and shell commands on HPC nodes that have no way out.

``import hpcq`` gives `Queue`, `Executor`, `Task`, `PythonTask`, `Outcome` and the errors. They are loaded when first
used, because every runner on every node imports this package too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcq.errors import (
        AuthenticationError,
        BatchError,
        HpcqError,
        PilotFailedError,
        QueueClosedError,
        QueueNotFoundError,
        RemoteError,
        RemoteTraceback,
        SerializationError,
        TaskFailedError,
        TemplateError,
        UsageError,
    )
    from hpcq.files.sources import URL, Buffer, File, Temp
    from hpcq.futures import BrokenExecutorError, Executor
    from hpcq.inside import recycle
    from hpcq.outcome import Outcome
    from hpcq.queue import Queue
    from hpcq.roster import PilotView
    from hpcq.task import PythonTask, Task

_HOMES = {
    "BrokenExecutorError": "hpcq.futures",
    "Executor": "hpcq.futures",
    "recycle": "hpcq.inside",
    "Queue": "hpcq.queue",
    "PilotView": "hpcq.roster",
    "Buffer": "hpcq.files.sources",
    "File": "hpcq.files.sources",
    "Temp": "hpcq.files.sources",
    "URL": "hpcq.files.sources",
    "Outcome": "hpcq.outcome",
    "PythonTask": "hpcq.task",
    "Task": "hpcq.task",
    "AuthenticationError": "hpcq.errors",
    "BatchError": "hpcq.errors",
    "HpcqError": "hpcq.errors",
    "PilotFailedError": "hpcq.errors",
    "QueueClosedError": "hpcq.errors",
    "QueueNotFoundError": "hpcq.errors",
    "RemoteError": "hpcq.errors",
    "RemoteTraceback": "hpcq.errors",
    "SerializationError": "hpcq.errors",
    "TaskFailedError": "hpcq.errors",
    "TemplateError": "hpcq.errors",
    "UsageError": "hpcq.errors",
}

__all__ = [
    "URL",
    "AuthenticationError",
    "BatchError",
    "BrokenExecutorError",
    "Buffer",
    "Executor",
    "File",
    "HpcqError",
    "Outcome",
    "PilotFailedError",
    "PilotView",
    "PythonTask",
    "Queue",
    "QueueClosedError",
    "QueueNotFoundError",
    "RemoteError",
    "RemoteTraceback",
    "SerializationError",
    "Task",
    "TaskFailedError",
    "Temp",
    "TemplateError",
    "UsageError",
    "recycle",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hpcq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
