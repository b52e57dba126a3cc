"""Pilots as batch jobs: how soon a job that starts runs its first task, what asking about a thousand jobs costs, and
whether anything is lost or done twice when walltimes end with tasks running.

The first two go through any batch system; the last uses processes of this host.
"""

from __future__ import annotations

import random
import re
import resource
import statistics
import time
from collections.abc import Mapping
from typing import Any

from hpcq.batch.base import BatchJob, get_batch_system
from hpcq.batch.request import pilot_request
from hpcq.batch.tracker import JobTracker
from hpcq.benchmark_function import work
from hpcq.errors import HpcqError, UsageError
from hpcq.queue import Queue
from hpcq.task import PythonTask

START_TIMEOUT = 600.0
"""Seconds a job may wait in the batch system."""
OUTPUT_TIMEOUT = 60.0
"""Seconds until a job's output must be readable here."""
HELD = {"slurm": "--hold", "pbs": "-h", "torque": "-h"}
"""What keeps jobs from starting, by batch system."""
POLLS = 5
DRAIN = 0.2
"""Seconds that running tasks get at the end of a walltime: most do not make it."""
ALIVE = 3
"""Seconds for which those pilots take tasks."""
MARGIN = 15
"""Seconds before the end of a walltime by which a pilot is gone (`hpcq.pilot.main`)."""
CORES = 2
SECONDS = (0.05, 0.3, 1.5, 2.5)
"""What tasks take."""
TASKS = 12
"""For each of those pilots: more than it can do."""
END_TIMEOUT = 300.0

_STARTED = re.compile(r"hpcq-job-started (\d+\.\d+)")


def measure_start(batch: str, repeat: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds from the first line of a job's script to the start of its first task, ``repeat`` times.

    Raises:
        HpcqError: a job did not run its task in time.
    """
    seconds = [_first_task(batch, options) for _ in range(repeat)]
    return {"seconds": seconds, "median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


def _first_task(batch: str, options: Mapping[str, Any]) -> float:
    """One job of a queue of its own, with a task that waits for it. Both times are of the clock of the job's host."""
    with Queue() as queue:
        queue.submit(PythonTask(work, 0.0))
        setup = ["date '+hpcq-job-started %s.%N'", *options.get("setup", ())]
        [job] = queue.submit_pilots(1, batch=batch, **{**options, "setup": setup})
        task = queue.wait(START_TIMEOUT)
        if task is None or task.started_at is None:
            raise HpcqError(f"job {job.id} has not run a task within {START_TIMEOUT:.0f} s: {task or queue.stats}")
        return float(task.started_at) - _job_start(job)


def _job_start(job: BatchJob) -> float:
    deadline = time.monotonic() + OUTPUT_TIMEOUT
    while True:
        text = job.output.read_text(errors="replace") if job.output.exists() else ""
        if found := _STARTED.search(text):
            return float(found[1])
        if time.monotonic() > deadline:
            raise HpcqError(f"the output of job {job.id} cannot be read here: {job.output}")
        time.sleep(0.1)  # written on another host: nobody tells


def measure_poll(batch: str, count: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """CPU seconds of asking about ``count`` held jobs at once: ours, and those of the batch system's command.

    Raises:
        UsageError: a batch system that cannot hold jobs.
        BatchError: it refused.
    """
    if batch not in HELD:
        raise UsageError(f"--batch {batch} has no jobs that wait; name one of {', '.join(HELD)}")
    with Queue() as queue:
        system, held = get_batch_system(batch), [HELD[batch], *options.get("options", ())]
        request = pilot_request(queue.name, batch, count, {**options, "options": held})
        began = time.monotonic()
        jobs = system.submit(request)
        submitted = time.monotonic() - began
        try:
            polls = [_poll(batch, jobs) for _ in range(POLLS)]
        finally:
            system.cancel(jobs)
        own, command = (statistics.median(times) for times in zip(*polls, strict=True))
        return {"jobs": count, "submit_seconds": submitted, "cpu_seconds": own, "command_cpu_seconds": command}


def _poll(batch: str, jobs: list[BatchJob]) -> tuple[float, float]:
    tracker = JobTracker()
    for job in jobs:
        tracker.submitted(job, 0.0)
    before = _cpu()
    statuses = get_batch_system(batch).status(tracker.jobs_to_ask())
    tracker.polled(statuses, 0.0)
    own, children = (after - earlier for after, earlier in zip(_cpu(), before, strict=True))
    unknown = sum(not status.is_listed for status in statuses.values())
    if unknown:
        raise HpcqError(f"{unknown} of {len(jobs)} jobs are not listed")
    return own, children


def _cpu() -> tuple[float, float]:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (used.ru_utime + used.ru_stime for used in both)
    return own, children


def measure_ends(count: int, at_once: int) -> dict[str, Any]:
    """Let the walltimes of ``count`` local pilots end, ``at_once`` at a time, while they have more tasks than they can
    do; then have the rest done.

    Raises:
        HpcqError: a task had no result, two, a wrong one, or none in time.
    """
    chance, results = random.Random(20), []  # noqa: S311 - no secret
    with Queue() as queue:
        numbers = {queue.submit(_task(chance)) for _ in range(TASKS * count)}
        ended = 0
        while ended < count:
            wave = min(at_once, count - ended)
            options = {"cores": CORES, "walltime": ALIVE + 1 + MARGIN, "drain_timeout": DRAIN}
            queue.submit_pilots(wave, batch="local", **options)
            ended += wave
            deadline = time.monotonic() + END_TIMEOUT
            while sum(pilot.state == "gone" for pilot in queue.pilots()) < ended:
                if (task := queue.wait(0.2)) is not None:
                    results.append(task)
                if time.monotonic() > deadline:
                    raise HpcqError(f"pilots do not end: {queue.stats}")
        queue.submit_pilots(1, batch="local", cores=8 * CORES)  # the rest, which sleeps
        while not queue.empty():
            if (task := queue.wait(END_TIMEOUT)) is None:
                raise HpcqError(f"tasks have no result: {queue.stats}")
            results.append(task)
    wrong = [task for task in results if task.outcome != "success" or task.output not in SECONDS]
    ids = [task.id for task in results]
    if wrong or len(ids) != len(set(ids)) or set(ids) != numbers:
        raise HpcqError(f"{len(numbers)} tasks, {len(ids)} results, {len(set(ids))} different ones; wrong: {wrong[:3]}")
    cut = sum(task.attempts > 1 for task in results)
    return {"ends": count, "tasks": len(ids), "cut_short": cut, "lost": 0, "doubled": 0}


def _task(chance: random.Random) -> PythonTask:
    task = PythonTask(work, chance.choice(SECONDS))
    task.set(retries=1000)
    return task
