"""What `hpcq.Queue` promises its user, with many tasks and at its end."""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time

import cloudpickle
import psutil
import pytest
from running import DEADLINE, begun, call, eventually, note_and_wait, ready, run, wait

import hpcq
import hpcq.manager
from hpcq import journal, state_dir
from hpcq.cli.main import run as command_line
from hpcq.client import ask

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_two_thousand_tasks_under_random_kills_all_finish_once(queue, start_pilot, marks):
    chance = random.Random(5)
    pilots = [start_pilot(queue, cores=2) for _ in range(2)]
    ready(queue, 2)
    tasks = [call(lambda n: n, n).set(retries=50) for n in range(2000)]
    for task in tasks:
        queue.submit(task)
    done = {}
    kills = 0
    while len(done) < len(tasks):
        task = wait(queue)
        assert task.id not in done
        done[task.id] = task
        if kills < 6 and chance.random() < 0.01:
            kills += 1
            victim = pilots.pop(chance.randrange(len(pilots)))
            os.kill(victim.pid, chance.choice([signal.SIGKILL, signal.SIGTERM]))
            pilots.append(start_pilot(queue, cores=2))
    assert [task.output for task in tasks] == list(range(2000))
    assert queue.empty()
    assert queue.wait() is None
    assert kills >= 3


def runners(pilot):
    """Process ids of its runners; some may be ending."""
    found = []
    for child in psutil.Process(pilot.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "hpcq.pilot.run" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_runners_killed_at_random_crash_only_what_they_were_doing(queue, start_pilot):
    chance = random.Random(7)
    pilot = start_pilot(queue, cores=2)
    ready(queue, 1)
    tasks = [call(time.sleep, 0.002) for _ in range(400)]
    for task in tasks:
        queue.submit(task)
    done = [wait(queue)]
    kills = 0
    while len(done) < len(tasks):
        done.append(wait(queue))
        if len(done) % 100 == 50:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(eventually(lambda: runners(pilot), "it has runners")), signal.SIGKILL)
            kills += 1
    outcomes = [task.outcome for task in tasks]
    assert set(outcomes) <= {"success", "crash"}
    assert outcomes.count("crash") <= kills
    assert queue.wait() is None


def test_two_threads_submit_and_wait_at_once(queue, start_pilot):
    start_pilot(queue, cores=2)
    failures = []

    def work(tag):
        try:
            tasks = [call(lambda n: n, n).set(tag=tag) for n in range(300)]
            for task in tasks:
                queue.submit(task)
            done = [queue.wait_for_tag(tag, DEADLINE) for _ in tasks]
            assert {id(task) for task in done} == {id(task) for task in tasks}
            assert queue.wait_for_tag(tag) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert failures == []
    assert queue.empty()


def test_empty_is_never_true_too_early(queue, pilot):
    """Between the end of a task and its arrival in the mailbox there must be no gap."""
    for _ in range(300):
        queue.submit(call(int))
        seen = 0
        while not queue.empty():
            seen += queue.wait() is not None
        assert seen == 1


def test_a_task_stuck_behind_a_long_one_moves_to_a_pilot_that_is_idle(queue, start_pilot, marks, tmp_path):
    start_pilot(queue)
    ready(queue, 1)
    queue.submit(call(note_and_wait, marks, tmp_path / "go"))
    begun(marks)
    stuck = [call(os.getpid) for _ in range(3)]
    for task in stuck:
        queue.submit(task)
    start_pilot(queue)
    assert {wait(queue).id for _ in stuck} == {task.id for task in stuck}
    (tmp_path / "go").touch()
    wait(queue)


def test_cancel_races_results(queue, start_pilot):
    start_pilot(queue, cores=2)
    ready(queue, 1)
    tasks = [call(int).set(tag=str(n % 7)) for n in range(400)]
    for n, task in enumerate(tasks):
        queue.submit(task)
        if n % 50 == 49:
            queue.cancel(tag=str(n % 7))
    done = [wait(queue) for _ in tasks]
    assert {id(task) for task in done} == {id(task) for task in tasks}
    assert {task.outcome for task in tasks} <= {"success", "cancelled"}
    assert queue.wait() is None


