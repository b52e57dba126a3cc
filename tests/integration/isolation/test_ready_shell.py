"""The shell that is forked for each command: what a command sees is what it would see of a shell of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hpcq.pilot import shells

pytestmark = pytest.mark.skipif(
    not shells.LIBRARY.is_file() and not os.environ.get("HPCQ_TESTS_MUST_RUN"), reason="it is not compiled"
)

HEAD = """
import os, signal, sys
from hpcq.pilot import shells
from hpcq.pilot.shells import ReadyShell

ready = ReadyShell(dict(os.environb))
assert ready.is_alone()

def run(command, directory="/", **changes):
    child = ready.spawn(directory, command.encode(), {name.encode(): value.encode() for name, value in changes.items()})
    assert child, "no ready shell"
    return os.waitstatus_to_exitcode(os.wait4(child, 0)[1])

def own(command, directory="/", **changes):
    environment = {**os.environ, **changes}
    os.chdir(directory)
    child = os.posix_spawn("/bin/sh", ["sh", "-c", command], environment, setsigdef=shells.DEFAULTS)
    return os.waitstatus_to_exitcode(os.wait4(child, 0)[1])
"""


def told(program: str, **variables: str) -> list[str]:
    """What such a program of one thread, without other children, prints."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program], env={**os.environ, **variables}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=120, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "command",
    [
        "env | sort", "echo $0 $# $- $PPID; pwd; echo $PWD $OLDPWD", "echo $(ls /proc/self/fd)", "umask; ulimit -a",
        "grep -E 'Sig[BIC]|Shd' /proc/self/status", "readlink /proc/$$/exe; [ $$ = $(sh -c 'echo $PPID') ] && echo own",
        "echo two words; echo 'a\nb'; (exit 3)", "[ -t 0 ] || cat; echo $NEW$HOME",
    ],
)  # fmt: skip
def test_a_command_sees_what_it_would_see_of_a_shell_of_its_own(command, tmp_path):
    lines = told(f"""
for way in run, own:
    print(way({command!r}, {str(tmp_path)!r}, NEW="a = b", HOME="/nowhere"), flush=True)
""")
    half = len(lines) // 2
    assert len(lines) > 2
    assert lines[:half] == lines[half:]


@pytest.mark.parametrize("command", ["exit 7", "kill -9 $$", "kill -INT $$", "no-such-command 2>&-", "eval if 2>&-"])
def test_it_ends_as_a_shell_of_its_own_does(command):
    ready, own = told(f"print(run({command!r}))\nprint(own({command!r}))")
    assert ready == own


def test_what_was_preloaded_before_still_is_and_our_library_is_not():
    (line,) = told("""run('echo "$LD_PRELOAD/$HPCQ_READY_SHELL"')""", LD_PRELOAD="libm.so.6")
    assert line == "libm.so.6/"


def test_a_command_shows_in_listings_of_processes():
    (line,) = told('run(\'tr "\\\\0" "|" < /proc/$$/cmdline; echo\')')
    assert line.split() == ["sh|-c|tr", '"\\0"', '"|"', "<", "/proc/$$/cmdline;", "echo", "|"]


def test_a_directory_that_is_not_there_is_an_error_and_no_more():
    assert told("""
try:
    run("true", "/no/such/directory")
except FileNotFoundError as error:
    print(error.strerror)
print(run("true"), ready.is_alone())
""") == ["No such file or directory", "0 True"]


def test_children_that_a_command_leaves_are_seen():
    assert told("""
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # their orphans are ours
run("sleep 600 > /dev/null & echo $!")
print(ready.is_alone(), flush=True)
(left,) = set(map(int, open("/proc/thread-self/children").read().split())) - {ready._pid}
os.kill(left, signal.SIGKILL)
os.wait4(left, 0)
print(ready.is_alone())
""")[1:] == ["False", "True"]


def test_one_that_was_killed_is_replaced():
    assert told("""
first = ready._pid
os.kill(first, signal.SIGKILL)
os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
print(ready.spawn("/", b"true", {}))
print(run("true"), ready._pid != first, ready.is_alone())
""") == ["0", "0 True True"]


def test_a_command_that_kills_it_before_it_answers_goes_on():
    """As `kill 0` may; what it left behind is not taken for it."""
    assert told("""
import ctypes
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans are ours
asked = ready._ask

def killed(request):
    child = asked(request)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    os.kill(ready._pid, signal.SIGKILL)

ready._ask = killed
print(run("sleep 600 > /dev/null & exit 7"), ready.is_alone())
(left,) = map(int, open("/proc/thread-self/children").read().split())
os.kill(left, signal.SIGKILL)
os.wait4(left, 0)
ready._ask = asked
print(run("exit 7"), ready.is_alone())
""") == ["7 False", "7 True"]


def test_what_concerns_the_loader_or_is_too_long_needs_a_shell_of_its_own():
    assert told("""
print(ready.spawn("/", b"true", {b"LD_LIBRARY_PATH": b"/x"}), ready.spawn("/", b":" + b" " * 100_000, {}))
print(ready.is_alone())
""") == ["0 0", "True"]


@pytest.mark.parametrize("answer", ["EINVAL", "ENOSYS", "EPERM"])
def test_where_the_kernel_does_not_make_siblings_there_is_none(answer):
    assert told(f"""
import errno
ready._ask = lambda request: -errno.{answer}
print([ready.spawn("/", b"true", {{}}) for _ in range(2)], ready.is_alone())
print(os.read(ready._children, 10))
""") == ["[0, 0] False", "b''"]


def test_one_whose_children_are_not_ours_is_not_used():
    assert told("""
ready.stop()

def nobodys(self, request):
    return os.getppid()

ReadyShell._ask = nobodys
other = ReadyShell(dict(os.environb))
print(other.spawn("/", b"true", {}), other.is_alone(), os.pread(os.open("/proc/thread-self/children", 0), 9, 0))
""") == ["0 False b''"]


@pytest.mark.parametrize("command", ["exit 1", "kill -9 $$"])
def test_one_that_does_not_do_as_it_should_is_not_used(command):
    assert told(f"""
ready.stop()
asked = ReadyShell._ask
ReadyShell._ask = lambda self, request: asked(self, b"/\\0" + {command.encode()!r} + b"\\0")
print(ReadyShell(dict(os.environb)).spawn("/", b"true", {{}}))
""") == ["0"]


@pytest.mark.parametrize("library", ["/no/such.so", "/etc/passwd", "/bin/sh"])
def test_without_the_library_there_is_none(library):
    lines = told(f"""
from pathlib import Path
ready.stop()
shells.LIBRARY = Path({library!r})
os.dup2(os.open("/dev/null", os.O_WRONLY), 2)  # where the loader says what it thinks of it
other = ReadyShell(dict(os.environb))
print(other.spawn("/", b"true", {{}}), other.is_alone())
""")
    assert lines == ["0 False"]


def test_a_command_that_signals_its_process_group_does_not_meet_us():
    lines = told("""
print(run("trap '' TERM; kill 0; exit 7"))
print(ready.spawn("/", b"true", {}))  # its shell was killed: the next command has one of its own,
print(run("exit 3"))  # and then there is another
""")
    assert lines == ["7", "0", "3"]
