"""Whole programs in the shape of Work Queue's examples, and factories."""

import logging
import socket
import subprocess
import sys
import textwrap
import time

import pytest

import hpcq
import hpcq.work_queue as wq
from hpcq.batch import records
from hpcq.batch.states import job_states

DEADLINE = 90


def eventually(condition, what):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def program(text, directory, *arguments):
    """Run a program as its user would; its output."""
    file = directory / "program.py"
    file.write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, file, *arguments], cwd=directory, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_compress_files_with_a_program_that_is_sent_along(tmp_path):
    for name in ("a", "b c"):
        (tmp_path / name).write_text(name * 1000)
    said = program(
        """
        from hpcq.work_queue import *
        import shutil, sys

        if __name__ == "__main__":
            q = WorkQueue(port = 0)
            print("listening on port %d..." % q.port)
            workers = Factory("local", manager_host_port="localhost:{}".format(q.port))
            workers.max_workers = workers.min_workers = 1
            workers.start()
            for infile in sys.argv[1:]:
                outfile = "%s.gz" % infile
                t = Task("./gzip < '%s' > '%s'" % (infile, outfile))
                t.specify_file(shutil.which("gzip"), "gzip", WORK_QUEUE_INPUT, cache=True)
                t.specify_file(infile, infile, WORK_QUEUE_INPUT, cache=False)
                t.specify_file(outfile, outfile, WORK_QUEUE_OUTPUT, cache=False)
                taskid = q.submit(t)
                print("submitted task (id# %d): %s" % (taskid, t.command))
            while not q.empty():
                t = q.wait(5)
                if t:
                    print("task (id# %d) complete: %s (return code %d)" % (t.id, t.command, t.return_status))
            print("all tasks complete!")
            sys.exit(0)
        """,
        tmp_path, "a", "b c",
    )  # fmt: skip
    assert "(return code 0)" in said
    assert "all tasks complete!" in said
    for name in ("a", "b c"):
        unpacked = subprocess.run(["gzip", "-dc", tmp_path / f"{name}.gz"], capture_output=True, check=True).stdout
        assert unpacked.decode() == name * 1000


def test_sum_of_function_values(tmp_path):
    said = program(
        """
        import hpcq.work_queue as wq

        def divide(dividend, divisor):
            import math
            return dividend / math.sqrt(divisor)

        def main():
            q = wq.WorkQueue(0, name="sums")
            q.specify_name("sum")
            with wq.Factory(batch_type="local", manager_name="sum") as workers:
                workers.max_workers = 5
                for i in range(1, 16):
                    p_task = wq.PythonTask(divide, 1, i**2)
                    p_task.specify_cores(1)
                    q.submit(p_task)
                sum = 0
                while not q.empty():
                    t = q.wait(5)
                    if t:
                        x = t.output
                        if isinstance(x, wq.PythonTaskNoResult):
                            print("Task {} failed and did not generate a result.".format(t.id))
                        else:
                            sum += x
                print("%.4f" % sum)

        if __name__ == "__main__":
            main()
        """,
        tmp_path,
    )
    assert said.strip() == f"{sum(1 / i for i in range(1, 16)):.4f}"


@pytest.fixture
def queue(tmp_path):
    with wq.WorkQueue(port=0, name="f", shutdown=True) as queue:
        yield queue


def alive(queue):
    jobs = records.load_jobs(queue.hpcq_queue.name)
    states, _ = job_states(jobs)
    return [job.id for job in jobs if not states[job.id].state.is_final]


def test_a_factory_follows_its_limits_and_ends_its_workers(queue):
    factory = wq.Factory("local", manager=queue)
    factory.min_workers = 1
    factory.max_workers = 2
    with factory:
        assert len(alive(queue)) == 1
        with pytest.raises(AttributeError, match="cannot be changed"):
            factory.batch_options = "x"
        with pytest.raises(hpcq.HpcqError, match="no queue here listens on port 1"):
            wq.Factory("local", manager_host_port="localhost:1").start()
        factory.min_workers = 2  # it looks at once
        eventually(lambda: len(alive(queue)) == 2, "a second worker comes")
        assert len(queue.hpcq_queue.wait_for_pilots(2, DEADLINE)) == 2
        queue.specify_num_tasks_left(50)
        factory.start()  # asks it to look again
        factory.min_workers = 0
        queue.specify_num_tasks_left(0)
        factory.timeout = 0
        eventually(lambda: not alive(queue), "idle workers end")
        queue.submit(wq.Task("true"))
        factory.timeout = 300
        assert queue.wait(DEADLINE).result == 0
    eventually(lambda: not alive(queue), "all have ended")


def test_a_factory_of_another_program_finds_the_queue_by_name(queue, tmp_path):
    said = program(
        """
        import hpcq.work_queue as wq
        factory = wq.Factory("local", manager_name="f")
        factory.min_workers = factory.max_workers = 1
        with factory:
            print("started")
        """,
        tmp_path,
    )
    assert said == "started\n"
    eventually(lambda: not alive(queue), "its worker has ended")


def test_workers_are_shut_down_on_request(queue):
    queue.hpcq_queue.submit_pilots(2)
    queue.hpcq_queue.wait_for_pilots(2, DEADLINE)
    assert queue.shutdown_workers(1) == 1
    eventually(lambda: len(alive(queue)) == 1, "one has ended")
    assert queue.shutdown_workers(0) == 1
    eventually(lambda: not alive(queue), "both have ended")


def test_ports(tmp_path, monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(hpcq.HpcqError, match="cannot listen"):
            wq.WorkQueue(port)
        with wq.WorkQueue((port, port + 20)) as queue:
            assert port < queue.port <= port + 20
            monkeypatch.setenv("TCP_LOW_PORT", "0")
            monkeypatch.setenv("TCP_HIGH_PORT", "0")
            wq.specify_port_range(queue.port, queue.port + 20)
            with wq.WorkQueue(0) as other:
                assert queue.port < other.port <= queue.port + 20
    monkeypatch.setenv("WORK_QUEUE_PORT", str(port))
    monkeypatch.setenv("WORK_QUEUE_NAME", "by-variable")
    with wq.WorkQueue(0) as queue:
        assert (queue.port, queue.name) == (port, "by-variable")
    for wrong in ((3, 2), (1, 2, 3), "ab"):
        with pytest.raises((TypeError, ValueError)):
            wq.WorkQueue(wrong)


def test_a_name_may_come_later_and_the_port_stays(tmp_path):
    with wq.WorkQueue(0) as queue:
        port = queue.port
        assert queue.name is None
        queue.specify_name("later")
        assert (queue.name, queue.port, queue.hpcq_queue.name) == ("later", port, "later")
        with pytest.raises(hpcq.UsageError, match="cannot be used"):
            queue.specify_name("not a name!")
        assert (queue.name, queue.port) == ("later", port)


def test_the_debug_log_is_pythons_logging(tmp_path):
    with wq.WorkQueue(0, debug_log=str(tmp_path / "debug.log")):
        logging.getLogger("hpcq.something").debug("in detail")
    wq.cctools_debug_flags_set("clear")
    wq.cctools_debug_config_file(":stderr")
    assert "in detail" in (tmp_path / "debug.log").read_text()
    with pytest.raises(NotImplementedError, match="file_size"):
        wq.cctools_debug_config_file_size(1000)
    handlers = logging.getLogger("hpcq").handlers
    logging.getLogger("hpcq").removeHandler(handlers[-1])
