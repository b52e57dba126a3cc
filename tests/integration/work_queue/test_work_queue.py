"""`hpcq.work_queue` with a real worker: results, files, times, cancels, categories."""

import gc
import os
import time
import weakref
from pathlib import Path

import pytest

import hpcq
import hpcq.work_queue as wq

DEADLINE = 90


def run(q, *tasks):
    """Submit and wait for all; by number."""
    numbers = [q.submit(task) for task in tasks]
    done = {}
    while len(done) < len(numbers):
        task = q.wait(DEADLINE)
        assert task is not None
        done[task.id] = task
    assert [done[number] for number in numbers] == list(tasks)
    return tasks[0] if len(tasks) == 1 else tasks


def test_a_command_with_its_output_and_status(q):
    task = run(q, wq.Task("echo to stdout; echo to stderr >&2; exit 3"))
    assert (task.result, task.result_str, task.return_status) == (wq.WORK_QUEUE_RESULT_SUCCESS, "SUCCESS", 3)
    assert task.output == task.std_output == "to stdout\nto stderr\n"
    assert task.hostname == os.uname().nodename
    assert task.submit_time / 1e6 == pytest.approx(time.time(), abs=DEADLINE)
    assert task.execute_cmd_start <= task.execute_cmd_finish == task.finish_time
    assert task.total_submissions == 1


@pytest.mark.parametrize(
    ("command", "status"),
    [("./notacommand", 127), ("echo a > f; ./f", 126), ("kill -9 $$", 137), ("trap 'exit 7' EXIT; false", 7)],
)
@pytest.mark.parametrize("with_output", [False, True])
def test_exit_statuses_are_the_shells(q, command, status, with_output):
    task = wq.Task(f"echo x > out; {command}")
    if with_output:
        task.specify_output_file("out")
    run(q, task)
    assert (task.result, task.return_status) == (wq.WORK_QUEUE_RESULT_SUCCESS, status)
    assert Path("out").exists() == with_output


def test_a_queue_ends_with_its_last_user():
    gc.disable()
    try:
        queue = wq.WorkQueue(0)
        inner, reference = queue.hpcq_queue, weakref.ref(queue)
        del queue
        assert reference() is None
        with pytest.raises(hpcq.HpcqError):
            inner.submit(hpcq.Task("true"))
    finally:
        gc.enable()


def test_outputs_of_a_failed_task_come_back_and_missing_ones_are_named(q):
    task = wq.Task(
        "mkdir d; echo 1 > d/one; echo 2 > two; ln -s two link; echo f > on_fail; echo s > on_success; exit 1"
    )
    task.specify_directory("here/d", "d", wq.WORK_QUEUE_OUTPUT)
    task.specify_output_file("here/two", "two")
    task.specify_output_file("link")
    task.specify_output_file("on_fail", flags=wq.WORK_QUEUE_FAILURE_ONLY)
    task.specify_output_file("on_success", flags=wq.WORK_QUEUE_SUCCESS_ONLY)
    run(q, task)
    assert (task.result_str, task.return_status) == ("SUCCESS", 1)
    assert Path("here/d/one").read_text() == "1\n"
    assert Path("on_fail").read_text() == "f\n"
    assert Path("link").read_text() == "2\n"
    assert not Path("on_success").exists()
    task.specify_output_file("nothing")
    run(q, task)  # the same task again
    assert (task.result_str, task.return_status) == ("OUTPUT_MISS", 1)
    assert task.message == "outputs are missing: nothing"
    assert Path("here/two").read_text() == "2\n"


def test_an_output_that_has_no_place_is_told(q):
    Path("taken").mkdir()
    task = wq.Task("echo 1 > taken")
    task.specify_output_file("taken")
    run(q, task)
    assert task.result == wq.WORK_QUEUE_RESULT_OUTPUT_TRANSFER_ERROR
    assert "taken" in task.message


