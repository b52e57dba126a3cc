"""What runs on the compute node, as a task on its own network: look, then bring up each mode that nothing forbids.

Tunnels come up one after the other and are taken down again; nothing is left when `look` returns.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence

import msgspec

from hpcq.doctor.report import OWN_WAY_OUT, Findings, Trial
from vpn import Capabilities, Credential, TunnelConfig, TunnelError, UsageError, examine, open_session

BRING_UP = 30.0
"""Seconds a mode has to come up."""
PROBE = 20.0
"""Seconds a target has to answer, through each mode."""


def look(credentials: Mapping[str, bytes], modes: Sequence[str], targets: Sequence[str]) -> bytes:
    """The findings of this host, as JSON; ``credentials`` by mode, for those that need one, good for one login each.

    Modes that need the node's own way out are tried with ``targets`` only, which must answer through every mode.
    """
    return msgspec.json.encode(asyncio.run(_look(credentials, modes, targets)))


async def _look(credentials: Mapping[str, bytes], modes: Sequence[str], targets: Sequence[str]) -> Findings:
    known = {mode: Credential.from_bytes(data) for mode, data in credentials.items()}
    one = next(iter(known.values()), None)
    found = await examine(None if one is None else (one.addresses, one.port or one.relay_port))
    trials = [
        await _try(mode, known.get(mode), targets)
        for mode in modes
        if (mode in known or (mode in OWN_WAY_OUT and targets)) and worth_trying(found, mode)
    ]
    return Findings(socket.gethostname(), found, trials)


def worth_trying(found: Capabilities, mode: str) -> bool:
    """Whether nothing stands in the way of a mode; the node's own network is worth a try without a default route."""
    return mode == "none" or not found.why_not(f"mode {mode}")


async def _try(mode: str, credential: Credential | None, targets: Sequence[str]) -> Trial:
    try:
        config = TunnelConfig(mode, credential, bring_up_timeout=BRING_UP)  # type: ignore[arg-type]
        async with open_session(config) as session:
            info = session.info
            failed = [result for result in await session.probe(targets, PROBE) if not result.ok] if targets else []
    except (TunnelError, UsageError) as error:
        return Trial(mode, error=str(error))
    if failed:
        why = "; ".join(result.message for result in failed)
        return Trial(mode, info.bring_up_seconds, info.kind, f"it comes up, but {why}")
    return Trial(mode, info.bring_up_seconds, info.kind)
