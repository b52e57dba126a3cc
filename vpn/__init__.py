"""vpn: rootless tunnels out of compute nodes; useful without hpcq.

``open_session`` brings a tunnel up and runs programs inside it; ``GatewayClient`` gets a pilot's credential
from the gateway its user runs on a login node. Start reading at ``vpn/session.py``; ``python -m vpn --help``
is the command line.

What it offers is loaded when first used: every process of a tunnel and of a gateway imports this package too, and few
need more than their own module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpn.asking import until_silent
    from vpn.capabilities import Capabilities, examine
    from vpn.command import read_password
    from vpn.config import (
        MODES,
        PROBE_INTERVAL,
        WITHOUT_CREDENTIAL,
        Credential,
        Login,
        Secret,
        TunnelConfig,
        as_flag,
        check_honoured,
        check_mtu,
        check_probe_interval,
        read_secret,
        server_credential,
        split_networks,
    )
    from vpn.cvmfs.settings import Cvmfs, make_cvmfs, whole_image
    from vpn.errors import GatewayError, TunnelError, UsageError, VpnError
    from vpn.gateway.choice import Choice, gateway_names
    from vpn.gateway.client import GatewayClient, temporary_gateway
    from vpn.modes.base import TunnelInfo
    from vpn.probes import ProbeResult
    from vpn.process import Process
    from vpn.pulse import Pulse
    from vpn.session import Diagnosis, Session, open_session
    from vpn.surroundings import Check
    from vpn.units import MAX_DURATION_S, MAX_MEMORY_MB, megabytes_in, seconds_in

_HOMES = {
    "Capabilities": "vpn.capabilities",
    "examine": "vpn.capabilities",
    "MODES": "vpn.config",
    "PROBE_INTERVAL": "vpn.config",
    "WITHOUT_CREDENTIAL": "vpn.config",
    "Credential": "vpn.config",
    "Secret": "vpn.config",
    "TunnelConfig": "vpn.config",
    "Login": "vpn.config",
    "read_password": "vpn.command",
    "read_secret": "vpn.config",
    "server_credential": "vpn.config",
    "as_flag": "vpn.config",
    "check_honoured": "vpn.config",
    "check_mtu": "vpn.config",
    "check_probe_interval": "vpn.config",
    "split_networks": "vpn.config",
    "MAX_DURATION_S": "vpn.units",
    "MAX_MEMORY_MB": "vpn.units",
    "megabytes_in": "vpn.units",
    "seconds_in": "vpn.units",
    "Cvmfs": "vpn.cvmfs.settings",
    "make_cvmfs": "vpn.cvmfs.settings",
    "whole_image": "vpn.cvmfs.settings",
    "GatewayError": "vpn.errors",
    "TunnelError": "vpn.errors",
    "UsageError": "vpn.errors",
    "VpnError": "vpn.errors",
    "Choice": "vpn.gateway.choice",
    "gateway_names": "vpn.gateway.choice",
    "GatewayClient": "vpn.gateway.client",
    "temporary_gateway": "vpn.gateway.client",
    "TunnelInfo": "vpn.modes.base",
    "ProbeResult": "vpn.probes",
    "Process": "vpn.process",
    "Pulse": "vpn.pulse",
    "Diagnosis": "vpn.session",
    "Session": "vpn.session",
    "open_session": "vpn.session",
    "Check": "vpn.surroundings",
    "until_silent": "vpn.asking",
}

__all__ = [
    "MAX_DURATION_S",
    "MAX_MEMORY_MB",
    "MODES",
    "PROBE_INTERVAL",
    "WITHOUT_CREDENTIAL",
    "Capabilities",
    "Check",
    "Choice",
    "Credential",
    "Cvmfs",
    "Diagnosis",
    "GatewayClient",
    "GatewayError",
    "Login",
    "ProbeResult",
    "Process",
    "Pulse",
    "Secret",
    "Session",
    "TunnelConfig",
    "TunnelError",
    "TunnelInfo",
    "UsageError",
    "VpnError",
    "as_flag",
    "check_honoured",
    "check_mtu",
    "check_probe_interval",
    "examine",
    "gateway_names",
    "make_cvmfs",
    "megabytes_in",
    "open_session",
    "read_password",
    "read_secret",
    "seconds_in",
    "server_credential",
    "split_networks",
    "temporary_gateway",
    "until_silent",
    "whole_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
