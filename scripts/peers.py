"""Other systems on the work that ``hpcq bench tasks`` measures: one each run, its figures as JSON on the last line.

Usage: ``python peers.py NAME COUNT WORKERS``. Each starts the system on this machine with so many workers of one core,
warms it up, then times ``COUNT`` calls of ``inc(x)``, `TRIPS` round trips and, where it has commands, ``COUNT / 10``
times ``true``. Imports are inside the functions: each runs in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

WARM_UP = 50
TRIPS = 200


def inc(x: int) -> int:
    """The smallest function worth calling."""
    return x + 1


def rate(work: Callable[[int], None], count: int) -> float:
    """Tasks per second."""
    began = time.perf_counter()
    work(count)
    return count / (time.perf_counter() - began)


def round_trip(one: Callable[[int], Any], count: int = TRIPS) -> float:
    """The median in milliseconds."""
    trips = []
    for number in range(count):
        began = time.perf_counter()
        one(number)
        trips.append(1000 * (time.perf_counter() - began))
    return statistics.median(trips)


def futures(submit: Callable[[int], Any], count: int) -> dict[str, float]:
    """Of a system whose ``submit`` gives a future."""

    def run(number: int) -> None:
        total = sum(future.result() for future in [submit(x) for x in range(number)])
        assert total == number * (number + 1) // 2, total

    run(WARM_UP)
    return {"python": rate(run, count), "round_trip_ms": round_trip(lambda number: submit(number).result())}


def process_pool(count: int, workers: int) -> dict[str, float]:
    from concurrent.futures import ProcessPoolExecutor  # noqa: PLC0415

    with ProcessPoolExecutor(workers) as pool:
        return futures(lambda x: pool.submit(inc, x), count)


def distributed(count: int, workers: int) -> dict[str, float]:
    from distributed import Client, LocalCluster  # noqa: PLC0415

    cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster) as client:
        many = futures(lambda x: client.submit(inc, x, pure=False), WARM_UP)

        def run(number: int) -> None:  # its own way for many: one message
            assert sum(client.gather(client.map(inc, range(number), pure=False))) == number * (number + 1) // 2

        return {**many, "python": rate(run, count)}


def parsl(count: int, workers: int) -> dict[str, float]:
    import parsl as parsl_  # noqa: PLC0415
    from parsl.config import Config  # noqa: PLC0415
    from parsl.executors import HighThroughputExecutor  # noqa: PLC0415
    from parsl.providers import LocalProvider  # noqa: PLC0415

    provider = LocalProvider(init_blocks=1, max_blocks=1)
    executor = HighThroughputExecutor(
        max_workers_per_node=workers, encrypted=True, address="127.0.0.1", provider=provider
    )
    parsl_.load(Config(usage_tracking=0, executors=[executor]))
    try:

        @parsl_.bash_app
        def command() -> str:
            return "true"

        def shell(number: int) -> None:
            for future in [command() for _ in range(number)]:
                assert future.result() == 0

        figures = futures(parsl_.python_app(inc), count)
        shell(workers)
        return {**figures, "shell": rate(shell, count // 10)}
    finally:
        parsl_.dfk().cleanup()


def executorlib(count: int, workers: int) -> dict[str, float]:
    from executorlib import SingleNodeExecutor  # noqa: PLC0415

    with SingleNodeExecutor(max_workers=workers, block_allocation=True) as pool:
        return futures(lambda x: pool.submit(inc, x), count)


def ray(count: int, workers: int) -> dict[str, float]:
    import logging  # noqa: PLC0415

    import ray as ray_  # noqa: PLC0415

    ray_.init(num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    remote = ray_.remote(inc)

    def run(number: int) -> None:
        assert sum(ray_.get([remote.remote(x) for x in range(number)])) == number * (number + 1) // 2

    run(WARM_UP)
    return {"python": rate(run, count), "round_trip_ms": round_trip(lambda x: ray_.get(remote.remote(x)))}


def hyperqueue(count: int, workers: int) -> dict[str, float]:
    from hyperqueue import Job, LocalCluster  # noqa: PLC0415
    from hyperqueue.cluster import WorkerConfig  # noqa: PLC0415

    with LocalCluster() as cluster:
        cluster.start_worker(WorkerConfig(cores=workers))
        client = cluster.client()

        def shell(number: int) -> None:
            job = Job()
            for _ in range(number):
                job.program(["true"], stdout=None, stderr=None)
            client.wait_for_jobs([client.submit(job)])

        def python(number: int) -> None:
            job = Job()
            for x in range(number):
                job.function(inc, args=(x,))
            client.wait_for_jobs([client.submit(job)])

        shell(workers)
        python(workers)
        return {"python": rate(python, max(1, count // 100)), "shell": rate(shell, count // 10)}


@contextlib.contextmanager
def worker_of(command: str, port: int, workers: int) -> Iterator[None]:
    """A worker of cctools' systems."""
    sizes = ["--cores", str(workers), "--memory", "2000", "--disk", "4000"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    worker = subprocess.Popen([command, "localhost", str(port), *sizes], **quiet)  # type: ignore[call-overload]
    try:
        yield
    finally:
        worker.kill()
        worker.wait()


def cctools(manager: Any, python: Callable[[int], Any], command: Callable[[], Any], count: int) -> dict[str, float]:
    """Of Work Queue and TaskVine, whose managers are alike."""

    def run(tasks: Callable[[int], Any], number: int) -> None:
        for x in range(number):
            manager.submit(tasks(x))
        while not manager.empty():
            task = manager.wait(5)
            assert task is None or task.result in (0, "success"), task.result

    run(python, 4)
    few = max(4, count // 50)
    return {
        "python": rate(lambda number: run(python, number), few),
        "round_trip_ms": round_trip(lambda x: run(lambda _: python(x), 1), 10),
        "shell": rate(lambda number: run(lambda _: command(), number), count // 10),
    }


def taskvine(count: int, workers: int) -> dict[str, float]:
    import ndcctools.taskvine as vine  # noqa: PLC0415

    manager = vine.Manager(port=0)
    with worker_of("vine_worker", manager.port, workers):
        library = manager.create_library_from_functions("library", inc, add_env=False)
        library.set_function_slots(workers)
        library.set_cores(workers)
        manager.install_library(library)
        return cctools(manager, lambda x: vine.FunctionCall("library", "inc", x), lambda: vine.Task("true"), count)


def work_queue(count: int, workers: int) -> dict[str, float]:
    try:
        import ndcctools.work_queue as wq  # noqa: PLC0415
    except ImportError:
        import work_queue as wq  # noqa: PLC0415

    def small(task: Any) -> Any:
        task.specify_cores(1)
        task.specify_memory(10)
        task.specify_disk(10)
        return task

    queue = wq.WorkQueue(port=0)
    with worker_of("work_queue_worker", queue.port, workers):
        return cctools(queue, lambda x: small(wq.PythonTask(inc, x)), lambda: small(wq.Task("true")), count)


PEERS: dict[str, Callable[[int, int], dict[str, float]]] = {
    "process_pool": process_pool,
    "distributed": distributed,
    "parsl": parsl,
    "executorlib": executorlib,
    "ray": ray,
    "hyperqueue": hyperqueue,
    "taskvine": taskvine,
    "work_queue": work_queue,
}

if __name__ == "__main__":
    figures = PEERS[sys.argv[1]](int(sys.argv[2]), int(sys.argv[3]))
    print("\n" + json.dumps(figures))
