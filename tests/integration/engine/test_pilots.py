"""Pilots that come, go, are killed or refused, and what becomes of the tasks they had."""

import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time

import cloudpickle
import msgspec
import psutil
import pytest
from running import appears, eventually, gone, ready, run, wait

import hpcq
from hpcq import connection, state_dir
from hpcq.client import ask
from hpcq.messages import PilotHello, Ready, TaskResult, Update
from hpcq.protocol import frame
from hpcq.versions import versions

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def call(function, *args, **kwargs):
    return hpcq.PythonTask(function, *args, **kwargs)


def note_and_wait(directory, until):
    """Leave a mark that we ran, then wait for a file."""
    import tempfile  # noqa: PLC0415
    import time  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    descriptor, _ = tempfile.mkstemp(dir=directory)
    os.write(descriptor, str(os.getpid()).encode())
    while not Path(until).exists():
        time.sleep(0.005)
    return "done"


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def begun(marks, count=1):
    return eventually(
        lambda: (found := [p for p in marks.iterdir() if p.read_text()]) and len(found) >= count and found,
        f"{count} attempts have begun",
    )


# --- ends of pilots --------------------------------------------------------------------------------------------------


def test_a_killed_pilots_task_runs_again_elsewhere_once(queue, start_pilot, marks, tmp_path):
    first = start_pilot(queue)
    ready(queue, 1)
    task = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(task)
    (mark,) = begun(marks)
    runner = int(mark.read_text())
    os.kill(first.pid, signal.SIGKILL)
    start_pilot(queue)
    begun(marks, 2)
    (tmp_path / "go").touch()
    assert wait(queue) is task
    assert (task.outcome, task.attempts, task.output) == ("success", 2, "done")
    assert len(list(marks.iterdir())) == 2
    assert gone(runner)


def test_a_task_that_loses_all_its_pilots_is_lost(queue, start_pilot, marks, tmp_path):
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=1)
    queue.submit(task)
    for attempt in (1, 2):
        pilot = start_pilot(queue)
        begun(marks, attempt)
        os.kill(pilot.pid, signal.SIGKILL)
        pilot.wait()
    assert wait(queue) is task
    assert (task.outcome, task.attempts) == ("lost", 2)
    assert "went away" in task.message


def test_sigterm_drains_a_pilot(queue, start_pilot, marks, tmp_path, place):
    first = start_pilot(queue)
    ready(queue, 1)
    running = call(note_and_wait, marks, tmp_path / "go")
    queue.submit(running)
    begun(marks)
    waiting = [call(os.getppid) for _ in range(10)]
    for task in waiting:
        queue.submit(task)
    first.process.terminate()
    eventually(lambda: [v.state for v in queue.pilots()] == ["draining"], "it drains")
    start_pilot(queue)
    done = [wait(queue) for _ in waiting]
    assert {task.outcome for task in done} == {"success"}
    assert {task.attempts for task in done} == {1}
    (tmp_path / "go").touch()
    assert wait(queue) is running
    assert (running.outcome, running.attempts) == ("success", 1)
    assert first.wait() == 0
    assert running.pilot != done[0].pilot
    assert len(list(place.scratch.glob("hpcq-pilot-*"))) == 1


def test_a_second_sigterm_does_not_wait_for_tasks(queue, start_pilot, marks, tmp_path):
    pilot = start_pilot(queue)
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=0)
    queue.submit(task)
    begun(marks)
    pilot.process.terminate()
    eventually(lambda: [v.state for v in queue.pilots()] == ["draining"], "it drains")
    pilot.process.terminate()
    assert pilot.wait() == 0
    assert wait(queue).outcome == "lost"


def test_the_walltime_of_a_pilot_ends_it_in_time(queue, start_pilot, marks, tmp_path):
    pilot = start_pilot(queue, "--walltime", "17", "--drain-timeout", "1")
    task = call(note_and_wait, marks, tmp_path / "never").set(retries=0)
    queue.submit(task)
    begun(marks)
    assert pilot.wait() == 0
    assert wait(queue).outcome == "lost"
    assert "its walltime ends" in task.message


def test_read_only_directories_of_tasks_are_removed_too(queue, pilot):
    assert run(queue, hpcq.Task("mkdir -p a/b && touch a/b/c && chmod 500 a/b a")).outcome == "success"


def test_children_of_a_killed_pilot_die_with_it(queue, start_pilot, tmp_path):
    note = tmp_path / "pid"
    pilot = start_pilot(queue)
    task = hpcq.Task(f"setsid sleep 600 & echo $! > {note}; sleep 600", retries=0)
    queue.submit(task)
    child = int(appears(note))
    os.kill(pilot.pid, signal.SIGKILL)
    eventually(lambda: gone(child), "what the task started is gone")
    assert wait(queue).outcome == "lost"


def test_what_a_killed_pilot_left_on_disk_is_removed_by_the_next(queue, start_pilot, place):
    pilot = start_pilot(queue)
    run(queue, call(os.getpid))
    os.kill(pilot.pid, signal.SIGKILL)
    pilot.wait()
    (left,) = place.scratch.glob("hpcq-pilot-*")
    start_pilot(queue)
    run(queue, call(os.getpid))
    assert not left.exists()


