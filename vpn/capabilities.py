"""What this host allows, by trying it: namespaces, tun, programs and their versions, shims.

Each refusal carries the same advice as the error a tunnel would end with.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AsyncExitStack

import msgspec

from vpn.errors import TunnelError
from vpn.namespace import open_namespace
from vpn.process import Client, run, start_keeper
from vpn.programs import PACKAGES, environment, find_shim, missing_program, search_path

VERSION_DEADLINE = 10.0
SHIMS = ("tun_from_fd", "one_id", "host_sockets")
NEEDS = {
    "mode openconnect": ("user namespaces", "tun", "openconnect", "tun_from_fd"),
    "gateway": (
        "user namespaces",
        "tun",
        "ocserv",
        "ocpasswd",
        "occtl",
        "slirp4netns",
        "nft",
        "one_id",
        "host_sockets",
    ),
}


class Check(msgspec.Struct, frozen=True):
    """One capability: ``detail`` is a version or path, or why it is not there and what to do."""

    name: str
    ok: bool
    detail: str


class Capabilities(msgspec.Struct, frozen=True):
    """All checks; ``uses`` maps a use to the checks it fails."""

    checks: list[Check]
    uses: dict[str, list[str]]


async def examine() -> Capabilities:
    """Try everything."""
    async with AsyncExitStack() as stack:
        keeper = await start_keeper()
        stack.push_async_callback(keeper.close)
        checks = await _kernel_checks(keeper.client)
        for name in PACKAGES:
            checks.append(await _program(keeper.client, name))
    checks += [_shim(name) for name in SHIMS]
    return Capabilities(checks, uses_of(checks))


def uses_of(checks: list[Check]) -> dict[str, list[str]]:
    """What is possible, and what is missing for the rest."""
    there = {check.name for check in checks if check.ok}
    return {use: [need for need in needs if need not in there] for use, needs in NEEDS.items()}


async def _kernel_checks(keeper: Client) -> list[Check]:
    try:
        namespace = await open_namespace(keeper)
    except TunnelError as error:
        unknown = Check(
            "tun", os.access("/dev/net/tun", os.R_OK | os.W_OK), "/dev/net/tun, not tried inside a namespace"
        )
        return [Check("user namespaces", False, error.message), unknown]
    try:
        notes = (await namespace.client.started()).notes
        made = Check("user namespaces", True, "; ".join(["user, network, mount and pid namespaces", *notes]))
        return [made, await _tun(namespace.open_tun("tun0"))]
    finally:
        await namespace.close()


async def _tun(opening: object) -> Check:
    try:
        os.close(await opening)  # type: ignore[misc]
    except TunnelError as error:
        return Check("tun", False, error.message)
    return Check("tun", True, "/dev/net/tun")


async def _program(keeper: Client, name: str) -> Check:
    path = shutil.which(name, path=search_path())
    if path is None:
        return Check(name, False, missing_program(name))
    try:
        _, text = await run(keeper, [path, "--version"], env=environment(), deadline=VERSION_DEADLINE)
    except (OSError, TimeoutError) as error:
        return Check(name, False, f"{path} cannot be run: {error}")
    version = re.search(r"\bv?\d+(\.\d+)+\S*", text)
    return Check(name, True, f"{version[0] if version else 'of unknown version'} ({path})")


def _shim(name: str) -> Check:
    try:
        return Check(name, True, find_shim(name))
    except TunnelError as error:
        return Check(name, False, error.message)
