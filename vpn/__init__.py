"""vpn: rootless tunnels out of compute nodes; useful without hpcq.

``open_session`` brings a tunnel up and runs programs inside it; ``GatewayClient`` gets a pilot's credential
from the gateway its user runs on a login node. Start reading at ``vpn/session.py``; ``python -m vpn --help``
is the command line.
"""

from vpn.capabilities import Capabilities, examine
from vpn.config import MODES, WITHOUT_CREDENTIAL, Credential, Secret, TunnelConfig
from vpn.cvmfs.settings import Cvmfs, make_cvmfs
from vpn.errors import GatewayError, TunnelError, UsageError, VpnError
from vpn.gateway.choice import Choice, gateway_names
from vpn.gateway.client import GatewayClient, temporary_gateway
from vpn.modes.base import TunnelInfo
from vpn.probes import ProbeResult
from vpn.process import Process
from vpn.session import Session, open_session
from vpn.surroundings import Check

__all__ = [
    "MODES",
    "WITHOUT_CREDENTIAL",
    "Capabilities",
    "Check",
    "Choice",
    "Credential",
    "Cvmfs",
    "GatewayClient",
    "GatewayError",
    "ProbeResult",
    "Process",
    "Secret",
    "Session",
    "TunnelConfig",
    "TunnelError",
    "TunnelInfo",
    "UsageError",
    "VpnError",
    "examine",
    "gateway_names",
    "make_cvmfs",
    "open_session",
    "temporary_gateway",
]
