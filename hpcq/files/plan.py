"""From a task's options to its `Plan`, in the user's thread at ``submit``."""

from __future__ import annotations

from hpcq.errors import UsageError
from hpcq.files import sources
from hpcq.files.desk import Plan
from hpcq.options import Options
from hpcq.task import Task


def make_plan(task: Task, options: Options) -> Plan:
    """The files of a task that is being submitted.

    Raises:
        UsageError: an input is an output of a task that was not submitted, or a `Temp` that none or another one writes.
    """
    inputs, outputs = dict(options.inputs or {}), dict(options.outputs or {})
    for name, source in inputs.items():
        _check_producer(name, source)
    for name, destination in outputs.items():
        if isinstance(destination, sources.Temp):
            if destination.producer is not None:
                raise UsageError(f"outputs[{name!r}]: this Temp is already written by {destination.producer[0].label}")
            destination.producer = (task, name)
    return Plan(task, inputs, outputs)


def _check_producer(name: str, source: sources.Source) -> None:
    if isinstance(source, sources.Temp) and source.producer is None:
        raise UsageError(f"inputs[{name!r}]: no submitted task writes this Temp; submit the one that does first")
    if isinstance(source, sources.TaskFile) and source.task.id is None:
        raise UsageError(f"inputs[{name!r}]: {source.task.label} has to be submitted first")
