"""Wrong keys, garbage, silence and lies on the manager's port: the queue works on."""

import os
import socket
import ssl
import sys
import textwrap
import threading

import cloudpickle
import msgspec
import pytest
from running import DEADLINE, begun, call, eventually, note_and_wait, ready, run, wait

from hpcq import connection, state_dir
from hpcq.identity import make_identity
from hpcq.messages import PROTOCOL_VERSION, PilotHello, Ready, TaskResult, Update
from hpcq.protocol import frame
from hpcq.versions import versions

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def altered(place, **changes):
    """A connection file like the queue's, changed, and readable by us alone."""
    info = connection.read(state_dir.connection_file("q"))
    path = place.state / "altered.json"
    state_dir.write_private(path, msgspec.json.encode(msgspec.structs.replace(info, **changes)))
    return path


def test_a_pilot_with_keys_of_another_queue_is_refused_with_status_4(queue, start_pilot, place):
    other = make_identity("q")
    pilot = start_pilot(connection=altered(place, authority=other.authority, pilot=other.pilot), manager_timeout=60.0)
    assert pilot.wait() == 4
    assert "is not the manager of queue 'q'" in pilot.said()
    assert "Traceback" not in pilot.said()


def test_a_pilot_with_a_key_the_manager_does_not_know_is_refused_with_status_4(queue, start_pilot, place):
    other = make_identity("q")
    pilot = start_pilot(connection=altered(place, pilot=other.pilot), manager_timeout=1.0)
    assert pilot.wait() == 4
    assert "as if it did not know our key" in pilot.said()
    assert "Traceback" not in pilot.said()


def test_the_file_of_a_manager_that_is_gone_is_status_4(open_queue, start_pilot, place):
    queue = open_queue()
    path = altered(place)
    queue.close()
    pilot = start_pilot(connection=path, manager_timeout=1.0)
    assert pilot.wait() == 4
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
    return PilotHello(PROTOCOL_VERSION, name, "", "", 0, "here", 1, 4, 100, 0.0, "none", "", versions())


READY = Ready("none", "", 0.0, "", ["wan"])


def closed_by_manager(channel):
    with channel:
        channel.settimeout(DEADLINE)
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
