"""Why a pilot ends, and what hurries it."""

import asyncio
import math

from hpcq.pilot.ending import SAME_SIGNAL, WALLTIME_MARGIN, Ending


def after(seconds: float, ending: Ending) -> None:
    """Let the last signal be so long ago."""
    ending._signalled_at -= seconds


def test_the_batch_systems_warning_of_the_walltimes_end_does_not_hurry():
    async def live() -> None:
        ending = Ending(asyncio.get_running_loop().time() + 20 + WALLTIME_MARGIN, drain=20)
        ending.watch_walltime()
        assert (await ending.decided).reason == "its walltime ends"
        ending.signalled("SIGTERM")
        ending.signalled("SIGTERM")  # passed on by the job's script
        assert not ending.hurry.is_set()
        after(2 * SAME_SIGNAL, ending)
        ending.signalled("SIGTERM")
        assert ending.hurry.is_set()

    asyncio.run(live())


def test_a_second_signal_hurries():
    async def live() -> None:
        ending = Ending(math.inf, drain=20)
        ending.signalled("SIGTERM")
        ending.signalled("SIGTERM")
        assert not ending.hurry.is_set()
        after(2 * SAME_SIGNAL, ending)
        ending.signalled("SIGTERM")
        assert ending.hurry.is_set()
        assert (await ending.decided).reason == "it got SIGTERM"

    asyncio.run(live())
