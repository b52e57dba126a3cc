"""Asking something for signs of life for as long as it gives any; when, is `pulse`'s to say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vpn.errors import TunnelError
from vpn.pulse import Pulse


def nobody_knows() -> int | None:
    """How much has come from there, where that is not counted."""
    return None


async def until_silent(
    pulse: Pulse, ask: Callable[[], Awaitable[None]], received: Callable[[], int | None] = nobody_knows
) -> TunnelError:
    """Ask whenever it is due, until it counts as lost: the last reason. ``ask`` raises TunnelError when there is no
    answer, and has a deadline of its own; ``received`` counts the bytes that have come from there.
    """
    loop = asyncio.get_running_loop()
    while True:
        pulse.on_traffic(received(), loop.time())
        if pulse.due > loop.time():
            await asyncio.sleep(pulse.due - loop.time())
            continue
        try:
            await ask()
        except TunnelError as error:
            if pulse.on_silence(loop.time()):
                return error
        else:
            pulse.on_answer(loop.time())
