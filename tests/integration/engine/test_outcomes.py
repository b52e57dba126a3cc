"""Each way a task can end, on a real pilot."""

import os
import signal
import sys
import threading

import cloudpickle
import pytest
from running import Pilot, Place, appears, call, eventually, gone, ready, run, wait

import hpcq
import hpcq.dispatch
import hpcq.manager
import hpcq.packing
import hpcq.protocol
import hpcq.queue
from hpcq import state_dir
from hpcq.outcome import OUTPUT_LIMIT

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class LocalError(Exception):
    """Known to the pilot only by value."""

    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


class StubbornError(Exception):
    """Pickles, but cannot be rebuilt: it wants two arguments and keeps one."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


def fail(error):
    raise error


def nested_failure():
    return fail(KeyError("inner"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One queue and one pilot with one core for all that do not mind each other."""
    directory = tmp_path_factory.mktemp("outcomes")
    place = Place(directory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.environment.items():
            patch.setenv(name, value)
        with hpcq.Queue("shared", address="127.0.0.1") as queue:
            pilot = Pilot(state_dir.connection_file("shared"), directory / "pilot.log", "--cores", "1")
            ready(queue, 1)
            yield queue, pilot
        assert pilot.wait() == 0
    eventually(place.nothing_left, "nothing of the tests is left")


@pytest.fixture
def queue(shared):
    return shared[0]


@pytest.fixture
def pilot(shared):
    return shared[1]


# --- values and exceptions -------------------------------------------------------------------------------------------


def test_a_value_comes_back(queue, pilot):
    task = run(queue, call(lambda x, y: (x, [y]), 1, y={"a": 2}))
    assert (task.outcome, task.output, task.result()) == ("success", (1, [{"a": 2}]), (1, [{"a": 2}]))
    assert (task.attempts, task.exit_code, task.message) == (1, None, "")
    assert task.pilot in [view.name for view in queue.pilots()]
    assert task.submitted_at <= task.started_at <= task.finished_at


def test_an_exception_keeps_its_type_and_its_remote_traceback(queue, pilot):
    task = run(queue, call(nested_failure))
    assert task.outcome == "exception"
    assert isinstance(task.output, KeyError)
    assert task.exception is task.output
    with pytest.raises(KeyError, match="inner") as raised:
        task.result()
    assert isinstance(raised.value.__cause__, hpcq.RemoteTraceback)
    assert "in nested_failure" in str(raised.value.__cause__)
    assert "hpcq/pilot" not in str(raised.value.__cause__)


def test_an_exception_of_the_users_own_comes_back_as_itself(queue, pilot):
    task = run(queue, call(fail, LocalError(7, "text")))
    assert type(task.exception).__name__ == "LocalError"
    assert task.exception.code == 7


def test_an_exception_that_cannot_be_rebuilt_comes_back_as_its_text(queue, pilot):
    def raise_it():
        raise StubbornError("first", "second")

    task = run(queue, call(raise_it))
    assert task.outcome == "exception"
    assert isinstance(task.exception, hpcq.RemoteError)
    assert "StubbornError: first" in str(task.exception)
    assert "raise_it" in str(task.exception.__cause__)


def test_an_exception_that_cannot_be_printed_is_still_an_exception(queue, pilot):
    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    assert run(queue, call(fail, MuteError())).outcome == "exception"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_leaving_python_by_an_exception_is_an_exception(queue, pilot, error):
    task = run(queue, call(fail, error))
    assert (task.outcome, type(task.exception)) == ("exception", type(error))
    with pytest.raises(hpcq.TaskFailedError, match=type(error).__name__):  # which does not end this program
        task.result()
    assert run(queue, call(os.getpid)).outcome == "success"


# --- what cannot be pickled ------------------------------------------------------------------------------------------


def test_arguments_that_cannot_be_pickled_are_named(queue):
    task = run(queue, call(print, 1, lock=threading.Lock()))
    assert task.outcome == "unserializable"
    assert "argument 'lock' (a lock)" in task.message
    assert task.attempts == 0


def test_a_function_that_cannot_be_pickled_is_named(queue):
    lock = threading.Lock()

    def uses_a_lock():
        return lock

    task = run(queue, call(uses_a_lock))
    assert task.outcome == "unserializable"
    assert "uses_a_lock" in task.message


def test_a_result_that_cannot_be_pickled_is_named(queue, pilot):
    task = run(queue, call(threading.Lock))
    assert task.outcome == "unserializable"
    assert "the result (a lock)" in task.message


def test_a_module_the_pilot_does_not_have_is_named(queue, pilot, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("def f():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # noqa: PLC0415

    task = run(queue, call(only_here.f))
    assert task.outcome == "unserializable"
    assert "only_here" in task.message
    assert "register_pickle_by_value" in task.message


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_gives_its_output(queue, pilot):
    task = run(queue, hpcq.Task("echo out; echo err >&2"))
    assert (task.outcome, task.exit_code, task.output, task.std_error) == ("success", 0, "out\n", "err\n")


def test_a_command_that_fails_gives_its_status(queue, pilot):
    task = run(queue, hpcq.Task("echo sorry >&2; exit 7"))
    assert (task.outcome, task.exit_code, task.std_error) == ("exit_code", 7, "sorry\n")
    with pytest.raises(hpcq.TaskFailedError, match="exit_code: the command exited with status 7"):
        task.result()


def test_a_command_ended_by_a_signal(queue, pilot):
    task = run(queue, hpcq.Task("kill -KILL $$"))
    assert (task.outcome, task.exit_code) == ("exit_code", 128 + signal.SIGKILL)
    assert "signal 9" in task.message


def test_a_commands_environment_and_name(queue, pilot):
    task = hpcq.Task('echo "$GREETING $HPCQ_TASK_ID"', env={"GREETING": "grüß dich"})
    assert run(queue, task).output == f"grüß dich {task.id}\n"
    assert run(queue, hpcq.Task('echo "[$GREETING]"')).output == "[]\n"


def test_a_command_may_name_a_file_that_is_not_utf8(queue, pilot):
    name = os.fsdecode(b"caf\xe9")
    assert run(queue, hpcq.Task(f"printf %s '{name}' | od -An -tx1")).output.split() == ["63", "61", "66", "e9"]


def test_a_commands_directory_is_its_own_and_removed(queue, pilot):
    first = run(queue, hpcq.Task("touch x; mkdir -m 500 d; pwd; ls"))
    second = run(queue, hpcq.Task("pwd; ls; ls -a .."))
    assert first.output.splitlines()[1:] == ["d", "x"]
    assert "x" not in second.output.splitlines()
    assert second.output.splitlines()[1:3] == [".", ".."]  # nothing is left in it


# --- limits ----------------------------------------------------------------------------------------------------------


def sleep_saying(text):
    import time  # noqa: PLC0415

    print(text, flush=True)
    time.sleep(600)


def test_a_function_over_its_walltime(queue, pilot):
    task = run(queue, call(sleep_saying, "begun").set(walltime=4))
    assert (task.outcome, task.std_output) == ("walltime", "begun\n")
    assert "walltime of 4 s" in task.message
    assert task.finished_at - task.started_at >= 4


def test_a_command_over_its_walltime_ends_with_all_it_started(queue, pilot, tmp_path):
    note = tmp_path / "pid"
    task = run(queue, hpcq.Task(f"setsid sleep 600 & echo $! > {note}; echo begun; sleep 600", walltime=4))
    assert (task.outcome, task.std_output) == ("walltime", "begun\n")
    eventually(lambda: gone(int(note.read_text())), "its children are gone")


# --- crashes ---------------------------------------------------------------------------------------------------------


def crash_by_exit():
    print("last words", flush=True)
    os._exit(3)


def crash_by_kill():
    os.kill(os.getpid(), signal.SIGKILL)


def crash_by_segfault():
    import ctypes  # noqa: PLC0415

    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("function", "words"),
    [(crash_by_exit, "exit status 3"), (crash_by_kill, "signal 9 (SIGKILL)"), (crash_by_segfault, "SIGSEGV")],
)
def test_a_crash_says_how_and_the_pilot_goes_on(queue, pilot, function, words):
    task = run(queue, call(function))
    assert task.outcome == "crash"
    assert words in task.message
    assert task.attempts == 1
    assert run(queue, call(os.getpid)).outcome == "success"


def test_a_crash_keeps_what_was_written(queue, pilot):
    assert run(queue, call(crash_by_exit)).std_output == "last words\n"


def test_a_crash_takes_the_processes_it_forked_along(queue, pilot, tmp_path):
    note = tmp_path / "pid"

    def fork_and_crash():
        import time  # noqa: PLC0415

        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        note.write_text(str(child))
        os._exit(3)

    assert run(queue, call(fork_and_crash)).outcome == "crash"
    eventually(lambda: gone(int(note.read_text())), "the fork is gone")


def test_a_crash_costs_no_other_task(queue, pilot):
    tasks = [call(crash_by_exit if n % 10 == 5 else os.getppid) for n in range(50)]
    for task in tasks:
        queue.submit(task)
    done = [wait(queue) for _ in tasks]
    assert {id(task) for task in done} == {id(task) for task in tasks}
    assert [t.outcome for t in tasks] == ["crash" if n % 10 == 5 else "success" for n in range(50)]


# --- cancel ----------------------------------------------------------------------------------------------------------


def test_cancel_of_a_queued_task(open_queue):
    queue = open_queue()
    number = queue.submit(call(os.getpid))
    assert queue.cancel(id=number) == 1
    task = wait(queue)
    assert (task.outcome, task.attempts) == ("cancelled", 0)
    assert queue.cancel(id=number) == 0


@pytest.mark.parametrize("kind", ["tag", "category"])
def test_cancel_of_running_and_waiting_tasks_by_tag_or_category(queue, pilot, tmp_path, kind):
    note = tmp_path / "begun"
    queue.submit(hpcq.Task(f"echo $$ > {note}; sleep 600", **{kind: "go"}))
    for _ in range(3):
        queue.submit(call(os.getpid).set(**{kind: "go"}))
    queue.submit(call(os.getpid).set(**{kind: "stay"}))
    pid = int(appears(note))
    assert queue.cancel(**{kind: "gone"}) == 0
    assert queue.cancel(**{kind: "go"}) == 4
    outcomes = [(getattr(task.options, kind), task.outcome) for task in (wait(queue) for _ in range(5))]
    assert sorted(outcomes) == [("go", "cancelled")] * 4 + [("stay", "success")]
    eventually(lambda: gone(pid), "the command is gone")
    assert queue.wait() is None


# --- what tasks leave ------------------------------------------------------------------------------------------------


def test_children_of_a_task_do_not_outlive_it(queue, pilot, tmp_path):
    note = tmp_path / "pid"
    script = f"(setsid sh -c 'echo $$ > {note}; sleep 600' &); while ! [ -s {note} ]; do :; done"
    assert run(queue, hpcq.Task(script)).exit_code == 0
    assert gone(int(note.read_text()))


def test_a_fork_that_returns_from_the_function_ends_quietly(queue, pilot):
    def fork_carelessly():
        return os.fork() and "parent"

    for _ in range(5):
        task = run(queue, call(fork_carelessly))
        assert (task.outcome, task.output) == ("success", "parent")


def test_a_function_that_leaves_its_directory_and_removes_it(queue, pilot, tmp_path):
    def leave():
        import tempfile  # noqa: PLC0415

        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)

    home = run(queue, call(os.getcwd)).output
    assert run(queue, call(leave)).outcome == "success"
    assert run(queue, call(os.getcwd)).output == home
    assert run(queue, hpcq.Task("echo fine > x && cat x")).output == "fine\n"


def test_a_function_that_spoils_standard_output_spoils_only_its_own(queue, pilot):
    def redirect():
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)

    def close():
        print("heard")
        sys.stdout.close()

    def replace():
        import io  # noqa: PLC0415

        sys.stdout = io.StringIO()

    for spoil in (redirect, close, replace, lambda: os.close(1)):
        assert run(queue, call(spoil)).outcome == "success"
        assert run(queue, call(print, "hello")).std_output == "hello\n"


