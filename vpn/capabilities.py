"""What this host allows, by trying it: namespaces, tun, programs and their versions, shims.

Each refusal carries the same advice as the error a tunnel would end with.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack

import msgspec

from vpn.errors import TunnelError
from vpn.namespace import Namespace, open_namespace
from vpn.process import Client, run, start_keeper
from vpn.programs import PACKAGES, environment, find_shim, missing_program, search_path
from vpn.refusals import read_switches
from vpn.surroundings import (
    ANSWER_DEADLINE,
    SURROUNDINGS,
    Check,
    check_clock,
    check_clock_against,
    check_dns,
    check_loopback,
    check_servers,
)

VERSION_DEADLINE = 10.0
SHIMS = ("tun_from_fd", "socks", "one_id", "last_words", "host_sockets")
OR = " or "
"""Between what serves as well: the last is told of where all are missing."""
NEEDS = {
    "mode relay": ("user namespaces", "tun", "nat"),
    "mode openconnect": ("user namespaces", "tun", "openconnect", "tun_from_fd"),
    "mode socks": ("loopback", "socks"),
    "mode slirp": ("user namespaces", "tun", "pasta or slirp4netns", "default route"),
    "mode none": ("default route",),
    "gateway": (
        "user namespaces",
        "tun",
        "ocserv",
        "occtl",
        "nft",
        "one_id",
        "last_words",
        "host_sockets",
    ),
}


class Capabilities(msgspec.Struct, frozen=True):
    """All checks; ``uses`` maps a use to the checks it fails."""

    checks: list[Check]
    uses: dict[str, list[str]]

    def why_not(self, use: str) -> list[str]:
        """What stands in the way of a use, each with what to ask for; empty when nothing does."""
        details = {check.name: check.detail for check in self.checks}
        return [f"{need}: {details.get(need.split(OR)[-1], 'not tried')}" for need in self.uses[use]]


async def examine(server: tuple[Sequence[str], int] | None = None, against: str = "") -> Capabilities:
    """Try everything; also a gateway (addresses, port) and the clock ``against`` a web server, where they are given."""
    async with AsyncExitStack() as stack:
        keeper = await start_keeper()
        stack.push_async_callback(keeper.close)
        checks = await _kernel_checks(keeper.client)
        for name in PACKAGES:
            checks.append(await _program(keeper.client, name))
    checks.append(_cvmfsexec())
    checks += [_shim(name) for name in SHIMS]
    checks += [_compiler(), await check_loopback(), await check_dns(), *(check() for check in SURROUNDINGS)]
    checks.append(await asyncio.to_thread(_clock, against))
    if server is not None:
        checks += await check_servers(*server)
    return Capabilities(checks, uses_of(checks))


def _compiler() -> Check:
    path = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return Check("cc", path is not None, path or "no C compiler: install gcc before hpcq, for its shims")


def _clock(against: str) -> Check:
    if not against:
        return check_clock()
    import urllib.error  # noqa: PLC0415 - slow to import, and pilots import this module too
    import urllib.request  # noqa: PLC0415

    try:
        with urllib.request.urlopen(against, timeout=ANSWER_DEADLINE) as answer:  # noqa: S310  (any URL the user names)
            return check_clock_against(answer.headers["Date"], time.time(), against)
    except urllib.error.HTTPError as error:
        return check_clock_against(error.headers["Date"], time.time(), against)
    except (OSError, ValueError) as error:
        return Check("clock", False, f"{against}: {error}")


def uses_of(checks: list[Check]) -> dict[str, list[str]]:
    """What is possible, and what is missing for the rest."""
    there = {check.name for check in checks if check.ok}
    return {use: [need for need in needs if there.isdisjoint(need.split(OR))] for use, needs in NEEDS.items()}


async def _kernel_checks(keeper: Client) -> list[Check]:
    try:
        namespace = await open_namespace(keeper)
    except TunnelError as error:
        readable = os.access("/dev/net/tun", os.R_OK | os.W_OK)
        return [
            Check("user namespaces", False, error.message),
            Check("tun", readable, "/dev/net/tun, not tried inside a namespace"),
            Check("nat", False, "not tried: it needs a namespace"),
        ]
    try:
        notes = (await namespace.client.started()).notes
        limits = [f"{name}={value}" for name, value in read_switches().items() if name.startswith("user.")]
        made = "; ".join(["user, network, mount and pid namespaces", *limits, *notes])
        tun = await _tried("tun", "/dev/net/tun", _open_tun(namespace))
        nat = await _tried("nat", "redirection of TCP", namespace.redirect("tun0", 1)) if tun.ok else None
        return [Check("user namespaces", True, made), tun, nat or Check("nat", False, "not tried: it needs tun")]
    finally:
        await namespace.close()


async def _open_tun(namespace: Namespace) -> None:
    os.close(await namespace.open_tun("tun0"))


async def _tried(name: str, what: str, trying: Awaitable[None]) -> Check:
    try:
        await trying
    except TunnelError as error:
        return Check(name, False, error.message)
    return Check(name, True, what)


async def _program(keeper: Client, name: str) -> Check:
    path = shutil.which(name, path=search_path())
    if path is None:
        return Check(name, False, missing_program(name))
    try:
        _, text = await run(keeper, [path, "--version"], env=environment(), deadline=VERSION_DEADLINE)
    except (OSError, TimeoutError) as error:
        return Check(name, False, f"{path} cannot be run: {error}")
    return Check(name, True, f"{version_in(text) or 'of unknown version'} ({path})")


def _cvmfsexec() -> Check:
    path = shutil.which("cvmfsexec", path=search_path())  # not run: it has no version to tell, and may unpack itself
    advice = "cvmfsexec was not found on PATH: for --cvmfs without cvmfs2, get it from github.com/cvmfs/cvmfsexec"
    return Check("cvmfsexec", path is not None, path or advice)


def version_in(text: str) -> str:
    """The version in what a program says of itself, licences and their addresses left out; "" when there is none."""
    plain = "\n".join(line for line in text.splitlines() if "://" not in line)
    found = re.search(r"\bv?\d+(\.\d+)+\S*|\b20\d\d_\d\d_\d\d\S*", plain)
    return found[0].rstrip(",;)") if found else ""


def _shim(name: str) -> Check:
    try:
        return Check(name, True, find_shim(name))
    except TunnelError as error:
        return Check(name, False, error.message)