def test_a_name_in_use_is_refused_naming_its_owner(queue, open_queue):
    with pytest.raises(
        hpcq.UsageError, match=f"'q' is already served by process {os.getpid()} on {socket.gethostname()}"
    ):
        open_queue()


def test_a_port_in_use_is_refused_and_the_name_is_free_again(queue, open_queue):
    with pytest.raises(hpcq.HpcqError, match=f"cannot listen on 127.0.0.1 port {queue.connection.port}"):
        open_queue("other", port=queue.connection.port)
    open_queue("other")


def test_what_waiting_means(queue):
    assert queue.wait() is None
    assert queue.wait(0) is None
    assert queue.wait(5) is None  # at once: nothing is left
    assert queue.wait_for_id(17) is None
    assert queue.wait_for_tag("nobody") is None
    assert queue.empty()
    task = call(os.getpid).set(tag="x")
    number = queue.submit(task)
    assert not queue.empty()
    assert queue.wait(0) is None
    assert queue.wait_for_tag("x", 0.01) is None
    assert queue.wait_for_id(number, 0.01) is None
    queue.cancel()
    assert queue.wait_for_tag("x") is task
    assert queue.wait_for_id(number) is None
    assert queue.empty()


def test_closing_with_tasks_unfinished_wakes_who_waits(open_queue):
    queue = open_queue()
    queue.submit(call(os.getpid))
    raised = []

    def wait_long():
        try:
            queue.wait()
        except hpcq.QueueClosedError as error:
            raised.append(str(error))

    thread = threading.Thread(target=wait_long)
    thread.start()
    queue.close()
    thread.join(DEADLINE)
    assert raised == ["the queue has ended: it was closed"]


def test_a_closed_queue_says_so(open_queue, start_pilot):
    queue = open_queue()
    start_pilot(queue)
    task = call(int)
    queue.submit(task)
    eventually(lambda: task.done, "the task is done")
    queue.close()
    queue.close()
    assert queue.wait() is task  # what is here can still be taken
    assert queue.wait() is None
    for use in (lambda: queue.submit(call(int)), queue.hungry, queue.pilots, lambda: queue.stats):
        with pytest.raises(hpcq.QueueClosedError, match="queue 'q' is closed"):
            use()


def test_a_queue_that_is_closed_in_its_managers_thread_closes(open_queue):
    """As the garbage collector may do, which works in any thread."""
    queue = open_queue()
    queue._manager._soon(queue.close)
    eventually(lambda: not queue._manager._thread.is_alive(), "the manager's thread has ended")
    eventually(lambda: queue._failure is not None, "it is closed")


def test_a_pilot_is_sent_away_when_its_queue_closes(open_queue, start_pilot):
    queue = open_queue()
    pilot = start_pilot(queue, manager_timeout=60.0)
    ready(queue, 1)
    queue.close()
    assert pilot.wait() == 0
    assert not state_dir.connection_file("q").exists()


def test_the_command_line_is_answered(queue, pilot):
    run(queue, call(int))
    assert ask("q", "status")["tasks"]["done"] == {"success": 1}
    assert [row["state"] for row in ask("q", "pilots")] == ["ready"]
    with pytest.raises(hpcq.HpcqError, match="knows nothing of 'nonsense'"):
        ask("q", "nonsense")
    with pytest.raises(hpcq.QueueNotFoundError, match="no queue named 'absent'; the queues here are: q"):
        ask("absent", "status")


def test_pilots_by_the_local_batch_system(queue, place):
    (job,) = queue.submit_pilots(1, batch="local", cores=2)
    assert run(queue, call(lambda: 6 * 7)).output == 42
    (view,) = queue.pilots()
    assert (view.job_id, view.batch, view.cores) == (job.id, "local", 2)
    queue.close()
    eventually(place.nothing_left, "the job is gone")


