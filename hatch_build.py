"""Build hook of the wheel."""

from __future__ import annotations

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Hook(BuildHookInterface):
    """Nothing to build yet."""