def test_inputs_of_every_kind(q):
    Path("in.txt").write_text("0123456789")
    Path("tree/sub").mkdir(parents=True)
    Path("tree/sub/leaf").write_text("leaf")
    task = wq.Task("cat in.txt piece buf made tree/sub/leaf; test -d empty && echo . $WORK_QUEUE_SANDBOX = $PWD")
    task.specify_input_file("in.txt", cache=True)
    task.specify_file_piece("in.txt", "piece", 3, 5)
    task.specify_buffer(b"<buffer>", "buf")
    task.specify_file_command("echo -n made > %%", "made", cache=True)
    task.specify_directory("tree", recursive=True)
    task.specify_directory(None, "empty")
    run(q, task)
    contents, _, places = task.output.partition(".")
    assert contents == "0123456789345<buffer>madeleaf"
    assert places.split("=")[0].strip() == places.split("=")[1].strip()


def test_a_missing_input_is_told(q):
    task = wq.Task("cat no.txt")
    task.specify_input_file("no.txt")
    broken = wq.Task("cat made")
    broken.specify_file_command("false # %%", "made")
    run(q, task, broken)
    assert (task.result_str, task.return_status) == ("INPUT_MISS", -1)
    assert "no.txt" in task.message
    assert broken.result == wq.WORK_QUEUE_RESULT_INPUT_MISSING


def test_environment_variables_are_set_and_unset(q):
    task = wq.Task("echo $A $CORES ${HOME-none}")
    call = wq.PythonTask(lambda: (os.environ.get("A"), "HOME" in os.environ))
    for one in (task, call):
        one.specify_environment_variable("A", "b c")
        one.specify_environment_variable("HOME")
        one.specify_cores(1)
    run(q, task, call)
    assert task.output == "b c 1 none\n"
    assert call.output == ("b c", False)
    assert run(q, wq.PythonTask(lambda: "HOME" in os.environ)).output  # it is back for the next one


def reciprocal(x):
    print("called with", x)
    return 1 / x


def test_functions_return_values_or_exception_objects(q):
    good, bad = run(q, wq.PythonTask(reciprocal, 4), wq.PythonTask(reciprocal, x=0))
    assert (good.output, good.std_output, good.return_status) == (0.25, "called with 4\n", 0)
    assert isinstance(bad.output, ZeroDivisionError)
    assert "in reciprocal" in str(bad.output.__cause__)
    assert (bad.result_str, bad.return_status) == ("SUCCESS", 0)


def test_functions_that_give_no_result(q):
    crash = wq.PythonTask(os._exit, 3)
    slow = wq.PythonTask(time.sleep, 600)
    slow.specify_running_time_max(1)
    odd = wq.PythonTask(lambda: (x for x in ()))
    run(q, crash, slow, odd)
    assert [one.result_str for one in (crash, slow, odd)] == ["SIGNAL", "MAX_WALL_TIME", "OUTPUT_MISS"]
    assert all(isinstance(one.output, wq.PythonTaskNoResult) for one in (crash, slow, odd))
    assert slow.return_status == 9


def test_functions_bring_their_outputs_also_when_they_raise(q):
    def write(fail):
        Path("out").write_text("written")
        if fail:
            raise KeyError("after")

    tasks = []
    for fail in (False, True):
        task = wq.PythonTask(write, fail)
        task.specify_output_file(f"out-{fail}", "out")
        tasks.append(task)
    good, bad = run(q, *tasks)
    assert (good.output, good.result_str) == (None, "SUCCESS")
    assert isinstance(bad.output, KeyError)
    assert "raise KeyError" in str(bad.output.__cause__)
    assert Path("out-False").read_text() == Path("out-True").read_text() == "written"


def test_too_much_memory_is_resource_exhaustion(q):
    task = wq.PythonTask(lambda: (bytearray(os.urandom(4096) * (150 * 256)), time.sleep(600)))
    task.specify_memory(100)
    run(q, task)
    assert task.result == wq.WORK_QUEUE_RESULT_RESOURCE_EXHAUSTION
    assert task.limits_exceeded.memory == task.resources_measured.memory > 100
    assert task.resources_allocated.memory == task.resources_requested.memory == 100


def test_end_and_start_times_are_kept(q):
    late = wq.Task("date +%s%N")
    late.specify_start_time_min((time.time() + 1.5) * 1e6)
    over = wq.Task("sleep 600")
    over.specify_end_time((time.time() + 1) * 1e6)
    never = wq.Task("true")
    never.specify_start_time_min((time.time() + 600) * 1e6)
    never.specify_end_time((time.time() + 0.5) * 1e6)
    run(q, late, over, never)
    assert int(late.output) / 1e3 >= late._start_time_min * 1e6 - 1e3
    for one in (over, never):
        assert (one.result_str, one.return_status) == ("END_TIME", 9)