def test_a_bug_in_the_manager_wakes_who_waits(queue, monkeypatch, caplog):
    def broken(events, now):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(queue._manager._scheduler, "handle", broken)
    queue.submit(call(int))
    with pytest.raises(hpcq.QueueClosedError, match="the queue has ended: a bug"):
        queue.wait(DEADLINE)
    assert "the manager of queue q failed" in caplog.text


def test_of_a_range_of_ports_the_first_free_one_is_taken(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with hpcq.Queue(address="127.0.0.1", port=f"{port}-{port + 20}") as queue:
            assert port < queue.connection.port <= port + 20
        with pytest.raises(hpcq.HpcqError, match=rf"cannot listen on 127.0.0.1 port {port} of"):
            hpcq.Queue(address="127.0.0.1", port=port)


@pytest.mark.usefixtures("place")
def test_where_it_listens_can_be_set_outside_the_program(monkeypatch):
    monkeypatch.setenv("HPCQ_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("HPCQ_PORT", "20000-60000")
    with hpcq.Queue("q") as queue:
        assert queue.connection.addresses == ["127.0.0.1"]
        assert 20000 <= queue.connection.port <= 60000
    with hpcq.Queue("q", address="127.0.0.2", port=0) as queue:
        assert queue.connection.addresses == ["127.0.0.2"]


def test_a_journal_of_what_was_done(open_queue, start_pilot, tmp_path):
    queue = open_queue(journal=tmp_path / "journal")
    start_pilot(queue)
    for value in ("1", "x"):
        queue.submit(hpcq.PythonTask(int, value).set(tag=value))
    assert list(queue.map(abs, [-1, -2])) == [1, 2]
    assert {task.outcome for task in iter(queue.wait, None)} == {"success", "exception"}
    queue.close()
    found = journal.read(tmp_path / "journal")
    assert found.ended is not None
    assert (found.submitted, len(found.tasks), len(found.pilots)) == (4, 4, 1)
    assert {(row.kind, row.tag, row.outcome) for row in found.tasks} >= {
        ("int(…)", "1", "success"),
        ("int(…)", "x", "exception"),
    }


def test_a_queue_has_its_files_where_it_is_told(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(state_dir, "_used", None)
    elsewhere = tmp_path / "elsewhere"
    with hpcq.Queue("q", address="127.0.0.1", state_dir=elsewhere, journal=True) as queue:
        assert not state_dir.state_root().exists()
        with pytest.raises(hpcq.UsageError, match=f"serves a queue 'q' already, in {elsewhere}/q"):
            hpcq.Queue("q")
        (job,) = queue.submit_pilots(1, batch="local")
        assert job.directory.is_relative_to(elsewhere / "q" / "jobs")
        assert run(queue, call(int)).outcome == "success"
        assert command_line(["pilots", "--name", "q", "--json", "--state-dir", str(elsewhere)]) == 0
        assert [row["job_id"] for row in json.loads(capsys.readouterr().out)] == [job.id]
        assert command_line(["status", "--state-dir", str(elsewhere)]) == 0  # the only one there
    eventually(place.nothing_left, "the job is gone")
    assert command_line(["report", "--state-dir", str(elsewhere), "--tasks"]) == 0
    assert "success" in capsys.readouterr().out
    state_dir.use(None)
    with hpcq.Queue("q") as queue:
        assert state_dir.connection_file("q").is_relative_to(state_dir.state_root())


def test_of_a_queue_without_a_name_nothing_is_left_elsewhere_either(place, tmp_path):
    with hpcq.Queue(state_dir=tmp_path / "elsewhere") as queue:
        assert [one.name for one in (tmp_path / "elsewhere").iterdir()] == [queue.name]
    assert not list((tmp_path / "elsewhere").iterdir())
