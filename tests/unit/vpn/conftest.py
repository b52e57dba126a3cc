"""Unit tests write nothing, not even hypothesis' examples: a checkout may be another user's."""

from hypothesis import settings

settings.register_profile("vpn", database=None, deadline=None)
settings.load_profile("vpn")
