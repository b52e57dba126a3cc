"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# Machines are shared and noisy: no test is judged by its time. What CI runs is the same each time; people search on.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")