def test_tags_are_waited_for_in_any_order(q):
    for tag in "123456789":
        task = wq.Task(f"echo {tag}")
        task.specify_tag(tag)
        q.submit(task)
    order = list("759638214")
    assert [q.wait_for_tag(tag, DEADLINE).output.strip() for tag in order] == order
    assert q.wait_for_tag("1", 0) is None
    assert q.empty()
    assert q.wait(5) is None  # at once


def test_cancelled_tasks_leave_the_queue_at_once(q):
    running, waiting = wq.Task("sleep 600"), wq.Task("true")
    running.specify_cores(2)
    waiting.specify_tag("w")
    waiting.specify_start_time_min((time.time() + 600) * 1e6)
    q.submit(running)
    q.submit(waiting)
    assert q.task_state(running.id) in (wq.WORK_QUEUE_TASK_READY, wq.WORK_QUEUE_TASK_RUNNING)
    assert q.cancel_by_taskid(running.id) is running
    assert q.cancel_by_tasktag("w") is waiting
    assert q.cancel_by_taskid(running.id) is None
    assert q.cancel_by_tasktag("w") is None
    assert q.empty()
    assert q.wait(DEADLINE) is None
    running.specify_command("echo again")
    assert run(q, running).output == "again\n"  # its first run was ended, and nobody saw it
    kinds = [wq.Task("sleep 600") for _ in range(3)]
    for task in kinds:
        task.specify_category("kind")
        q.submit(task)
    assert q.cancel_by_category("kind") == kinds
    assert q.stats_category("kind").tasks_cancelled == 3


def test_a_task_is_in_the_queue_once(q):
    task = wq.Task("sleep 600")
    q.submit(task)
    with pytest.raises(ValueError, match="in the queue already"):
        q.submit(task)
    copy = task.clone()
    q.submit(copy)
    assert copy.id != task.id
    with pytest.raises(TypeError):
        q.submit(hpcq.Task("true"))


def test_a_category_runs_no_more_at_once_than_it_may(q):
    q.specify_category_max_concurrent("narrow", 1)
    log = Path("log").absolute()
    for number in range(4):
        task = wq.Task(f"echo + >> {log}; sleep 0.1; echo - >> {log}")
        task.specify_category("narrow")
        task.specify_tag(str(number))
        q.submit(task)
    assert q.wait_for_tag("3", DEADLINE).result == 0  # others end meanwhile and let it in
    assert log.read_text().split() == ["+", "-"] * 4


def test_resources_of_a_category_are_its_tasks(q):
    q.specify_category_max_resources("sized", {"cores": 2, "memory": 300})
    task = wq.Task("echo $CORES $MEMORY")
    task.specify_category("sized")
    assert run(q, task).output == "2 300\n"
    assert task.resources_allocated.cores == 2


def test_map_pair_and_tree_reduce_give_lists(q):
    assert q.map(lambda x: 2 * x, [1, 2, 3], 2) == [2, 4, 6]
    assert q.pair(lambda p: p[0] * p[1], [1, 2], [3, 4], 3) == [3, 4, 6, 8]
    assert q.tree_reduce(max, [2, 9, 4], 2) == 9


def test_stats_and_status(q):
    run(q, *(wq.Task("true") for _ in range(3)))
    task = wq.Task("sleep 600")
    q.submit(task)
    stats = q.stats
    assert (stats.workers_connected, stats.total_cores, stats.max_cores) == (1, 2, 2)
    assert stats.tasks_submitted - stats.tasks_done - stats.tasks_cancelled == 1
    assert stats.tasks_waiting + stats.tasks_on_workers == 1
    assert [one["taskid"] for one in q.status("tasks")] == [task.id]
    assert q.status("workers")[0]["cores_total"] == 2
    assert q.status("queue")[0]["port"] == q.port
    assert {"default"} <= {one["category"] for one in q.status("categories")}
    assert q.workers_summary()[0]["workers"] == 1
    assert q.hungry() >= 1
    with pytest.raises(ValueError, match="queue, tasks, workers, categories"):
        q.status("nothing")