def test_megabytes_of_output_from_python_c_and_children(queue, pilot):
    def write(count):
        import ctypes  # noqa: PLC0415
        import subprocess  # noqa: PLC0415

        print("p" * count)
        sys.stdout.flush()
        libc = ctypes.CDLL(None)
        for _ in range(count // 1024):
            libc.puts(b"c" * 1023)
        libc.fflush(None)
        subprocess.run(["sh", "-c", f"head -c {count} /dev/zero | tr '\\0' s"], check=True)
        print("e" * count, file=sys.stderr)

    task = run(queue, call(write, 2**21))
    assert task.outcome == "success"
    assert {letter: task.std_output.count(letter) for letter in "pcs"} == {"p": 2**21, "c": 2048 * 1023, "s": 2**21}
    assert task.std_error.count("e") == 2**21
    assert run(queue, call(print, "x")).std_output == "x\n"


def test_output_over_the_limit_keeps_both_ends_and_says_so(queue, pilot):
    def write():
        print("begin")
        for _ in range(24):
            print("x" * 2**20)
        print("end")

    task = run(queue, call(write))
    assert task.std_output.startswith("begin\n")
    assert task.std_output.endswith("end\n")
    assert "bytes left out" in task.std_output
    assert task.output_left_out == 24 * (2**20 + 1) + 10 - OUTPUT_LIMIT


# --- large -----------------------------------------------------------------------------------------------------------


def test_large_arguments_and_results_pass(queue, pilot):
    data = os.urandom(2**20) * 100
    task = run(queue, call(lambda data: data, data))
    assert task.outcome == "success"
    assert task.output == data


def test_many_large_arguments_at_once_pass(open_queue, start_pilot, monkeypatch):
    """Together they are over the limit of one message."""
    queue = open_queue()
    monkeypatch.setattr(hpcq.protocol, "FRAME_LIMIT", 10 * 2**20)
    monkeypatch.setattr(hpcq.dispatch, "RUN_BYTES", 5 * 2**20)
    data = b"x" * (3 * 2**20)
    start_pilot(queue, cores=12)
    ready(queue, 1)
    tasks = [call(len, data) for _ in range(12)]
    for task in tasks:
        queue.submit(task)
    assert [wait(queue).output for _ in tasks] == [len(data)] * 12


def test_an_argument_over_the_limit_is_refused_at_once(queue, monkeypatch):
    monkeypatch.setattr(hpcq.packing, "PAYLOAD_LIMIT", 1000)
    task = run(queue, call(len, b"x" * 1001))
    assert task.outcome == "unserializable"
    assert "1 GiB" in task.message
