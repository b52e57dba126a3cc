"""What runs on the compute node, as a task on its own network: look, then bring up each mode that nothing forbids.

Tunnels come up one after the other and are taken down again; nothing is left when `look` returns.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence

import msgspec

from hpcq.doctor.report import OWN_WAY_OUT, Findings, Trial
from vpn import Capabilities, Check, Credential, TunnelConfig, TunnelError, UsageError, examine, open_session

BRING_UP = 30.0
"""Seconds a mode has to come up."""
DTLS = 3.0
"""Seconds of it that DTLS has."""
WITH_DTLS = "TLS and DTLS"
"""What an openconnect session has whose DTLS came up: TLS carries it first."""
PROBE = 20.0
"""Seconds a target has to answer, through each mode."""


def look(credentials: Mapping[str, bytes], modes: Sequence[str], targets: Sequence[str]) -> bytes:
    """The findings of this host, as JSON; ``credentials`` by mode, for those that need one, good for one login each.

    Modes that need the node's own way out are tried with ``targets`` only, which must answer through every mode.
    """
    return msgspec.json.encode(asyncio.run(_look(credentials, modes, targets)))


async def _look(credentials: Mapping[str, bytes], modes: Sequence[str], targets: Sequence[str]) -> Findings:
    began = time.time()
    known = {mode: Credential.from_bytes(data) for mode, data in credentials.items()}
    one = next(iter(known.values()), None)
    found = await examine(None if one is None else (one.addresses, one.port or one.relay_port))
    trials = [
        await _try(mode, known.get(mode), targets)
        for mode in modes
        if (mode in known or (mode in OWN_WAY_OUT and targets)) and worth_trying(found, mode)
    ]
    findings = Findings(socket.gethostname(), found, trials, began, time.time())
    return findings.with_checks(*filter(None, map(udp_of, trials)))


def udp_of(trial: Trial) -> Check | None:
    """What a trial says of UDP to the gateway, which only a tunnel can tell."""
    if trial.mode != "openconnect" or trial.error:
        return None
    if trial.kind == WITH_DTLS:
        return Check("gateway udp", True, "arrives: DTLS came up")
    return Check("gateway udp", False, "does not arrive, or no answer does: DTLS did not come up; not needed")


def worth_trying(found: Capabilities, mode: str) -> bool:
    """Whether nothing stands in the way of a mode; the node's own network is worth a try without a default route."""
    return mode == "none" or not found.why_not(f"mode {mode}")


async def _try(mode: str, credential: Credential | None, targets: Sequence[str]) -> Trial:
    try:
        dtls = True if mode == "openconnect" else None  # beside TLS: it tells whether UDP arrives
        config = TunnelConfig(mode, credential, BRING_UP, DTLS, dtls=dtls)  # type: ignore[arg-type]
        async with open_session(config) as session:
            info = session.info
            failed = [result for result in await session.probe(targets, PROBE) if not result.ok] if targets else []
    except (TunnelError, UsageError) as error:
        return Trial(mode, error=str(error))
    kind = WITH_DTLS if info.kind == "DTLS" else info.kind
    if failed:
        why = "; ".join(result.message for result in failed)
        return Trial(mode, info.bring_up_seconds, kind, f"it comes up, but {why}")
    return Trial(mode, info.bring_up_seconds, kind)
