"""Errors of the tunnel package: each one line, naming the layer that failed and what to do.

Nothing here imports another module of the package.
"""

from __future__ import annotations

from typing import Literal, get_args

Layer = Literal[
    "user namespaces",
    "tun",
    "program",
    "shim",
    "openconnect",
    "gateway",
    "dns",
    "xrootd",
    "http",
    "cvmfs",
    "tunnel",
]
LAYERS: frozenset[str] = frozenset(get_args(Layer))


class VpnError(Exception):
    """Base of every error of this package; ``exit_status`` is what a command ends with."""

    exit_status = 5


class UsageError(VpnError, ValueError):
    """An option or value that cannot be used; names it."""

    exit_status = 2


class TunnelError(VpnError):
    """A tunnel that could not be brought up, or broke; ``layer`` says where in the stack.

    ``layer`` is one of :data:`LAYERS`; ``message`` is one line and says what to do.
    """

    def __init__(self, layer: Layer, message: str) -> None:
        super().__init__(layer, message)
        self.layer: Layer = layer
        self.message = message

    def __str__(self) -> str:
        return f"{self.layer}: {self.message}"


class GatewayError(VpnError):
    """A gateway that is not running, refused a request, or could not start."""
