"""The parcels that are at this pilot: arguments that runners will map, results that runners left to be sent.

May not live here: how they travel (`parcels`).
"""

from __future__ import annotations

from hpcq.parcels import Load, Parcel, Shelf


class Hold:
    """Arguments by task (``given``), results by task (``results``); ``shelf`` counts the memory of both."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf
        self.given: dict[int, Parcel] = {}
        self.results: dict[int, Load] = {}

    def left(self, task: int, file: tuple[int, bool] | None, sizes: list[int]) -> None:
        """A runner has left this file with a result."""
        if file is not None:
            self.results[task] = Load(self.shelf.adopt(*file), sizes)