def test_blocked_hosts_get_nothing(q):
    q.block_host(os.uname().nodename)
    task = wq.Task("true")
    q.submit(task)
    assert q.stats.workers_blocked == 1
    assert "blocked" in q.hpcq_queue.explain(task._run.id)
    q.blacklist_clear()
    assert q.wait(DEADLINE) is task
    q.blacklist_with_timeout(os.uname().nodename, 600)
    q.unblock_host(os.uname().nodename)
    assert run(q, wq.Task("true")).result == 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda q: q.specify_algorithm(wq.WORK_QUEUE_SCHEDULE_TIME), "specify_algorithm"),
        (lambda q: q.specify_task_order(wq.WORK_QUEUE_TASK_ORDER_LIFO), "LIFO"),
        (lambda q: q.specify_category_mode("c", wq.WORK_QUEUE_ALLOCATION_MODE_MIN_WASTE), "mode 2"),
        (lambda q: q.specify_category_autolabel_resource("c", "cores", True), "autolabel"),
        (lambda q: q.specify_category_first_allocation_guess("c", {"cores": 1}), "'cores'"),
        (lambda q: q.activate_fast_abort_category("c", 3), "fast_abort_category"),
        (lambda q: q.specify_catalog_server("h", 1), "catalog"),
        (lambda q: q.specify_log("f"), "specify_log"),
        (lambda q: q.specify_transactions_log("f"), "transactions_log"),
        (lambda q: q.specify_priority(1), "specify_priority"),
        (lambda q: q.specify_keepalive_interval(1), "keepalive_interval"),
        (lambda q: q.specify_keepalive_timeout(1), "keepalive_timeout"),
        (lambda q: q.specify_manager_preferred_connection("by_ip"), "preferred_connection"),
        (lambda q: q.specify_draining_by_hostname("h"), "draining"),
        (lambda q: q.enable_monitoring("dir"), "dirname"),
        (lambda q: q.enable_monitoring(watchdog=False), "watchdog"),
        (lambda q: q.enable_monitoring_full("dir"), "monitoring_full"),
        (lambda q: q.estimate_capacity(), "estimate_capacity"),
        (lambda q: q.initialize_categories("f", {}), "initialize_categories"),
        (lambda q: q.invalidate_cache_file("http://h/f"), "invalidate_cache_file"),
        (lambda q: q.tune("wait-for-workers", 3), "wait-for-workers"),
        (lambda q: q.pair(min, [1], [2], env="e"), "env"),
        (lambda q: q.remote_map("f", [1], "c", "n"), "remote_map"),
        (lambda q: q.specify_name("late"), "specify_name"),
        (lambda q: wq.WorkQueue(0, stats_log="f"), "stats_log"),
        (lambda q: wq.WorkQueue(0, transactions_log="f"), "transactions_log"),
        (lambda q: wq.WorkQueue(0, ssl=("k", "c")), "ssl"),
        (lambda q: wq.WorkQueue(0, status_display_interval=10), "status_display"),
        (lambda q: q.stats.bandwidth, "bandwidth"),
    ],
)
def test_what_cannot_be_honoured_says_so_by_name(q, call, named):
    with pytest.raises(NotImplementedError, match=named):
        call(q)


def test_what_needs_nothing_is_accepted(q, tmp_path):
    (tmp_path / "password").write_text("secret")
    assert q.enable_monitoring() == 1
    assert q.specify_password_file(tmp_path / "password") == 1
    with pytest.raises(OSError, match="none"):
        q.specify_password_file(tmp_path / "none")
    q.specify_password("secret")
    q.specify_manager_mode(wq.WORK_QUEUE_MANAGER_MODE_CATALOG)
    q.specify_algorithm(wq.WORK_QUEUE_SCHEDULE_UNSET)
    q.specify_task_order(wq.WORK_QUEUE_TASK_ORDER_FIFO)
    q.invalidate_cache_file("in.txt")
    assert (q.tune("hungry-minimum", 20), q.tune("no-such", 1)) == (0, -1)
    assert (q.activate_fast_abort(3), q.activate_fast_abort(-1)) == (0, 1)
    assert q.using_ssl
    before = q.specify_min_taskid(0)
    assert q.specify_min_taskid(before + 100) == before + 100
    assert run(q, wq.Task("true")).id == before + 100
