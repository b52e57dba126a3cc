"""Tasks as they travel: pickled at ``submit``, so that their arguments are as they were then. In the user's threads.

May not live here: how anything is pickled (see `serialize`), who takes it from here (see `manager`).
"""

from __future__ import annotations

from typing import Any

from hpcq import serialize
from hpcq.dispatch import Submission
from hpcq.errors import SerializationError
from hpcq.messages import TaskSpec
from hpcq.options import DEFAULTS, Options
from hpcq.parcels import Load, Pieces, Shelf
from hpcq.protocol import FRAME_LIMIT
from hpcq.scheduler import NewTask
from hpcq.task import PythonTask, Task

PAYLOAD_LIMIT = FRAME_LIMIT - (64 << 20)
"""Bytes of a function and its arguments together: what certainly fits into one message."""


class Packer:
    """Makes submissions of tasks. Large arguments are kept on ``shelf``."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._functions = serialize.FunctionCache()
        self._named = b"", ""

    def pack(self, task: Task, number: int) -> Submission:
        """The task, under that number, with its arguments as they are now.

        Raises:
            SerializationError: the function or its arguments cannot be pickled; says which.
            UsageError: its files cannot be as they are.
        """
        options = task.options
        if isinstance(task, PythonTask):
            key, body = self._functions.body(task.function)
            arguments = serialize.dump_arguments(task.args, task.kwargs)
            payload, parcel = (arguments, None) if isinstance(arguments, bytes) else (b"", self._stored(arguments))
            kind = options.category or self._name(key)
        else:
            key, body, parcel = b"", b"", None
            payload, kind = task.command.encode(errors="surrogateescape"), options.category or ""
        if len(body) + len(payload) > PAYLOAD_LIMIT:
            raise SerializationError(
                f"the function is {len(body)} bytes pickled, over the limit of 1 GiB; pass large data as arguments"
            )
        if options is DEFAULTS and parcel is None:  # as most are: no need to look at each option
            return Submission(NewTask(number, kind=kind), TaskSpec(number, key, payload), body)
        spec = TaskSpec(
            number, key, payload, options.cores, options.memory, options.walltime or 0.0, options.network,
            dict(options.env) if options.env else None, options.disk, options.gpus, options.isolation,
            None, None if parcel is None else parcel.sizes, not options.retries,
        )  # fmt: skip
        needs = NewTask(
            number, options.cores, options.memory, options.network, options.priority, options.retries, kind,
            options.disk, options.gpus, options.features, options.walltime or 0.0,
        )  # fmt: skip
        files = self._files(task, options) if options.inputs or options.outputs else None
        return Submission(needs, spec, body, files, None if parcel is None else parcel.parcel)

    def _name(self, key: bytes) -> str:
        """The kind of task that calls this function."""
        last, name = self._named
        if last is not key:
            name = key.hex()
            self._named = key, name
        return name

    def _stored(self, arguments: Pieces) -> Load:
        """A copy of large arguments, as they are now."""
        try:
            return Load(self._shelf.store(arguments), arguments.sizes)
        except OSError as error:
            size = sum(arguments.sizes)
            raise SerializationError(f"the arguments, {size} bytes pickled, cannot be kept: {error}") from error

    def _files(self, task: Task, options: Options) -> Any:
        from hpcq.files.plan import make_plan  # noqa: PLC0415 - only tasks with files need it

        return make_plan(task, options)
