"""``hpcq bench``: how fast this machine's queue is, measured through the same doors that users go through."""

from __future__ import annotations

import importlib
import socket
from typing import Any

import click

from hpcq import benchmark, benchmark_data, benchmark_jobs, benchmark_pilots, benchmark_scheduler
from hpcq.cli.common import json_option, print_json, verbose_option
from hpcq.cli.submit import settings_of, some_pilot_flags


class _Bench(click.Group):
    """``tunnel`` is the command of the package ``vpn``, imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), "tunnel"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name != "tunnel":
            return super().get_command(ctx, cmd_name)
        command: click.Command = importlib.import_module("vpn.bench.cli").tunnel
        return command


@click.group("bench", cls=_Bench)
def bench() -> None:
    """Measure the queue on this machine, or tunnels."""


@bench.command("tasks")
@click.option("--pilots", type=click.IntRange(1), default=1, show_default=True, help="Local pilots to start.")
@click.option("--cores", type=click.IntRange(1), default=2, show_default=True, help="Cores of each pilot.")
@click.option("-n", "--count", type=click.IntRange(1), default=20000, show_default=True, help="Python tasks to run.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs; the median is told.")
@json_option
@verbose_option
def tasks(pilots: int, cores: int, count: int, repeat: int, as_json: bool) -> None:
    """Python tasks per second, round trip, and shell tasks per second, with local pilots and TLS on.

    The function is inc(x), in a warm interpreter or in a fork for each task; the command is `true`, its exit code and
    output captured. A round trip is one task submitted and waited for, nothing else in the queue. The same calls are
    also made through hpcq.Executor.
    """
    figures = benchmark.measure_tasks(pilots, cores, count, repeat)
    if as_json:
        print_json({"hostname": socket.gethostname(), "pilots": pilots, "cores": cores, **figures})
        return
    click.echo("\n".join(lines(figures)))


@bench.command("queue")
@click.option("--pilots", type=click.IntRange(1), default=1, show_default=True, help="Local pilots to start.")
@click.option("--cores", type=click.IntRange(1), default=2, show_default=True, help="Cores of each pilot.")
@click.option("-n", "--count", type=click.IntRange(1), default=1_000_000, show_default=True, help="Tasks to queue.")
@json_option
@verbose_option
def queue(pilots: int, cores: int, count: int, as_json: bool) -> None:
    """A long queue: Python tasks submitted before a pilot is there, then all run.

    Submits per second, memory for each queued task, tasks per second and the program's CPU time for each.
    """
    figures = benchmark.measure_queue(pilots, cores, count)
    if as_json:
        print_json({"hostname": socket.gethostname(), "pilots": pilots, "cores": cores, **figures})
        return
    cpu = f"{figures['cpu_microseconds']:.0f} us of the program's CPU each"
    before = f"{figures['count']:,} tasks, no pilot yet; {figures['submit_cpu_microseconds']:.0f} us of CPU each"
    click.echo(f"submitted     {figures['submits_per_second']:>8,.0f} /s   {before}")
    click.echo(f"memory        {figures['bytes_per_task']:>8,.0f} bytes for each queued task, all in all")
    click.echo(f"Python tasks  {figures['per_second']:>8,.0f} /s   {cpu}")


@bench.command("pilots")
@click.option("-n", "--count", type=click.IntRange(1), default=1000, show_default=True, help="Pilots to simulate.")
@click.option("--processes", type=click.IntRange(1), default=4, show_default=True, help="Processes that simulate them.")
@json_option
@verbose_option
def pilots(count: int, processes: int, as_json: bool) -> None:
    """Simulated pilots that connect to one manager all at once, over TLS and with the real protocol.

    How long until all serve, the manager's memory and CPU time, its share of a core with nothing to do, and tasks until
    each has worked. The simulated pilots run on this machine too and share its cores.
    """
    figures = benchmark_pilots.measure_pilots(count, min(processes, count))
    if as_json:
        print_json({"hostname": socket.gethostname(), **figures})
        return
    click.echo("\n".join(pilot_lines(figures)))


_job_flags = some_pilot_flags("site", "batch", "partition", "account", "qos", "constraint", "options", "walltime")


@bench.command("start")
@_job_flags
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Jobs, one after the other.")
@json_option
@verbose_option
def start(repeat: int, as_json: bool, **values: Any) -> None:
    """From the start of a batch job to that of its first task, which waits for it; without a tunnel.

    It counts from the first line of the job's script: what the batch system takes before is its own.
    """
    batch, _, options = settings_of(values)
    figures = benchmark_jobs.measure_start(batch, repeat, options)
    if as_json:
        print_json({"hostname": socket.gethostname(), "batch": batch, **figures})
        return
    between = f"{figures['fastest']:.2f} to {figures['slowest']:.2f} s"
    click.echo(f"first task    {figures['median']:>8.2f} s    after the job's start; median of {repeat} ({between})")


@bench.command("poll")
@_job_flags
@click.option("-n", "--count", "jobs", type=click.IntRange(2), default=1000, show_default=True, help="Jobs, all held.")
@json_option
@verbose_option
def poll(jobs: int, as_json: bool, **values: Any) -> None:
    """CPU time of asking the batch system about many jobs at once. Submits them, held, and cancels them."""
    batch, _, options = settings_of(values)
    figures = benchmark_jobs.measure_poll(batch, jobs, options)
    if as_json:
        print_json({"hostname": socket.gethostname(), "batch": batch, **figures})
        return
    command = f"and the batch system's command {figures['command_cpu_seconds']:.3f} s"
    click.echo(f"submitted     {figures['submit_seconds']:>8.3f} s    {jobs:,} jobs")
    click.echo(
        f"one poll      {figures['cpu_seconds']:>8.3f} s    of our CPU, {command}; median of {benchmark_jobs.POLLS}"
    )


@bench.command("ends")
@click.option("-n", "--count", type=click.IntRange(1), default=100, show_default=True, help="Walltimes that end.")
@click.option("--at-once", type=click.IntRange(1), default=10, show_default=True, help="Local pilots at a time.")
@json_option
@verbose_option
def ends(count: int, at_once: int, as_json: bool) -> None:
    """Walltimes of local pilots that end while tasks run: fails if a result is lost, wrong or there twice."""
    figures = benchmark_jobs.measure_ends(count, at_once)
    if as_json:
        print_json({"hostname": socket.gethostname(), **figures})
        return
    cut = f"{figures['cut_short']:,} of them ran more than once"
    click.echo(f"{count} ends of walltimes: {figures['tasks']:,} tasks, {cut}; no result lost, none doubled")


@bench.command("scheduler")
@json_option
@verbose_option
def scheduler(as_json: bool) -> None:
    """Cost of the scheduler alone, simulated: 10,000 pilots and 1,000,000 tasks against 100 and 10,000; memory.

    Takes a minute or two, and about 1 GB of memory.
    """
    figures = {"bytes_per_task": benchmark_scheduler.measure_memory(), **benchmark_scheduler.measure()}
    if as_json:
        print_json({"hostname": socket.gethostname(), **figures})
        return
    for run in figures["runs"]:
        click.echo(
            f"{run['pilots']:>6,} pilots {run['tasks']:>9,} tasks  {run['microseconds']:>6.1f} us for each of "
            f"{run['events']:,} events"
        )
    click.echo(f"ratio  {figures['ratio']:.2f}")
    click.echo(f"memory {figures['bytes_per_task']:.0f} bytes for each queued Python task, all in all")


@bench.command("data")
@click.option("--megabytes", type=click.IntRange(2), default=1024, show_default=True, help="Size of the argument.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs; the medians are told.")
@json_option
@verbose_option
def data(megabytes: int, repeat: int, as_json: bool) -> None:
    """A large argument to a local pilot and back, against what TLS moves between two processes of this machine.

    Both are measured in turns. Takes four times the size in memory.
    """
    figures = benchmark_data.measure_data(megabytes, repeat)
    if as_json:
        print_json({"hostname": socket.gethostname(), **figures})
        return
    for run in [*figures["runs"], figures]:
        click.echo(
            f"{'median' if run is figures else '':6}  TLS {run['tls']:>6,.0f} MB/s   round trip of {megabytes:,} MiB "
            f"{run['round_trip']:>6,.0f} MB/s both ways   ratio {run['ratio']:.2f}"
        )


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for people."""
    names = ("python", "round_trip", "executor", "fork", "shell")
    python, trip, calls, fork, shell = (figures[name] for name in names)
    return [
        f"Python tasks  {python['per_second']:>8,.0f} /s   median of {python['runs']} runs of {python['count']:,} "
        f"({python['slowest']:,.0f} to {python['fastest']:,.0f})",
        f"submitted     {python['submits_per_second']:>8,.0f} /s",
        f"round trip    {trip['p50_ms']:>8.2f} ms   median of {trip['count']:,}; 99 % within {trip['p99_ms']:.2f} ms",
        f"Executor      {calls['per_second']:>8,.0f} /s   median of {calls['runs']} runs of {calls['count']:,} "
        f"({calls['slowest']:,.0f} to {calls['fastest']:,.0f})",
        f"fork tasks    {fork['per_second']:>8,.0f} /s   median of {fork['runs']} runs of {fork['count']:,}",
        f"shell tasks   {shell['per_second']:>8,.0f} /s   median of {shell['runs']} runs of {shell['count']:,}",
    ]


def pilot_lines(figures: dict[str, Any]) -> list[str]:
    """The figures of many pilots for people."""
    cpu = f"CPU: manager {figures['manager_cpu_seconds']:.2f} s, they {figures['simulators_cpu_seconds']:.2f} s"
    return [
        f"all serving   {figures['seconds_until_all_serve']:>8.2f} s    {figures['pilots']:,} pilots at once; {cpu}",
        f"memory        {figures['memory_connected']:>8.0f} MB   manager; before {figures['memory_before']:.0f} MB",
        f"idle          {100 * figures['idle_core_share']:>8.2f} %    of a core",
        f"tasks         {figures['tasks_per_second']:>8,.0f} /s   {figures['tasks']:,} of them; "
        f"{figures['pilots_that_worked']:,} pilots worked; then {figures['memory_after_tasks']:.0f} MB",
    ]
