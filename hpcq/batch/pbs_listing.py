"""What ``qstat -f`` says, as JSON (OpenPBS, PBS Pro) or as text (Torque, old versions), in words of ours. Pure.

Seen on OpenPBS 23.06: with no job to show the answer has no ``Jobs``; one unknown id among good ones costs the exit
status, not the others' answers; whatever looks like a number becomes one (``1e5`` in a job's name is 100000). Older
versions write JSON that is none when a variable holds a quote or a newline: then the text is asked for.

Sources: qstat(1B), pbs_job_attributes(7B) and the exit codes of ``pbs_mom`` (``job.h``) of OpenPBS 23.06; qstat(1B) of
Torque 6; ``qstat`` of Slurm's Torque wrappers 22.05.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hpcq.batch.base import JobState, JobStatus

STATES = {
    "Q": JobState.PENDING,
    "W": JobState.PENDING,  # waits for its start time, or for files
    "T": JobState.PENDING,  # on its way to a server or a node
    "H": JobState.HELD,
    "R": JobState.RUNNING,
    "B": JobState.RUNNING,  # an array of which some subjob has begun
    "S": JobState.SUSPENDED,
    "U": JobState.SUSPENDED,  # the owner of the workstation is back
    "E": JobState.COMPLETING,
    "M": JobState.UNKNOWN,  # moved to another server, which alone knows
}
"""The states of a job that has not ended; F, X and C (Torque) have, see `_ended`. Any other is UNKNOWN."""

_ENDED = "FXC"
_DELETED = 91
"""Substate of a finished job that ``qdel`` ended (92: it ended well, 93: it did not)."""
_FAILED = 93

_OWN_ENDS = {
    -29: JobState.TIMEOUT,  # walltime
    -28: JobState.TIMEOUT,  # CPU time
    -27: JobState.OUT_OF_MEMORY,
    -26: JobState.OUT_OF_MEMORY,  # virtual memory
    -14: JobState.NODE_FAIL,  # another node of the job
    -11: JobState.NODE_FAIL,  # the node was rebooted
}
"""Exit statuses that are PBS's own word; those of scripts are 0 to 255, and 256 + N for a kill by signal N."""

_JOB_LINE = re.compile(r"Job Id:\s+(?P<id>\d\S*)", re.ASCII)
_ATTRIBUTE_LINE = re.compile(r"(?: {4}|\t)(?P<name>[A-Za-z][\w.-]*) = (?P<value>.*)", re.ASCII)
_WANTED = ("job_state", "substate", "comment", "exec_host", "exit_status")


class NotJsonError(ValueError):
    """The listing was to be JSON and is not."""


def parse_json(output: str) -> dict[str, JobStatus]:
    """Return what ``qstat -f -F json`` says, by job id; banners before and after it are passed over.

    Raises:
        NotJsonError: there is no such document in it.
    """
    lines = output.splitlines()
    try:
        first = next(number for number, line in enumerate(lines) if line.rstrip() == "{")
        last = max(number for number, line in enumerate(lines) if line.rstrip() == "}")
        document = json.loads("\n".join(lines[first : last + 1]), strict=False)
    except (StopIteration, ValueError, RecursionError) as error:
        raise NotJsonError(str(error) or "there is no document in it") from error
    jobs = document.get("Jobs", {})
    if not isinstance(jobs, dict):
        raise NotJsonError(f"Jobs is a {type(jobs).__name__}")
    return {job_id: _status(job_id, _lower(job)) for job_id, job in jobs.items() if isinstance(job, dict)}


def parse_text(output: str) -> dict[str, JobStatus]:
    """Return what ``qstat -f`` says, by job id. Long values go on in lines that begin with a tab."""
    jobs: dict[str, dict[str, Any]] = {}
    attributes: dict[str, Any] = {}
    name = ""
    for line in output.splitlines():
        if job := _JOB_LINE.fullmatch(line.rstrip()):
            attributes, name = jobs.setdefault(job["id"], {}), ""
        elif attribute := _ATTRIBUTE_LINE.fullmatch(line):
            name = attribute["name"].lower()
            attributes.setdefault(name, attribute["value"].strip())
        elif line.startswith("\t") and name in _WANTED:
            attributes[name] += line[1:].rstrip()
        else:
            name = ""
    return {job_id: _status(job_id, attributes) for job_id, attributes in jobs.items()}


def _lower(job: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in job.items() if name.lower() in _WANTED}


def _status(job_id: str, attributes: Mapping[str, Any]) -> JobStatus:
    letter = str(attributes.get("job_state", ""))
    code = _number(attributes.get("exit_status"))
    state = STATES.get(letter, JobState.UNKNOWN)
    if letter and letter in _ENDED:
        state = _ended(letter, code, _number(attributes.get("substate")))
    return JobStatus(
        id=job_id,
        state=state,
        reason=" ".join(str(attributes.get("comment", "")).split()),
        hosts=_hosts(str(attributes.get("exec_host", ""))),
        exit_code=_exit_code(code),
        raw_state=letter or "?",
    )


def _ended(letter: str, code: int | None, substate: int | None) -> JobState:
    """How a job ended. In OpenPBS one without an exit status never ran: it was deleted; in Torque that says nothing."""
    if code in _OWN_ENDS:
        return _OWN_ENDS[code]
    if substate == _DELETED or (letter != "C" and code is None and substate != _FAILED):
        return JobState.CANCELLED
    return JobState.DONE if code in (0, None) and substate != _FAILED else JobState.FAILED


def _exit_code(code: int | None) -> int | None:
    """The script's own exit status, or -N for signal N; PBS's own codes are no status of the script."""
    if code is None or code < 0:
        return None
    return 256 - code if code > 256 else code


def _number(value: object) -> int | None:
    try:
        return int(str(value))
    except ValueError:
        return None


def _hosts(text: str) -> str:
    """The nodes of ``exec_host``: "n1/0*8+n2/0*8" → "n1,n2"."""
    return ",".join(dict.fromkeys(filter(None, (part.partition("/")[0].strip() for part in text.split("+")))))
