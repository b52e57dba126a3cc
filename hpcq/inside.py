"""What a running function may say to the runner that executes it. Outside a pilot it does nothing."""

from __future__ import annotations

recycling = False
"""Read by the runner after each task."""


def recycle() -> None:
    """Ask for a new interpreter after this task: ``hpcq.recycle()``, called in a function that leaves a mess behind.

    For ``isolation="warm"``; the other kinds start clean anyway. The task itself goes on and ends as always.
    """
    global recycling  # noqa: PLW0603 - one flag of one process
    recycling = True
