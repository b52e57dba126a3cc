"""Have ``vpn.probes`` run where programs run, and take its results."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from vpn.pipes import read_lines
from vpn.probes import ProbeResult, check_target
from vpn.process import Process, python_argv

PROBE_START = 10.0  # seconds a probe's Python may take to start, on top of the probe's own time


async def ask(
    spawn: Callable[..., Awaitable[Process]], targets: Sequence[str], timeout: float = 20.0
) -> list[ProbeResult]:
    """Ask each target with a program started by ``spawn``; results in their order.

    ``timeout`` is for each, in seconds; they run together.
    """
    for target in targets:
        check_target(target)
    found: dict[str, ProbeResult] = {}
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        argv = python_argv("vpn.probes", str(timeout), *targets)
        process = await spawn(argv, cwd="/", stdin=null, stdout=writer, stderr=null)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
        os.close(null)
    try:
        async with asyncio.timeout(timeout + PROBE_START):
            async for line in read_lines(reader):
                result = msgspec.json.decode(line, type=ProbeResult)
                found[result.target] = result
    except TimeoutError:
        pass
    finally:
        await process.end(grace=0)
    return [
        found.get(target) or ProbeResult(target, False, "tunnel", "the probe did not finish", timeout)
        for target in targets
    ]
