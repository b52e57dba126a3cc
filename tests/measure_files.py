"""Measures files by hand: ``python tests/measure_files.py memory [MB]`` and ``python tests/measure_files.py peers``.

``memory``: one large file in and out again, and how much memory manager and pilot take more than before.
``peers``: 20 pilots, each with a cache of its own as if on a node of its own, need one 500 MB file.
"""

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

import hpcq


def pilots_of(queue, count):
    while sum(view.state == "ready" for view in queue.pilots()) < count:
        time.sleep(0.1)
    found = [p for p in psutil.Process().children(recursive=True) if "--connection" in p.cmdline()]
    return found or [p for p in psutil.process_iter() if p.status() != "zombie" and "hpcq.pilot" in p.cmdline()]


def memory(directory, megabytes):
    size = megabytes << 20
    with (directory / "big").open("wb") as file:
        file.truncate(size)
    with hpcq.Queue() as queue:
        queue.submit_pilots(1, batch="local", cores=1, scratch=str(directory))
        queue.submit(hpcq.Task("true", inputs={"a": hpcq.Buffer("x")}, outputs={"a": directory / "a"}))
        queue.wait()
        mine = [p for p in pilots_of(queue, 1) if str(directory) in p.cmdline()]
        sides = [psutil.Process(), mine[0]]
        before = [side.memory_info().rss for side in sides]
        peaks, stop = list(before), threading.Event()

        def watch():
            while not stop.wait(0.05):
                for index, side in enumerate(sides):
                    peaks[index] = max(peaks[index], side.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        source = hpcq.File(directory / "big", cache=False)
        for name, task in {
            "in": hpcq.Task("true", inputs={"i": source}),
            "out": hpcq.Task(f"truncate -s {size} o", outputs={"o": directory / "o"}),
        }.items():
            began = time.monotonic()
            queue.submit(task)
            queue.wait()
            seconds = time.monotonic() - began
            print(f"{name}: {task.outcome} {task.message} {megabytes / seconds:.0f} MB/s")
        stop.set()
        watcher.join()
        growth = [(peak - first) >> 20 for peak, first in zip(peaks, before, strict=True)]
        print(f"{megabytes} MB each way: manager and pilot grew by {growth} MB")


def peers(directory, count=20, megabytes=500):
    with (directory / "big").open("wb") as file:
        file.truncate(megabytes << 20)
    with hpcq.Queue() as queue:
        for number in range(count):
            (directory / f"node{number}").mkdir()
            queue.submit_pilots(1, batch="local", cores=1, scratch=str(directory / f"node{number}"))
        pilots_of(queue, count)
        began = time.monotonic()
        source = hpcq.File(directory / "big", link=True)
        tasks = [hpcq.Task("sleep 5", inputs={"i": source}) for _ in range(count)]
        for task in tasks:
            queue.submit(task)
        for _ in tasks:
            task = queue.wait()
            if task.outcome != "success":
                print(task, task.message)
        seconds = time.monotonic() - began
        given = queue._manager.call(lambda: dict(queue._manager.files._desk.holders.given))
        used = len({task.pilot for task in tasks})
        print(
            f"{used} pilots had {megabytes} MB after {seconds:.0f} s; the manager gave it {sum(given.values())} times"
        )


if __name__ == "__main__":
    where = Path(tempfile.mkdtemp(prefix="hpcq-measure-"))
    try:
        if sys.argv[1:2] == ["peers"]:
            peers(where)
        else:
            memory(where, int(sys.argv[2]) if len(sys.argv) > 2 else 5120)
    finally:
        shutil.rmtree(where, ignore_errors=True)
