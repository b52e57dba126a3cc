"""Forks of a process whose thread hooks are left out: threads and logging work in the child, with and without."""

import os
import subprocess
import sys

SCRIPT = """
import os, sys
from hpcq.pilot import forkhooks

assert "threading" not in sys.modules
registered = []
register = os.register_at_fork
def noting(**hooks):
    registered.append(sys._getframe(1).f_globals["__name__"])
    register(**hooks)
os.register_at_fork = noting
forkhooks.install()
import logging, random, threading

assert registered == ["hpcq.pilot.forkhooks", "random"], registered  # what random does at a fork everybody needs

def child():
    assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    assert threading.current_thread() is threading.main_thread()
    logging.warning("heard")
    done = []
    thread = threading.Thread(target=done.append, args=(1,))
    thread.start()
    thread.join()
    assert done == [1]
    print(random.random(), flush=True)

def fork():
    number = os.fork()
    if number == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0

def hold(lock, locked, let_go):
    with lock:
        locked.set()
        let_go.wait()

fork()
fork()
ready, let_go = threading.Event(), threading.Event()
handler = logging.lastResort
other = threading.Thread(target=hold, args=(handler.lock, ready, let_go))
other.start()
ready.wait()
fork()  # the other thread holds the handler's lock and is not there in the child
let_go.set()
other.join()
logging.warning("heard by the parent")
print("done")
"""


def test_threads_and_logging_work_in_forks():
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-S", "-c", SCRIPT]  # nothing has imported threading before we begin
    run = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=found)
    assert run.returncode == 0, run.stderr
    *drawn, last = run.stdout.split()
    assert last == "done"
    assert len(drawn) == len(set(drawn)) == 3
    assert run.stderr.count("heard") == 4
