"""Which job a pilot is in, and which of its incarnations it is, from the environment that batch systems give."""

import socket

import pytest

from hpcq.pilot.options import Job, job, pilot_name


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Job("", 0, 0)),
        ({"SLURM_JOB_ID": "7"}, Job("7", 0, 0)),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, Job("7_2", 0, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "SLURM_PROCID": "1"}, Job("7", 3, 1)),
        ({"HPCQ_JOB_ID": "18.pbs1", "HPCQ_STARTS": "1"}, Job("18.pbs1", 0, 0)),
        ({"HPCQ_JOB_ID": "18.pbs1", "HPCQ_STARTS": "3"}, Job("18.pbs1", 2, 0)),
        ({"HPCQ_JOB_ID": "77", "HPCQ_STARTS": "1", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, Job("77", 1, 0)),
        ({"HPCQ_JOB_ID": "18.pbs1", "HPCQ_STARTS": "-3"}, Job("18.pbs1", 0, 0)),
        ({"HPCQ_JOB_ID": "18.pbs1", "HPCQ_STARTS": "²"}, Job("18.pbs1", 0, 0)),
    ],
)
def test_the_job(environment, expected):
    assert job(environment) == expected


def test_incarnations_and_ranks_have_names_of_their_own():
    host = socket.gethostname()
    assert pilot_name("pbs", Job("18.pbs1", 0, 0)) == f"pbs-18.pbs1@{host}"
    assert pilot_name("pbs", Job("18.pbs1", 2, 1)) == f"pbs-18.pbs1.2/1@{host}"
