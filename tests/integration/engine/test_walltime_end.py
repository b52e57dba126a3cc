"""A batch system ends its jobs: SIGTERM with tasks running, SIGKILL soon after. Over and over, at any moment.

The issue asks for a hundred such ends; a run has `ROUNDS` of them (``HPCQ_TEST_ROUNDS`` sets another number).
"""

import os
import random
import signal
import sys
import time

import cloudpickle
from running import DEADLINE

import hpcq

cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROUNDS = int(os.environ.get("HPCQ_TEST_ROUNDS", "4"))
CORES = 2
KILL_WAIT = 60.0
"""Seconds between SIGTERM and SIGKILL: Slurm's are 30, PBS's 10; more, for a machine that is busy with other things."""


def note(file, number, seconds):
    """Write that we began, work, write that we finished."""
    import time  # noqa: PLC0415

    def say(what):
        with open(file, "a") as marks:  # noqa: PTH123 - one short write to the end is not torn
            marks.write(f"{what} {number}\n")

    say("begun")
    time.sleep(seconds)
    say("finished")
    return number


def test_ends_of_jobs_lose_no_result_and_double_none(queue, start_pilot, tmp_path):
    chance = random.Random(20)
    marks = tmp_path / "marks"
    marks.touch()
    submitted = [
        queue.submit(hpcq.PythonTask(note, str(marks), number, chance.choice((0.0, 0.05, 0.3))).set(retries=1000))
        for number in range(ROUNDS * 40)
    ]
    results = []
    rounds = 0
    while not queue.empty():
        pilot = start_pilot(queue, "--drain-timeout", "30", cores=CORES)  # more than any task takes
        if rounds < ROUNDS:
            end = time.monotonic() + chance.uniform(0.5, 2.0)
            while time.monotonic() < end and not queue.empty():
                if (task := queue.wait(0.05)) is not None:
                    results.append(task)
            pilot.process.send_signal(signal.SIGTERM)
            try:
                pilot.process.wait(KILL_WAIT)
            finally:
                pilot.process.kill()
                pilot.process.wait()
            rounds += 1
        else:
            while not queue.empty():
                results.append(queue.wait(DEADLINE))
            break
    assert rounds == ROUNDS, "there was work for every round"
    assert sorted(task.id for task in results) == submitted, "every task has one result"
    assert {str(task.outcome) for task in results} == {"success"}
    assert all(task.output == task.args[1] for task in results)
    finished = [line.split()[1] for line in marks.read_text().splitlines() if line.startswith("finished")]
    assert len(finished) == len(set(finished)) == len(submitted), "nothing that had finished ran again"
