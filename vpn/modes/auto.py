"""Mode ``auto``: the fastest mode that this host and this gateway allow.

The order is that of one flow's rate and of what a mode costs: ``relay`` (no packets, TCP ends here), ``openconnect``
(any IP protocol), ``socks`` (as fast as relay, but not for every program), ``slirp`` (the node's own way out, in user
space).

A credential is good for one login, so what can be known beforehand is looked at first: the namespace, the tun device,
the nat rule, programs, what the credential offers. A mode that still fails to come up is undone and the next is
tried. What was passed over, and why, is told in ``TunnelInfo.passed_over`` and in the error when nothing is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import replace

import msgspec

from vpn.config import Mode, TunnelConfig
from vpn.errors import TunnelError
from vpn.modes.base import BringUp, Spawner, Tunnel, TunnelInfo
from vpn.modes.slirp import find_stacks
from vpn.namespace import open_namespace
from vpn.process import Client
from vpn.programs import find_program, find_shim
from vpn.surroundings import check_route

log = logging.getLogger("vpn")

ORDER: tuple[Mode, ...] = ("relay", "openconnect", "socks", "slirp")
IN_NAMESPACE: tuple[Mode, ...] = ("relay", "openconnect", "slirp")
ATTEMPT_DEADLINE = 30.0  # seconds one mode may take before the next is tried
_TRIAL_PORT = 1  # nothing listens there: the rule is only to be accepted

Attempt = Callable[[TunnelConfig, BringUp], Awaitable[Tunnel]]


class ChosenTunnel:
    """The tunnel of the mode that came up."""

    def __init__(self, tunnel: Tunnel, passed_over: tuple[str, ...]) -> None:
        self._tunnel = tunnel
        self._passed_over = passed_over

    @property
    def client(self) -> Spawner:
        """The mode's own."""
        return self._tunnel.client

    def info(self) -> TunnelInfo:
        """The mode's own, and what was passed over."""
        info = self._tunnel.info()
        return msgspec.structs.replace(info, passed_over=self._passed_over + info.passed_over)


async def bring_up(config: TunnelConfig, up: BringUp, attempt: Attempt) -> ChosenTunnel:
    """Try the modes in order, each by ``attempt``; raises TunnelError when none comes up."""
    up.step = ("user namespaces", "looking at what this host allows")
    reasons = {**refused_by_settings(config), **await refused_by_host(config, up.keeper)}
    passed_over: list[str] = []
    for mode in ORDER:
        reason = reasons.get(mode)
        if reason is None:
            try:
                tunnel = await _try(replace(config, mode=mode), up, attempt)
            except TunnelError as error:
                reason = str(error)
            else:
                return ChosenTunnel(tunnel, tuple(passed_over))
        passed_over.append(f"{mode} passed over: {reason}")
        log.info("mode auto: %s", passed_over[-1])
    raise TunnelError("tunnel", "no mode comes up here; " + "; ".join(passed_over))


async def _try(config: TunnelConfig, up: BringUp, attempt: Attempt) -> Tunnel:
    """One mode, undone when it fails; when it comes up its undoing and its loss become the session's."""
    async with AsyncExitStack() as stack:
        own = BringUp(up.keeper, stack, up.keeper.loop.create_future(), up.started_at, up.new_session)
        try:
            async with asyncio.timeout(ATTEMPT_DEADLINE):
                tunnel = await attempt(config, own)
        except TimeoutError:
            layer, step = own.step
            raise TunnelError(layer, f"{step} took more than {ATTEMPT_DEADLINE:g} s") from None
        except OSError as error:
            layer, step = own.step
            raise TunnelError(layer, f"{step} failed: {error}") from None
        finally:
            up.step = own.step
        own.lost.add_done_callback(lambda lost: None if lost.cancelled() else up.lose(lost.result()))
        up.troubles += own.troubles
        up.stack.push_async_exit(stack.pop_all())
        return tunnel


def refused_by_settings(config: TunnelConfig) -> dict[Mode, str]:
    """Modes that the credential and the options do not offer, with the reason."""
    found: dict[Mode, str] = {}
    credential = config.credential
    if credential is None:
        why = "no gateway gave a credential; see `hpcq vpn gateway start`"
        found |= {"relay": why, "openconnect": why, "socks": why}
    elif not credential.relay_port:
        why = "the server has no relay: it is another's, or a gateway of an older version"
        found |= {"relay": why, "socks": why}
    elif not credential.port:
        found["openconnect"] = "the gateway does not offer it: ocserv is missing there"
    if config.socks is not None:
        found.pop("socks", None)
    return found


async def refused_by_host(config: TunnelConfig, keeper: Client) -> dict[Mode, str]:
    """Modes that this host does not allow, with the reason; tried in a namespace made for it."""
    found = await _refused_by_kernel(keeper)
    needs: dict[Mode, Iterable[Callable[[], object]]] = {
        "openconnect": (lambda: find_program("openconnect"), lambda: find_shim("tun_from_fd")),
        "socks": (lambda: find_shim("socks"),),
        "slirp": (find_stacks, _check_route),
    }
    for mode, checks in needs.items():
        try:
            for check in checks:
                check()
        except TunnelError as error:
            found.setdefault(mode, str(error))
    return found


async def _refused_by_kernel(keeper: Client) -> dict[Mode, str]:
    try:
        namespace = await open_namespace(keeper)
    except TunnelError as error:
        return dict.fromkeys(IN_NAMESPACE, str(error))
    try:
        os.close(await namespace.open_tun("tun0"))
    except TunnelError as error:
        return dict.fromkeys(IN_NAMESPACE, str(error))
    else:
        try:
            await namespace.redirect("tun0", _TRIAL_PORT, six=False)
        except TunnelError as error:
            return {"relay": str(error)}
        return {}
    finally:
        await namespace.close()


def _check_route() -> None:
    found = check_route()
    if not found.ok:
        raise TunnelError("tunnel", found.detail)