# --- the manager goes away -------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time, hpcq
queue = hpcq.Queue("q", address="127.0.0.1", **{options})
{before}
print("serving", flush=True)
queue.submit(hpcq.Task("echo $$ > {note}; sleep 600"))
with queue:
    queue.wait()
"""


class Program:
    """A user's program in a process of its own."""

    def __init__(self, note, before="", **options):
        text = PROGRAM.format(options=options, before=before, note=note)
        self.process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line == "serving\n", self.process.stderr.read()


@pytest.fixture
def program():
    started = []

    def make(*args, **options):
        started.append(Program(*args, **options))
        return started[-1].process

    yield make
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_pilots_of_a_killed_program_end_by_themselves(program, start_pilot, place, tmp_path):
    process = program(tmp_path / "pid")
    pilot = start_pilot(connection=state_dir.connection_file("q"), manager_timeout=1.0)
    child = int(appears(tmp_path / "pid"))
    process.kill()
    assert pilot.wait() == 0
    assert gone(child)
    assert "the manager is gone" in pilot.said()


def test_a_program_started_again_takes_its_pilots_over(program, start_pilot, open_queue, tmp_path):
    process = program(tmp_path / "pid")
    pilot = start_pilot(connection=state_dir.connection_file("q"), manager_timeout=20.0)
    child = int(appears(tmp_path / "pid"))
    process.kill()
    process.wait()
    queue = open_queue()
    task = run(queue, hpcq.Task("echo again"))
    assert task.output == "again\n"
    assert gone(child)
    assert pilot.process.poll() is None


LOCAL = "queue.submit_pilots(2, batch='local', manager_timeout=1)"


def test_ctrl_c_in_the_program_ends_its_pilots_and_jobs(program, place, tmp_path):
    process = program(tmp_path / "pid", LOCAL)
    child = int(appears(tmp_path / "pid"))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT, errors
    assert "KeyboardInterrupt" in errors
    assert gone(child)
    eventually(place.nothing_left, "all pilots have ended", 5.0)


def test_ctrl_c_leaves_pilots_that_are_to_be_kept(program, open_queue, place, tmp_path):
    process = program(tmp_path / "pid", LOCAL.replace("=1", "=20"), keep_pilots=True)
    appears(tmp_path / "pid")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert place.processes()
    queue = open_queue()
    assert len(ready(queue, 2)) == 2
    assert run(queue, call(os.getpid)).outcome == "success"


def test_a_fork_of_the_program_leaves_its_queue_alone(queue, pilot):
    child = os.fork()
    if child == 0:
        queue.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert state_dir.connection_file("q").exists()
    assert run(queue, call(os.getpid)).outcome == "success"


# --- strangers -------------------------------------------------------------------------------------------------------


def altered(place, **changes):
    """A connection file like the queue's, changed, and readable by us alone."""
    info = connection.read(state_dir.connection_file("q"))
    path = place.state / "altered.json"
    state_dir.write_private(path, msgspec.json.encode(msgspec.structs.replace(info, **changes)))
    return path


def test_a_pilot_with_keys_of_another_queue_is_refused_with_status_4(queue, start_pilot, place):
    other = connection.make_identity("q")
    pilot = start_pilot(connection=altered(place, authority=other.authority, pilot=other.pilot), manager_timeout=60.0)
    assert pilot.wait() == 4
    assert "is not the manager of queue 'q'" in pilot.said()
    assert "Traceback" not in pilot.said()


def test_a_pilot_with_a_key_the_manager_does_not_know_is_refused_with_status_4(queue, start_pilot, place):
    other = connection.make_identity("q")
    pilot = start_pilot(connection=altered(place, pilot=other.pilot), manager_timeout=1.0)
    assert pilot.wait() == 4
    assert "as if it did not know our key" in pilot.said()
    assert "Traceback" not in pilot.said()


def test_the_file_of_a_manager_that_is_gone_is_status_4(open_queue, start_pilot, place):
    queue = open_queue()
    path = altered(place)
    queue.close()
    pilot = start_pilot(connection=path, manager_timeout=1.0)
    assert pilot.wait(10.0) == 4
    assert "does not answer" in pilot.said()


def test_a_pilot_without_a_file_is_status_4(start_pilot, place):
    pilot = start_pilot(connection=place.state / "nowhere.json", manager_timeout=0.0)
    assert pilot.wait() == 4
    assert "no program with that queue is running" in pilot.said()


def raw(queue):
    return socket.create_connection(("127.0.0.1", queue.connection.port))


def secure(queue):
    tls = connection.pilot_tls(connection.read(state_dir.connection_file("q")))
    return tls.wrap_socket(raw(queue), server_hostname=connection.MANAGER_NAME)


def hello(name="forged"):
    return PilotHello(1, name, "", "", 0, "here", 1, 4, 100, 0.0, "none", "", versions())


READY = Ready("none", "", 0.0, "", ["wan"])


def closed_by_manager(channel):
    with channel:
        channel.settimeout(10)
        try:
            while channel.recv(65536):
                pass
        except TimeoutError:
            return False
        except (ssl.SSLError, ConnectionError):
            pass
    return True


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        (1 << 20).to_bytes(4, "big"),
        frame(READY),
        frame(hello()) + b"\xff\xff\xff\xff",
        frame(hello()) + frame(hello()),
        frame(hello()) + frame(READY) + frame(READY),
        frame(hello()) + frame(READY) + frame(Update([], [TaskResult(1, "no such outcome")])),
    ],
    ids=["http", "long frame", "wrong word", "huge frame", "hello twice", "ready twice", "bad outcome"],
)
def test_nonsense_from_somebody_with_our_key_costs_his_connection_only(queue, pilot, data):
    channel = secure(queue)
    channel.sendall(data)
    assert closed_by_manager(channel)
    assert run(queue, call(os.getpid)).outcome == "success"


def test_words_about_tasks_of_others_change_nothing(queue, pilot, marks, tmp_path):
    task = call(note_and_wait, marks, tmp_path / "go")
    number = queue.submit(task)
    begun(marks)
    with secure(queue) as channel:
        channel.sendall(frame(hello()) + frame(Update([number], [TaskResult(number, "success")])))
        eventually(lambda: any(view.name == "forged" and view.tasks_done for view in queue.pilots()), "it was heard")
    (tmp_path / "go").touch()
    assert wait(queue).output == "done"


def test_garbage_before_tls_and_idle_connections_do_no_harm(queue, pilot):
    idle = [raw(queue) for _ in range(50)]
    for channel in idle[:25]:
        channel.sendall(os.urandom(5000))
    silent = [secure(queue) for _ in range(5)]
    assert run(queue, call(os.getpid)).outcome == "success"
    queue.close()
    assert [closed_by_manager(channel) for channel in (*idle, *silent)] == [True] * 55


def test_a_pilot_that_connects_again_replaces_itself(queue):
    with secure(queue) as first:
        first.sendall(frame(hello()) + frame(READY))
        ready(queue, 1)
        task = call(os.getpid)
        queue.submit(task)
        eventually(lambda: queue.stats["tasks"]["sent"] == 1, "it was sent the task")
        with secure(queue) as second:
            second.sendall(frame(hello()) + frame(READY))
            eventually(lambda: queue.stats["tasks"]["sent"] == 1 and queue.stats["pilots"]["ready"] == 1, "it is back")
            assert closed_by_manager(first)
            second.sendall(frame(Update([], [TaskResult(task.id, "crash", message="as it says")])))
            assert wait(queue).message == "as it says"


def test_cancel_at_the_very_moment_a_pilot_goes(queue):
    for attempt in range(20):
        channel = secure(queue)
        channel.sendall(frame(hello(f"p{attempt}")) + frame(READY))
        ready(queue, 1)
        number = queue.submit(call(os.getpid))
        eventually(lambda: queue.stats["tasks"]["sent"], "it was sent the task")
        canceller = threading.Thread(target=queue.cancel, kwargs={"id": number})
        canceller.start()
        channel.close()
        canceller.join()
        assert wait(queue).outcome == "cancelled"
        eventually(lambda: not queue.stats["pilots"]["ready"], "the pilot is gone")


def test_a_pilot_that_cannot_start_its_runners_says_so_and_stays_listed(queue, start_pilot, place, monkeypatch):
    broken = place.state / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import sys
            if "hpcq.pilot.run" in " ".join(sys.orig_argv):
                raise SystemExit("broken on purpose")
        """)
    )
    monkeypatch.setenv("PYTHONPATH", str(broken))
    pilot = start_pilot(queue)
    task = call(os.getpid)
    queue.submit(task)
    assert pilot.wait() == 1
    eventually(lambda: [v.state for v in queue.pilots()] == ["failed"], "it is listed as failed")
    (view,) = queue.pilots()
    assert view.failed_layer == "runner"
    assert "broken on purpose" in view.message
    monkeypatch.delenv("PYTHONPATH")
    start_pilot(queue)
    assert wait(queue).attempts <= 1


# --- many ------------------------------------------------------------------------------------------------------------


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
    """Process ids of its runners."""
    children = psutil.Process(pilot.pid).children(recursive=True)
    return [child.pid for child in children if "hpcq.pilot.run" in " ".join(child.cmdline())]


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
            os.kill(chance.choice(runners(pilot)), signal.SIGKILL)
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
            done = [queue.wait_for_tag(tag, 30) for _ in tasks]
            assert {id(task) for task in done} == {id(task) for task in tasks}
            assert queue.wait_for_tag(tag) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
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


# --- the queue itself ------------------------------------------------------------------------------------------------


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
    thread.join(10)
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


def test_a_pilot_is_sent_away_when_its_queue_closes(open_queue, start_pilot):
    queue = open_queue()
    pilot = start_pilot(queue, manager_timeout=60.0)
    ready(queue, 1)
    queue.close()
    assert pilot.wait(10.0) == 0
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
    eventually(place.nothing_left, "the job is gone", 5.0)
